"""A core, a fake executor and books of what was delivered: what every test of the core is driven by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import Deliver, EngineInfo, ExecutorReady, Message, Step, StreamEnd, Submit
from fast_inference.protocol.sampling import SamplingParams
from fast_inference.scheduler.core import Effect, Log, SchedulerCore, Send
from fast_inference.scheduler.swap import Rates

from .fake_executor import FakeExecutor, make_info


class Harness:
    """`submit`, `step` (one result, then new steps) and `drain`; every effect is booked and checked as it comes."""

    def __init__(
        self,
        info: EngineInfo | None = None,
        *,
        ready: bool = True,
        cost: Callable[[Step], float] | None = None,
        rates: Rates | None = None,
        **config: object,
    ) -> None:
        self._cost = cost  # seconds of a step, which then is all that time passes by
        self.info = info or make_info()
        self.config = EngineConfig(model="fake", **config)  # type: ignore[arg-type]
        self.core = SchedulerCore(self.config, rates)
        self.device = FakeExecutor(self.info, self.config.max_num_batched_tokens or self.info.max_num_batched_tokens)
        self.now = 100.0
        self.queue: deque[Step] = deque()
        self.steps: list[Step] = []
        self._tables: dict[int, list[int]] = {}  # slot -> blocks, as of the last step sent
        self._named: dict[int, set[int]] = {}  # step -> blocks of its rows
        self.keys: dict[int, int] = {}  # number -> key
        self.tokens: dict[int, list[int]] = {}  # by key
        self.ends: dict[int, StreamEnd] = {}
        self.sent: list[Send] = []
        self.logs: list[Log] = []
        if ready:
            self.handle(ExecutorReady(info=self.info), "executor")

    def replace_device(self, info: EngineInfo) -> None:
        """The executor died with all it was told, and a new one is ready."""
        self.info, self.device = (
            info,
            FakeExecutor(info, self.config.max_num_batched_tokens or info.max_num_batched_tokens),
        )
        self.queue.clear()
        self._tables.clear()
        self.handle(ExecutorReady(info=info), "executor")

    def handle(self, message: Message, sender: str = "frontend-0") -> list[Effect]:
        effects = self.core.handle(message, self.now, sender)
        self.book(effects)
        return effects

    def book(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Log):
                self.logs.append(effect)
            elif isinstance(effect.message, Deliver):
                self._book_delivery(effect.message)
            else:
                self.sent.append(effect)

    def submit(
        self, key: int, prompt: list[int], *, seed: int | None = None, eos: tuple[int, ...] = (), **fields: object
    ) -> None:
        """Submit a prompt; what is no field of `Submit` goes into its `SamplingParams`."""
        names = ("priority", "cache_salt", "client", "deadline_ms")
        own = {name: fields.pop(name) for name in names if name in fields}
        self.handle(
            Submit(
                key=key,
                request_id=f"r{key}",
                prompt_token_ids=np.array(prompt, np.int32),
                params=SamplingParams(**fields),  # type: ignore[arg-type]
                seed=key if seed is None else seed,
                eos_token_ids=eos,
                **own,  # type: ignore[arg-type]
            )
        )

    def schedule(self) -> None:
        """Send as many steps as may be in flight."""
        while (step := self.core.schedule(self.now)) is not None:
            self._check_reuse(step)
            self.queue.append(step)
            self.steps.append(step)
            self.core.check()

    def answer(self, failing: Collection[int] = ()) -> None:
        """The device finishes the oldest step; the work of slots in `failing` fails."""
        step = self.queue.popleft()
        seconds = 0.0 if self._cost is None else self._cost(step)
        self.now += seconds
        self.handle(replace(self.device.run(step, failing), seconds=seconds), "executor")
        self.core.check()

    def step(self) -> bool:
        """New steps, then one result; False when there was nothing to do."""
        pause = 0.01 if self._cost is None else 0.0
        self.now += pause
        self.schedule()
        if not self.queue:
            return False
        self.now += pause
        self.answer()
        return True

    def drain(self, limit: int = 5000) -> None:
        """Run until nothing is left to do."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"not idle after {limit} steps")

    def _check_reuse(self, step: Step) -> None:
        """No block may be given out anew while a step that names it for somebody else is in flight."""
        for slot in step.retire.tolist():
            del self._tables[slot]
        fresh: list[int] = step.grow_blocks.tolist() + step.swap_in_to.tolist()
        for admit in step.admit:
            self._tables[admit.slot] = admit.block_ids.tolist()
            fresh += admit.block_ids.tolist()[-(-admit.cached_len // self.info.block_size) :]
        for slot, block in zip(step.grow_slots.tolist(), step.grow_blocks.tolist(), strict=True):
            self._tables[slot].append(block)
        for flying in self.queue:
            assert not self._named[flying.number].intersection(fresh), "a block is reused too early"
        self._named[step.number] = {block for slot in step.work_slots.tolist() for block in self._tables[slot]}

    def _book_delivery(self, message: Deliver) -> None:
        for opened in message.opened:
            assert opened.number not in self.keys, "opened twice"
            assert opened.key not in self.tokens, "a key opened twice"
            self.keys[opened.number] = opened.key
            self.tokens[opened.key] = []
        for number, token in zip(message.numbers.tolist(), message.tokens.tolist(), strict=True):
            key = self.keys[number]
            assert key not in self.ends, "a token after the end"
            self.tokens[key].append(token)
        for end in message.ended:
            key = self.keys[end.key]
            assert key not in self.ends, "ended twice"
            assert end.completion_tokens == len(self.tokens[key]), "tokens lost or doubled"
            self.ends[key] = end
