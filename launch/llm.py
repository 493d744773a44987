"""`LLM`: an engine under a plain script. Starts the processes, runs prompts with a progress bar, returns results.

Owns one engine's life without an event loop of the caller's; must not know scheduling or tensors. Speaks to the
actors through `Launcher` (life) and `Client` (requests).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from ..frontend.blocking_client import Client, Messages, as_list, per_prompt
from ..frontend.client_requests import Prompt
from ..frontend.outputs import RequestOutput
from ..protocol.config import EngineConfig
from ..protocol.errors import EngineDead, EngineError
from ..protocol.messages import EngineInfo, Stats
from ..protocol.sampling import SamplingParams
from .display import StartDisplay
from .embedding import describe
from .launcher import Launcher


class LLM:
    """An engine of this script's own: `LLM("org/model").generate(["Hello"], SamplingParams(max_tokens=8))`.

    It may be used from any thread, also under a running event loop (a notebook), which it then blocks.

    Args:
        model: None (the default model), a folder, GGUF file or hub name, "class:NAME" of a registered class, or a
            live `torch.nn.Module`.
        tokenizer: None (the model's own), a folder or hub name, or a live tokenizer.
        config: settings to start from.
        options: the fields of `EngineConfig` by name.

    Raises: `InvalidRequest` for a setting out of its range, `StartupError` if the engine can't start.
    """

    def __init__(
        self,
        model: object = None,
        tokenizer: object = None,
        *,
        config: EngineConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        described = describe(model, tokenizer, config, options)
        self._caller_side = described.caller_side
        with StartDisplay() as display:
            self._launcher = Launcher(
                described.config,
                model=described.module,
                save_tokenizer=described.save_tokenizer,
                on_line=display.line,
            )
            # Whoever forgets to shut it down: no later than when the program ends.
            weakref.finalize(self, self._launcher.stop)
            supervisor = self._launcher.start(display.event)
        self.config = self._launcher.config
        self._client = client = Client(supervisor.endpoints.client)
        self._finalizer = weakref.finalize(self, _close, client, self._launcher)
        self._finalizer.atexit = False  # no thread pool works then, as closing a client needs

        def ended(failure: EngineError | None) -> None:
            client.fail_all(failure or EngineDead("the engine was shut down"))

        supervisor.on_end(ended)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        client: str | list[str] = "",
        deadline_ms: int | Sequence[int] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many.

        Args:
            prompts: a string, a list of token ids, {"prompt_token_ids": [...]}, or a list of these.
            sampling_params: one for all, or one per prompt; None: the defaults of `SamplingParams`.
            priority: one for all, or one per prompt; under the "priority" policy the higher goes first.
            client: who asks, one for all or one per prompt; under the "fair" policy each client gets its share.
            deadline_ms: under the "deadline" policy, within how long the first token is wanted; one for all, or one
                per prompt.
            use_tqdm: show a progress bar with rates.

        Returns: the results in the prompts' order.

        Raises: the `EngineError` of the first request that fails.
        """
        side = self._caller_side
        if side is None:
            return self._client.generate(
                prompts, sampling_params, priority=priority, client=client, deadline_ms=deadline_ms, use_tqdm=use_tqdm
            )
        many = [side.prompt(prompt) for prompt in as_list(prompts)]
        asked = per_prompt("sampling_params", sampling_params, len(many))
        outputs = self._client.generate(
            many,
            [side.params(params) for params in asked],
            priority=priority,
            client=client,
            deadline_ms=deadline_ms,
            use_tqdm=use_tqdm,
        )
        return [side.reader(params).read(output) for params, output in zip(asked, outputs, strict=True)]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        client: str | list[str] = "",
        deadline_ms: int | Sequence[int] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation (`[{"role": ..., "content": ...}, ...]`) or many, and the model's chat
        template."""
        side = self._caller_side
        if side is None:
            return self._client.chat(
                messages, sampling_params, priority=priority, client=client, deadline_ms=deadline_ms, use_tqdm=use_tqdm
            )
        many = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [side.chat(conversation) for conversation in many]  # type: ignore[arg-type]
        return self.generate(
            prompts, sampling_params, priority=priority, client=client, deadline_ms=deadline_ms, use_tqdm=use_tqdm
        )

    def get_stats(self) -> Stats:
        """The scheduler's figures of this moment."""
        return self._client.get_stats()

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be: context length, KV blocks, device."""
        return self._client.info

    @property
    def endpoint(self) -> str:
        """Where other processes of this user reach the engine with `Client` or `AsyncClient`."""
        return self._launcher.supervisor.endpoints.client

    def shutdown(self) -> None:
        """Stop the engine; nothing of it is left on return. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _close(client: Client, launcher: Launcher) -> None:
    client.close()
    launcher.stop()
