"""The live requests by their two names, and what the detokenizer has not been told yet.

Owns the pairing of numbers with frontends' keys, `OpenStream`s and `StreamEnd`s: each request is opened once and
ended once. Must not know slots, blocks or the queue.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..protocol.errors import EngineError
from ..protocol.messages import Deliver, OpenStream, StreamEnd
from .outcome import Outcome
from .request import REASONS, Request

CONTEXT_TOKENS = 8  # of the prompt, for the detokenizer to start in the middle of a text


class Streams:
    """What is open, and the makings of the next `Deliver`."""

    def __init__(self) -> None:
        self._by_number: dict[int, Request] = {}
        self._by_key: dict[tuple[str, int], Request] = {}
        self._opened: list[OpenStream] = []
        self._ended: list[StreamEnd] = []

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._by_number.values()))

    def numbered(self, number: int) -> Request | None:
        """The live request with the scheduler's `number`."""
        return self._by_number.get(number)

    def keyed(self, frontend: str, key: int) -> Request | None:
        """The live request that `frontend` submitted under `key`."""
        return self._by_key.get((frontend, key))

    def open(self, request: Request) -> None:
        """A request has come; its key must not be in use."""
        self._by_number[request.number] = request
        self._by_key[request.frontend, request.key] = request
        self._opened.append(
            OpenStream(
                number=request.number,
                frontend=request.frontend,
                key=request.key,
                params=request.params,
                context_token_ids=request.tokens[-CONTEXT_TOKENS:],
                prompt_tokens=request.num_prompt,
                arrival=request.arrival,
            )
        )

    def end(
        self, request: Request, known: int, now: float, *, stop_reason: int | None, error: EngineError | None
    ) -> None:
        """A request is in one of its final states, with `known` tokens, the prompt's among them."""
        del self._by_number[request.number]
        del self._by_key[request.frontend, request.key]
        self._ended.append(
            StreamEnd(
                key=request.number,
                reason=REASONS[request.state],
                stop_reason=stop_reason,
                code=error.code if error else "",
                message=error.message if error else "",
                param=error.param if error else None,
                retry_after=error.retry_after if error else None,
                prompt_tokens=request.num_prompt,
                completion_tokens=known - request.num_prompt,
                cached_tokens=request.cached_tokens,
                preemptions=request.preemptions,
                arrival=request.arrival,
                first_scheduled=request.first_scheduled,
                first_token=request.first_token,
                finished=now,
            )
        )

    def deliver(self, outcome: Outcome | None = None) -> Deliver | None:
        """All that is to be told since the last time, with the tokens of `outcome`. Streams that were opened wait
        for the first message that has something to say about any stream: None until then."""
        if outcome is None:
            if not self._ended:
                return None
            outcome = Outcome()
        if not len(outcome.tokens) and not outcome.prompt_logprobs and not self._ended:
            return None
        message = Deliver(
            opened=tuple(self._opened),
            numbers=outcome.numbers,
            tokens=outcome.tokens,
            logprobs=outcome.logprobs,
            prompt_logprobs=tuple(outcome.prompt_logprobs),
            ended=tuple(self._ended),
        )
        self._opened.clear()
        self._ended.clear()
        return message
