"""The whole engine on one thread: the scheduler's core and the executor's runner joined by a loop, no sockets.

Owns the loop, which keeps the order of the real links; must not know models. Every message passes through the codec,
as on the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fast_inference.executor.startup import start
from fast_inference.protocol.codec import decode, encode
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import Deliver, EngineInfo, ExecutorReady, GetStats, Message, Stats, Step, Submit
from fast_inference.protocol.sampling import SamplingParams
from fast_inference.scheduler.core import EXECUTOR, SchedulerCore, Send
from fast_inference.scheduler.swap import Rates

FRONTEND = "frontend-0"


class OneThreadEngine:
    """An engine for token ids, in float32. `options`: fields of `EngineConfig`; `rates`: instead of those that it would
    measure."""

    def __init__(self, model: str, *, rates: Rates | None = None, **options: Any) -> None:
        config = EngineConfig(model=model, skip_tokenizer_init=True, dtype="float32", threads=1, **options)
        with torch.inference_mode():
            self._runner = start(config, lambda phase, done, total: None)
        self._core = SchedulerCore(config, rates)
        self._clock = 0.0
        self._key = 0
        self._tokens: dict[int, list[int]] = {}
        self._reasons: dict[int, str] = {}
        self._stats = Stats()
        self._tell(ExecutorReady(info=self._runner.info), EXECUTOR)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], together: bool = True
    ) -> list[list[int]]:
        """The tokens for each prompt; all prompts at once, or one after the other."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self._tokens, self._reasons = {}, {}
        first = self._key + 1
        for prompt, own in zip(prompts, each, strict=True):
            self._submit(prompt, own)
            if not together:
                self._run()
        self._run()
        wrong = {number: reason for number, reason in self._reasons.items() if reason != "length"}
        assert not wrong, f"requests that did not end by length: {wrong}"
        return [self._tokens[number] for number in range(first, first + len(prompts))]

    def record_steps(self) -> int:
        """Make all recordings, as an idle executor does; how many there are."""
        graphs = self._runner.runner.graphs
        assert graphs is not None, "steps are not recorded here"
        with torch.inference_mode():
            while graphs.recordings.missing:
                graphs.recordings.go_on()
        return graphs.recordings.total

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be."""
        return self._runner.info

    def stats(self) -> Stats:
        self._tell(GetStats(token=1), FRONTEND)
        return self._stats

    def _submit(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self._key += 1
        seed = 0 if params.seed is None else params.seed
        ids = np.array(prompt, np.int32)
        submit = Submit(key=self._key, request_id=str(self._key), prompt_token_ids=ids, params=params, seed=seed)
        self._tell(submit, FRONTEND)

    def _run(self) -> None:
        """Until nothing is left: the scheduler runs ahead as far as it may, the executor answers in order."""
        link: deque[Step] = deque()
        while True:
            self._clock += 0.001
            step = self._core.schedule(self._clock)
            if step is not None:
                link.append(self._over_the_wire(step))
                continue
            if not link:
                break
            with torch.inference_mode():
                result = self._runner.runner.launch(link.popleft()).finish()
            self._tell(result, EXECUTOR)
            self._core.check()
        assert self._core.idle, "the scheduler has requests left and nothing to compute"

    def _tell(self, message: Message, sender: str) -> None:
        for effect in self._core.handle(self._over_the_wire(message), self._clock, sender):
            assert isinstance(effect, Send), effect  # nothing here is worth a line in the log
            received = self._over_the_wire(effect.message)
            if isinstance(received, Deliver):
                self._take(received)
            elif isinstance(received, Stats):
                self._stats = received

    def _take(self, deliver: Deliver) -> None:
        for opened in deliver.opened:
            self._tokens[opened.number] = []
        for number, token in zip(deliver.numbers.tolist(), deliver.tokens.tolist(), strict=True):
            self._tokens[number].append(token)
        for end in deliver.ended:
            self._reasons[end.key] = end.reason

    @staticmethod
    def _over_the_wire(message: Any) -> Any:
        return decode(encode(message))
