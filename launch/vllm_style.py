"""`create_vllm_style_engine`: the engine of the original usage examples, on top of `AsyncEngine`.

Owns the shape of those calls: made without an event loop, used from any. Must not know scheduling or tensors.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from typing import Any

from ..frontend.client_requests import Prompt, Terms
from ..frontend.loop_thread import LoopThread
from ..frontend.outputs import RequestOutput
from ..protocol.config import EngineConfig
from ..protocol.errors import EngineDead, EngineError
from ..protocol.messages import Stats
from ..protocol.policy_names import SchedulerPolicy
from ..protocol.sampling import RequestOutputKind, SamplingParams
from .bridge import Bridge
from .engine import AsyncEngine

log = logging.getLogger(__name__)


class RequestHandle:
    """A request in the engine's queue: await it for its `RequestOutput`, or iterate over its text as it comes."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._texts: Bridge[str] = Bridge()
        self._result: concurrent.futures.Future[RequestOutput] = concurrent.futures.Future()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return asyncio.wrap_future(self._result).__await__()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._texts.__aiter__()

    def done(self) -> bool:
        """Whether the request has ended."""
        return self._result.done()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the request, blocking this thread for up to `timeout` seconds. Raises its error."""
        return self._result.result(timeout)

    def add(self, text: str) -> None:
        """More text has come."""
        if text:
            self._texts.put(text)

    def end(self, result: RequestOutput | EngineError) -> None:
        """The request has ended."""
        if isinstance(result, EngineError):
            self._result.set_exception(result)
            self._texts.close(result)
        else:
            self._result.set_result(result)
            self._texts.close()


class KVCacheView:
    """The engine's KV blocks as figures."""

    def __init__(self, engine: VLLMStyleEngine) -> None:
        self._engine = engine

    def get_memory_stats(self) -> dict[str, float | int]:
        """Blocks by use, `utilization` (used / all) and `fragmentation` (share of the used slots without a token)."""
        return memory_stats(self._engine.get_stats())


class Activity:
    """How long requests have been under way, for the throughput. Times are `time.monotonic()` seconds."""

    def __init__(self) -> None:
        self._running = 0
        self._since = 0.0
        self._seconds = 0.0

    def begin(self, now: float) -> None:
        """A request starts."""
        if self._running == 0:
            self._since = now
        self._running += 1

    def end(self, now: float) -> None:
        """A request has ended."""
        self._running -= 1
        if self._running == 0:
            self._seconds += now - self._since

    def seconds(self, now: float) -> float:
        """Seconds in which at least one request was under way."""
        return self._seconds + (now - self._since if self._running else 0.0)


class VLLMStyleEngine:
    """See `create_vllm_style_engine`. Every method may be called with or without a running event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._thread = LoopThread("fast-inference-engine", "the engine was shut down")
        self._engine = engine
        self._activity = Activity()
        self.kv_cache = KVCacheView(self)
        try:
            self._thread.call(engine.start())
        except BaseException:
            self._thread.close()
            raise
        self._finalizer = weakref.finalize(self, _close, self._thread, engine)
        # When the program ends the engine's own finalizer stops it; no thread pool works then, as closing needs.
        self._finalizer.atexit = False

    async def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        *,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> AsyncIterator[str]:
        """Generate for one prompt, yielding text as it comes. Leaving the iteration early aborts the request. What
        follows `sampling_params` is as in `add_request`."""
        terms = Terms(priority=priority, client=client, deadline_ms=deadline_ms)
        params = (sampling_params or SamplingParams()).replace(output_kind=RequestOutputKind.DELTA)
        texts: Bridge[str] = Bridge()
        feeding = self._thread.start(self._feed(texts, prompt, params, terms))
        try:
            async for text in texts:
                yield text
        finally:
            feeding.cancel()

    async def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        request_id: str | None = None,
        *,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> RequestHandle:
        """Put a request into the engine's queue; returns once it is there.

        Args:
            prompt: a string or token ids.
            sampling_params: how to sample.
            priority: under the "priority" policy the higher goes first.
            request_id: a name for `abort`.
            client: who asks; under the "fair" policy each client gets its share.
            deadline_ms: under the "deadline" policy, within how long the first token is wanted.

        Returns: the request, to be awaited or iterated over, or left to itself.

        Raises: `EngineError` if the engine refuses it.
        """
        handle = RequestHandle(request_id or f"req-{uuid.uuid4().hex}")
        terms = Terms(priority=priority, client=client, deadline_ms=deadline_ms)
        await self._thread.wait(self._enqueue(handle, prompt, sampling_params or SamplingParams(), terms))
        return handle

    async def abort(self, request_id: str) -> None:
        """End the request of that name."""
        await self._thread.wait(self._engine.abort(request_id))

    def get_stats(self) -> Stats:
        """The scheduler's figures of this moment."""
        return self._thread.call(self._engine.get_stats())

    def get_metrics(self) -> dict[str, Any]:
        """Figures since the start: `throughput_tokens_per_sec` (over the time in which requests were under way),
        token and request counts, and `memory_stats` as of `kv_cache.get_memory_stats`."""
        stats = self.get_stats()
        seconds = self._activity.seconds(time.monotonic())
        return {
            "throughput_tokens_per_sec": stats.generation_tokens / seconds if seconds else 0.0,
            "memory_stats": memory_stats(stats),
            "num_running": stats.running,
            "num_waiting": stats.waiting,
            "num_finished": sum(stats.finished.values()),
            "num_preemptions": stats.preemptions,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generation_tokens,
            "prefix_cache_hit_rate": stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
        }

    @property
    def endpoint(self) -> str:
        """Where other processes of this user reach the engine with `Client` or `AsyncClient`."""
        return self._engine.endpoint

    def shutdown(self) -> None:
        """Stop the engine; nothing of it is left on return. A second call does nothing."""
        self._finalizer()

    # ---- on the engine's thread ----------------------------------------------------------------------------------

    def _generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        terms: Terms,
        request_id: str | None = None,
        on_accepted: Callable[[], None] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        return self._engine.generate(
            prompt,
            params,
            request_id,
            terms.priority,
            on_accepted,
            client=terms.client,
            deadline_ms=terms.deadline_ms,
        )

    async def _feed(self, texts: Bridge[str], prompt: Prompt, params: SamplingParams, terms: Terms) -> None:
        self._activity.begin(time.monotonic())
        try:
            async for output in self._generate(prompt, params, terms):
                if output.outputs[0].text:
                    texts.put(output.outputs[0].text)
            texts.close()
        except EngineError as error:
            texts.close(error)
        except asyncio.CancelledError:
            texts.close(EngineDead("the engine was shut down"))
            raise
        finally:
            self._activity.end(time.monotonic())

    async def _enqueue(self, handle: RequestHandle, prompt: Prompt, params: SamplingParams, terms: Terms) -> None:
        accepted = asyncio.Event()
        running = asyncio.create_task(self._follow(handle, prompt, params, terms, accepted.set))
        waiting = asyncio.create_task(accepted.wait())
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not accepted.is_set():
            running.result()
            handle.result()

    async def _follow(
        self, handle: RequestHandle, prompt: Prompt, params: SamplingParams, terms: Terms, accepted: Any
    ) -> None:
        self._activity.begin(time.monotonic())
        whole = params.replace(output_kind=RequestOutputKind.CUMULATIVE)
        given = 0
        try:
            async for output in self._generate(prompt, whole, terms, handle.request_id, accepted):
                text = output.outputs[0].text
                handle.add(text[given:])
                given = len(text)
                if output.finished:
                    handle.end(output)
        except EngineError as error:
            if not isinstance(error, EngineDead):
                log.warning("request %s failed: %s", handle.request_id, error)  # it may be that nobody awaits it
            handle.end(error)
        except asyncio.CancelledError:
            handle.end(EngineDead("the engine was shut down"))
            raise
        finally:
            self._activity.end(time.monotonic())


def memory_stats(stats: Stats) -> dict[str, float | int]:
    """The KV part of the scheduler's figures."""
    return {
        "utilization": stats.utilization,
        "fragmentation": stats.fragmentation,
        "num_blocks": stats.num_blocks,
        "used_blocks": stats.used_blocks,
        "cached_blocks": stats.cached_blocks,
        "free_blocks": stats.free_blocks,
    }


def create_vllm_style_engine(
    model: object = None,
    tokenizer: object = None,
    config: object = None,
    num_blocks: int | None = None,
    block_size: int | None = None,
    scheduler_policy: SchedulerPolicy | str | None = None,
    **options: Any,
) -> VLLMStyleEngine:
    """An engine for the calls `generate_async`, `add_request`, `get_metrics`, `kv_cache.get_memory_stats`.

    Args:
        model: a folder or hub name, a live `torch.nn.Module` (Hugging Face's too), or None for the default model.
        tokenizer: a folder or hub name, a live tokenizer, or None for the model's own.
        config: an `EngineConfig` or a dict of its fields; a model's own configuration is taken too, and not needed,
            since the model knows it.
        num_blocks: KV blocks; None: as many as the memory setting gives.
        block_size: tokens in a KV block.
        scheduler_policy: order of the waiting requests; None: that of `config`, else first come, first served.
        options: the fields of `EngineConfig` by name.

    Returns: the engine, running. It is stopped by `shutdown`, or when the program ends.

    Raises: `InvalidRequest` for a setting out of its range, `StartupError` if the engine can't start.
    """
    given = {"num_blocks": num_blocks, "block_size": block_size, "scheduling_policy": scheduler_policy}
    settings = options | {name: value for name, value in given.items() if value is not None}
    ours = config if isinstance(config, EngineConfig | Mapping) else None
    return VLLMStyleEngine(AsyncEngine(model, tokenizer, config=ours, **settings))


def _close(thread: LoopThread, engine: AsyncEngine) -> None:
    thread.call(engine.stop())
    thread.close()
