"""`AsyncEngine`: an engine under an asyncio program. Starts the processes, hands back what they generate.

Owns one engine's life inside its caller's event loop; must not know scheduling or tensors. Speaks to the actors
through `Launcher` (life) and `AsyncClient` (requests).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Any, Self

from ..frontend.client import AsyncClient
from ..frontend.client_requests import Prompt
from ..frontend.outputs import RequestOutput
from ..protocol.config import EngineConfig
from ..protocol.errors import EngineDead, EngineError
from ..protocol.messages import EngineInfo, Stats
from ..protocol.sampling import SamplingParams
from .crew import Event
from .embedding import describe
from .launcher import Launcher
from .supervisor import print_line


class AsyncEngine:
    """An engine of this program's own: `async with AsyncEngine("org/model") as engine: ...`.

    Args:
        model: None (the default model), a folder, GGUF file or hub name, "class:NAME" of a registered class, or a
            live `torch.nn.Module` (its executor then runs on a thread of this process).
        tokenizer: None (the model's own), a folder or hub name, or a live tokenizer.
        config: settings to start from; by default no HTTP port is opened.
        on_event: is given each `Progress` and `Ready` while the engine starts, on another thread.
        on_line: is given each (actor, line) that an actor's process writes, on another thread.
        options: the fields of `EngineConfig` by name.

    Raises: `InvalidRequest` for a setting out of its range.
    """

    def __init__(
        self,
        model: object = None,
        tokenizer: object = None,
        *,
        config: EngineConfig | Mapping[str, Any] | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_line: Callable[[str, str], None] = print_line,
        **options: Any,
    ) -> None:
        described = describe(model, tokenizer, config, options)
        self.config = described.config
        self._caller_side = described.caller_side
        self._on_event = on_event
        self._launcher = Launcher(
            described.config, model=described.module, save_tokenizer=described.save_tokenizer, on_line=on_line
        )
        self._client: AsyncClient | None = None
        # Whoever forgets to stop it: no later than when the program ends.
        self._finalizer = weakref.finalize(self, self._launcher.stop)

    async def start(self) -> None:
        """Start the processes and wait until they are ready. Raises `EngineError` with the reason if they don't."""
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(None, self._launcher.start, self._on_event)
        try:
            supervisor = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._launcher.request_stop()
            await asyncio.wait([starting])
            starting.exception()  # that it was stopped is no news
            raise
        self.config = self._launcher.config
        client = AsyncClient(supervisor.endpoints.client)
        self._client = client

        def ended(failure: EngineError | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(client.fail_all, failure or EngineDead("the engine was stopped"))

        supervisor.on_end(ended)
        try:
            await client.connect()
        except BaseException:
            await self.stop()
            raise

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop the engine; requests under way end after `drain_seconds`. Nothing of it is left on return."""
        client, self._client = self._client, None
        if drain_seconds == 0.0 and client is not None:
            await client.close()
        await asyncio.to_thread(self._launcher.stop, drain_seconds)
        if drain_seconds > 0.0 and client is not None:
            await client.close()
        self._finalizer.detach()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        on_accepted: Callable[[], None] | None = None,
        *,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt: a string, token ids, or {"prompt_token_ids": [...]} or {"prompt": "..."}.

        Args:
            params: how to sample; `params.output_kind` says what each output carries.
            request_id: a name for `abort` and the logs; None: one is made up.
            priority: under the "priority" policy the higher goes first.
            on_accepted: called once the engine has queued the request.
            client: who asks; under the "fair" policy each client gets its share. "": this program.
            deadline_ms: under the "deadline" policy, within how long the first token is wanted.

        Yields outputs, the last of them `finished`. Leaving the iteration early aborts the request.

        Raises: `EngineError` where the engine refuses or fails the request.
        """
        asked = params or SamplingParams()
        side = self._caller_side
        outputs = self._live().generate(
            prompt if side is None else side.prompt(prompt),
            asked if side is None else side.params(asked),
            request_id,
            priority,
            on_accepted=on_accepted,
            client=client,
            deadline_ms=deadline_ms,
        )
        reader = None if side is None else side.reader(asked)
        async for output in outputs:
            yield output if reader is None else reader.read(output)

    async def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        *,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `generate`, for a conversation (`[{"role": ..., "content": ...}, ...]`) and the model's chat template."""
        side = self._caller_side
        if side is None:
            outputs = self._live().chat(
                messages, params or SamplingParams(), request_id, priority, client=client, deadline_ms=deadline_ms
            )
        else:
            outputs = self.generate(
                side.chat(messages), params, request_id, priority, client=client, deadline_ms=deadline_ms
            )
        async for output in outputs:
            yield output

    async def abort(self, request_id: str) -> None:
        """End the requests of that name; their iterations get a last output with finish reason `abort`."""
        await self._live().abort(request_id)

    async def get_stats(self) -> Stats:
        """The scheduler's figures of this moment."""
        return await self._live().get_stats()

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be: context length, KV blocks, device."""
        return self._live().info

    @property
    def endpoint(self) -> str:
        """Where other processes of this user reach the engine with `Client` or `AsyncClient`."""
        return self._launcher.supervisor.endpoints.client

    @property
    def url(self) -> str | None:
        """Of the HTTP server, if a port was asked for."""
        return self._launcher.supervisor.url

    @property
    def errored(self) -> bool:
        """Whether the engine has failed."""
        return self._launcher.failure is not None

    @property
    def dead_error(self) -> EngineError | None:
        """Why the engine has failed."""
        return self._launcher.failure

    def _live(self) -> AsyncClient:
        if self._launcher.failure is not None:
            raise self._launcher.failure
        if self._client is None:
            raise EngineDead("the engine is not running: use `async with`, or await start()")
        return self._client
