"""`Client`: the client library without asyncio: an `AsyncClient` on a thread with an event loop.

Owns what a blocking caller sees of it: lists of results, iterators, a progress bar; must not know the wire.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..protocol.errors import EngineError, InvalidRequest, Overloaded
from ..protocol.messages import EngineInfo, Stats
from ..protocol.sampling import RequestOutputKind, SamplingParams
from .async_client import AsyncClient
from .client_requests import Prompt
from .loop_thread import LoopThread
from .outputs import RequestOutput

MAX_IN_FLIGHT = 4096  # requests of one `generate` call that the engine is given at once

Messages = list[dict[str, Any]]


class Client:
    """A connection to a running engine, for code without an event loop. Thread-safe."""

    def __init__(self, endpoint: str, *, connect_timeout: float = 30.0) -> None:
        self._thread = LoopThread("fast-inference-client", "the client was closed")
        self._client = AsyncClient(endpoint, connect_timeout=connect_timeout)
        try:
            self._thread.call(self._client.connect())
        except BaseException:
            self._thread.close()
            raise

    # ---- life --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close the connection."""
        if not self._thread.closed:
            self._thread.call(self._client.close())
            self._thread.close()

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    def fail_all(self, error: EngineError) -> None:
        """As `AsyncClient.fail_all`, from any thread; once closed there is nothing to do."""
        self._thread.call_soon(lambda: self._client.fail_all(error))

    def get_stats(self, timeout: float = 10.0) -> Stats:
        """The scheduler's figures of this moment."""
        return self._thread.call(self._client.get_stats(timeout))

    def abort(self, request_id: str) -> None:
        """End the requests of that name."""
        self._thread.call(self._client.abort(request_id))

    # ---- requests ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        client: str | list[str] = "",
        deadline_ms: int | Sequence[int] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many; the results are in the prompts' order.

        `params` and what follows: one for all, or one per prompt, as in `AsyncClient.generate`. `use_tqdm` (vLLM's
        name) shows a progress bar. Raises the error of the first request that fails; the others are cancelled then.
        Refusals for want of room are tried again.
        """
        many = as_list(prompts)
        return self._run_all(
            many, params, _terms(len(many), priority, client, deadline_ms), use_tqdm, self._client.generate
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        client: str | list[str] = "",
        deadline_ms: int | Sequence[int] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or many."""
        many = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        return self._run_all(
            many, params, _terms(len(many), priority, client, deadline_ms), use_tqdm, self._client.chat
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> Iterator[RequestOutput]:
        """Generate for one prompt, yielding outputs as they come. Leaving the iteration early cancels."""
        source = self._client.generate(prompt, params, priority=priority, client=client, deadline_ms=deadline_ms)
        return self._stream(source)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> Iterator[RequestOutput]:
        """As `stream`, for a conversation."""
        source = self._client.chat(messages, params, priority=priority, client=client, deadline_ms=deadline_ms)
        return self._stream(source)

    def _stream(self, source: AsyncIterator[RequestOutput]) -> Iterator[RequestOutput]:
        outputs: queue.SimpleQueue[RequestOutput | BaseException | None] = queue.SimpleQueue()

        async def feed() -> None:
            try:
                async for output in source:
                    outputs.put(output)
                outputs.put(None)
            except Exception as error:  # noqa: BLE001  # handed to the reader's thread, which raises it
                outputs.put(error)

        feeding = self._thread.start(feed())
        try:
            while (item := outputs.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            feeding.cancel()

    def _run_all(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        terms: list[dict[str, Any]],
        use_tqdm: bool,
        start: Callable[..., AsyncGenerator[RequestOutput, None]],
    ) -> list[RequestOutput]:
        count = len(prompts)
        every_params = [
            p.replace(output_kind=RequestOutputKind.FINAL_ONLY) for p in per_prompt("params", params, count)
        ]
        with _Bar(count) if use_tqdm else nullcontext() as bar:

            async def one(place: int) -> RequestOutput:
                async with room:
                    return await _final(start, prompts[place], every_params[place], terms[place], bar)

            async def run() -> list[RequestOutput]:
                tasks = [asyncio.ensure_future(one(i)) for i in range(count)]
                try:
                    return list(await asyncio.gather(*tasks))
                except BaseException:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                    raise

            room = asyncio.Semaphore(MAX_IN_FLIGHT)
            return self._thread.call(run())


async def _final(
    start: Callable[..., AsyncGenerator[RequestOutput, None]],
    prompt: Any,
    params: SamplingParams,
    terms: dict[str, Any],
    bar: _Bar | None,
) -> RequestOutput:
    """The last output of one request; waits and tries again while the engine has no room."""
    while True:
        try:
            async for output in start(prompt, params, **terms):
                if output.finished:
                    if bar is not None:
                        bar.done(output)
                    return output
        except Overloaded as error:
            await asyncio.sleep(error.retry_after or 1.0)


def as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt (string, mapping, flat list of ids) becomes a list of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if len(prompts) and not isinstance(prompts[0], str | Sequence | Mapping) and not hasattr(prompts[0], "__len__"):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _terms(
    count: int,
    priority: int | Sequence[int],
    client: str | list[str],
    deadline_ms: int | Sequence[int] | None,
) -> list[dict[str, Any]]:
    """How each of `count` requests is to be treated, as keyword arguments."""
    columns = {
        "priority": per_prompt("priority", priority, count),
        "client": [client] * count if isinstance(client, str) else per_prompt("client", client, count),
        "deadline_ms": [None] * count if deadline_ms is None else per_prompt("deadline_ms", deadline_ms, count),
    }
    return [{name: column[place] for name, column in columns.items()} for place in range(count)]


def per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` prompts: itself, or its items."""
    if value is None:
        return [SamplingParams()] * count
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name} must be one, or one per prompt: got {len(value)} for {count} prompts", param=name)
    return list(value)


class _Bar:
    """The progress bar of a `generate` call."""

    def __init__(self, count: int) -> None:
        self._tokens = 0
        self._start = time.monotonic()
        self._progress = Progress(
            TextColumn("generate"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        )
        self._task = self._progress.add_task("generate", total=count, speed=0.0)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def done(self, output: RequestOutput) -> None:
        """One request has ended."""
        self._tokens += sum(len(sequence.token_ids) for sequence in output.outputs)
        speed = self._tokens / max(1e-9, time.monotonic() - self._start)
        self._progress.update(self._task, advance=1, speed=speed)
