"""A client's side of one request: what has come of it, and the `RequestOutput`s made from that.

A pure core of `async_client.py`, apart from the future that wakes the reader. Must not know sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..protocol.errors import EngineError, InvalidRequest, error_from_code
from ..protocol.messages import Generate, Int32, StreamEnd, TopLogprobs
from ..protocol.sampling import RequestOutputKind, SamplingParams
from .logprobs import TokenLogprobs, prompt_positions
from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

Prompt = str | Sequence[int] | Mapping[str, Any]
CANCELLED = "cancelled"  # code of a refusal that the client itself asked for


class SequenceState:
    """One of a request's n sequences."""

    __slots__ = ("cumulative_logprob", "end", "index", "logprobs", "seen_ids", "seen_logprobs", "text", "texts",
                 "token_ids")  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""  # already joined
        self.texts: list[str] = []  # since then
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.end: StreamEnd | None = None
        self.seen_ids = 0  # how many of them the reader has been given
        self.seen_logprobs = 0

    def output(self, delta: bool, with_logprobs: bool) -> CompletionOutput:
        new = "".join(self.texts)
        self.texts.clear()
        ids, records = self.token_ids, self.logprobs
        if delta:
            text = new
            ids, records = ids[self.seen_ids :], records[self.seen_logprobs :]
        else:
            self.text = text = self.text + new
            ids, records = ids.copy(), records.copy()
        self.seen_ids, self.seen_logprobs = len(self.token_ids), len(self.logprobs)
        end = self.end
        return CompletionOutput(
            self.index,
            text,
            ids,
            self.cumulative_logprob if with_logprobs else None,
            records if with_logprobs else None,
            None if end is None else end.reason,
            None if end is None else end.stop_reason,
        )


class ClientRequest:
    """One request on its way."""

    __slots__ = (
        "_params",
        "_prompt",
        "_prompt_parts",
        "_prompt_token_ids",
        "_waiter",
        "arrival",
        "changed",
        "error",
        "final_only",
        "key",
        "last_end",
        "on_accepted",
        "remaining",
        "request_id",
        "sequences",
    )

    def __init__(self, key: int, request_id: str, prompt: str | None, params: SamplingParams, arrival: float) -> None:
        self.key = key
        self.request_id = request_id
        self.arrival = arrival
        self._prompt_token_ids: Int32 | list[int] = []  # an array until somebody wants to see them
        self.on_accepted: Callable[[], None] | None = None
        self.sequences = [SequenceState(i) for i in range(params.n)]
        self.remaining = params.n
        self.error: EngineError | None = None
        self.changed = False
        self.last_end: StreamEnd | None = None
        self._params = params
        self._prompt = prompt
        self.final_only = params.output_kind == RequestOutputKind.FINAL_ONLY
        self._prompt_parts: list[tuple[TopLogprobs, list[str]]] = []
        self._waiter: asyncio.Future[None] | None = None

    # ---- what comes --------------------------------------------------------------------------------------------

    def accept(self, prompt_token_ids: Int32) -> None:
        """The engine has queued it."""
        self._prompt_token_ids = prompt_token_ids
        if self.on_accepted is not None:
            self.on_accepted()

    def on_prompt_logprobs(self, top: TopLogprobs, texts: list[str]) -> None:
        self._prompt_parts.append((top, texts))

    def on_logprobs(self, index: int, records: list[TokenLogprobs]) -> None:
        sequence = self.sequences[index]
        for record in records:
            sequence.cumulative_logprob += record.values[0]
            sequence.logprobs.append(record.by_token())

    def on_end(self, end: StreamEnd) -> None:
        """A sequence has ended; a failed one fails the request."""
        sequence = self.sequences[end.index]
        if sequence.end is not None:
            return
        sequence.end = self.last_end = end
        self.remaining -= 1
        self.changed = True
        if end.reason in ("rejected", "error"):
            self.fail(error_from_code(end.code, end.message, end.param, end.retry_after))
        elif self.remaining == 0 or not self.final_only:
            self.wake()

    def on_abort(self) -> None:
        """Every sequence that still ran ends with reason `abort`."""
        for sequence in self.sequences:
            if sequence.end is None:
                self.on_end(StreamEnd(key=self.key, index=sequence.index, reason="abort"))

    def fail(self, error: EngineError) -> None:
        if self.error is None:
            self.error = error
        self.wake()

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    # ---- what goes out -----------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.remaining == 0

    @property
    def prompt_token_ids(self) -> list[int]:
        ids = self._prompt_token_ids
        if not isinstance(ids, list):
            ids = self._prompt_token_ids = ids.tolist()
        return ids

    async def next_output(self) -> RequestOutput:
        """Wait for news, or for the end where only that is wanted. Raises the request's `EngineError`."""
        while self.error is None and not (self.finished if self.final_only else self.changed):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        self.changed = False
        return self._output()

    def _output(self) -> RequestOutput:
        params, end = self._params, self.last_end
        delta = params.output_kind == RequestOutputKind.DELTA
        with_logprobs = params.logprobs is not None
        metrics = RequestMetrics(self.arrival)
        if end is not None:
            metrics.first_scheduled_time = end.first_scheduled or None
            metrics.first_token_time = end.first_token or None
            metrics.finished_time = end.finished or None
            metrics.num_preemptions = end.preemptions
        return RequestOutput(
            self.request_id,
            self._prompt,
            self.prompt_token_ids,
            [s.output(delta, with_logprobs) for s in self.sequences],
            self.remaining == 0,
            None if params.prompt_logprobs is None else self._prompt_logprobs(),
            metrics,
            0 if end is None else end.cached_tokens,
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None]:
        records = prompt_positions(len(self.prompt_token_ids), self._prompt_parts)
        return [None if record is None else record.by_token() for record in records]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a request is to be treated, apart from sampling: see the arguments of `AsyncClient.generate`."""

    priority: int = 0
    cache_salt: str = ""
    client: str = ""
    deadline_ms: int | None = None


def generate_message(
    key: int, request_id: str, prompt: Prompt, params: SamplingParams, terms: Terms
) -> tuple[Generate, str | None]:
    """The message for a prompt in any of its forms, and its text where it has one."""
    text: str | None = None
    ids: Sequence[int] | None = None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            ids = prompt["prompt_token_ids"]
        elif isinstance(prompt.get("prompt"), str):
            text = prompt["prompt"]
        else:
            raise InvalidRequest(
                f"prompt must hold prompt_token_ids or prompt, got the keys {sorted(prompt)}", param="prompt"
            )
    else:
        ids = prompt
    array = None
    if ids is not None:
        try:
            array = np.asarray(ids, np.int32)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"prompt must be a string or token ids: {error}", param="prompt") from None
        if array.ndim != 1:
            raise InvalidRequest(f"prompt token ids must be one flat list, got {array.ndim} levels", param="prompt")
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else None
    message = Generate(
        key=key,
        request_id=request_id,
        params=params,
        prompt=text if array is None else None,
        prompt_token_ids=array,
        priority=terms.priority,
        cache_salt=terms.cache_salt,
        client=terms.client,
        deadline_ms=terms.deadline_ms,
    )
    return message, text
