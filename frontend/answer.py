"""What the answers of the two generating routes have in common: the head of every object, `usage`, the stream's loop.

Owns the order of a streamed answer; `completions.py` and `chat.py` say what a piece of text looks like. Must not know
sockets.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

from .generation import Api, Tally
from .schemas import SamplingBody
from .sse import event, json_bytes
from .stream import Piece, Stream
from .submission import Request


class Answer(ABC):
    """Puts the answer to one request together, in one piece or in chunks.

    `chunk_kind`: the `object` of a chunk; `text_key`: the JSON of a choice from its index to its text.
    """

    def __init__(self, api: Api, body: SamplingBody, request: Request, chunk_kind: str, text_key: str) -> None:
        self._api = api
        self._request = request
        self._tally = Tally(request.prompts)
        self._created = int(time.time())
        self._model = api.config.model_name
        self._begun: set[int] = set()  # sequences that have said something
        self._chunk_kind = chunk_kind
        options = body.stream_options
        self._usage_at_end = bool(body.stream and options and options.include_usage)
        self._usage_always = bool(self._usage_at_end and options and options.continuous_usage_stats)
        # Most chunks are text alone: all before the text is made once, as a string.
        head = json_bytes(self._head(chunk_kind))[:-1].decode()
        chunked = range(request.sequences if body.stream else 0)
        self._prefixes = [f'data: {head},"choices":[{{"index":{i},{text_key}:' for i in chunked]

    async def stream(self, stream: Stream, pieces: list[Piece]) -> AsyncGenerator[bytes, None]:
        """The answer as events; `pieces` is what has come already."""
        while True:
            out = b"".join([self._chunk(piece) for piece in self._ready(pieces)])
            if out:
                yield out
            if stream.remaining == 0 and stream.failure is None and not stream.changed:
                break
            pieces = await stream.take()
        if self._usage_at_end:
            yield event({**self._head(self._chunk_kind), "choices": [], "usage": self._usage()})

    def _ready(self, pieces: list[Piece]) -> list[Piece]:
        """What can be sent now of what has come; a route that must keep some of it back says so here."""
        return pieces

    @abstractmethod
    def _chunk(self, piece: Piece) -> bytes:
        """The events for `piece`, if any."""

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._request.request_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def _usage(self, *, final: bool = True) -> dict[str, Any]:
        return self._tally.usage(self._request.params.n, final=final)

    def _chunk_of(self, choice: dict[str, Any]) -> bytes:
        """One choice as an event, with the usage so far where every chunk is to carry it."""
        value = {**self._head(self._chunk_kind), "choices": [choice]}
        if self._usage_always:
            value["usage"] = self._usage(final=False)
        return event(value)
