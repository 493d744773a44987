"""What has come for one local (HTTP) request and waits for its reader.

Owns the pending text of a request's sequences, merged until the reader takes it, and the reader's wake-up. Must not
know sockets, keys or HTTP.
"""

from __future__ import annotations

import asyncio

from ..protocol.errors import EngineError, error_from_code
from ..protocol.messages import StreamEnd, TopLogprobs
from .logprobs import TokenLogprobs


class Piece:
    """New output of one sequence since the reader last looked."""

    __slots__ = ("count", "end", "index", "logprobs", "prompt_logprobs", "texts", "token_ids")

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: list[str] = []
        self.count = 0  # tokens
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[tuple[TopLogprobs, list[str]]] = []
        self.end: StreamEnd | None = None

    @property
    def is_news(self) -> bool:
        return bool(self.count or self.texts or self.end)

    @property
    def text(self) -> str:
        return self.texts[0] if len(self.texts) == 1 else "".join(self.texts)


class Stream:
    """The sequences of one request on their way to one reader.

    With `whole`, the reader is woken only when every sequence has ended (or one has failed).
    """

    __slots__ = ("_pending", "_waiter", "changed", "closed", "failure", "keys", "remaining", "whole")

    def __init__(self, keys: list[int], *, whole: bool = False) -> None:
        self.keys = keys
        self.whole = whole
        self.remaining = len(keys)
        self.closed = False  # nobody reads any more
        self.failure: StreamEnd | None = None
        self._pending: dict[int, Piece] = {}
        self.changed = False
        self._waiter: asyncio.Future[None] | None = None

    def piece(self, index: int) -> Piece:
        """Where new output of sequence `index` is collected."""
        self.changed = True
        return self.kept(index)

    def kept(self, index: int) -> Piece:
        """The same, for what is no news by itself: it waits for the sequence's first token."""
        piece = self._pending.get(index)
        if piece is None:
            piece = self._pending[index] = Piece(index)
        return piece

    def end(self, end: StreamEnd) -> None:
        """The one end of sequence `end.index`."""
        self.remaining -= 1
        if end.reason in ("rejected", "error"):
            if self.failure is None:
                self.failure = end
        else:
            self.piece(end.index).end = end

    def wake(self) -> None:
        """Let the reader look, if there is something for it."""
        ready = self.failure is not None or (self.remaining == 0 if self.whole else self.changed)
        if ready and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Piece]:
        """Wait for news and return it by sequence. Raises the `EngineError` of a sequence that failed, once what
        came before has been taken (with `whole` at once: half an answer is none)."""
        while not self._is_ready():
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.failure is not None and (self.whole or not self.changed):
            raise error_of(self.failure)
        pieces = [piece for piece in self._pending.values() if piece.is_news]
        self._pending = {index: piece for index, piece in self._pending.items() if not piece.is_news}
        self.changed = False
        return pieces

    def _is_ready(self) -> bool:
        if self.failure is not None:
            return True
        return self.remaining == 0 if self.whole else self.changed or self.remaining == 0


def error_of(end: StreamEnd) -> EngineError:
    """The error that a `rejected` or `error` end tells of."""
    return error_from_code(end.code, end.message, end.param, end.retry_after)
