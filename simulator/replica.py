"""One engine of the simulation: the scheduler's own core, and a device that is nothing but arithmetic.

The core is the one that serves, driven with the messages that it knows: `ExecutorReady`, `Submit`, `StepResult` in;
`Step` and `Deliver` out. The device keeps the order of a real one: steps run one after the other, up to `run_ahead`
of them are under way, each as long as the calibration says. It ends an answer with the end-of-sequence token at the
length that the workload has for it; the scheduler knows of that length no more than of a real answer's. Owns the
virtual device; must not know traces, routing or figures.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..protocol.config import EngineConfig
from ..protocol.messages import Deliver, EngineInfo, ExecutorReady, Step, StepResult, Submit
from ..protocol.sampling import SamplingParams
from ..scheduler.core import Effect, SchedulerCore, Send
from .costs import Calibration
from .workload import Workload

EOS, WORD, VOCABULARY = 1, 7, 32
DONE = float("inf")


@dataclass(slots=True)
class Running:
    """A step under way: its number, the slots that sample, the tokens they get."""

    number: int
    slots: NDArray[np.int32]
    tokens: NDArray[np.int32]
    seconds: float
    copy_seconds: float
    ends: float  # when it is done


class Replica:
    """See the head of this file. `next_end`: when its oldest step under way is done, infinite without one."""

    def __init__(
        self, config: EngineConfig, calibration: Calibration, workload: Workload, max_tokens: int | None
    ) -> None:
        self.core = SchedulerCore(config)
        self.calibration = calibration
        self.next_end = DONE
        self.busy_seconds = 0.0
        self.submitted = 0  # the core numbers requests from 1 in the order in which they come
        self._workload = workload
        self._max_tokens = max_tokens
        self._params: dict[int, SamplingParams] = {}
        self._running: deque[Running] = deque()
        self._free_at = 0.0
        self._known = np.zeros(config.max_num_seqs, np.int64)  # tokens of each slot, the sampled ones included
        self._ends_at = np.zeros(config.max_num_seqs, np.int64)  # of them, when the answer ends
        self._outputs = workload.output.tolist()
        self._prompts = workload.prompt.tolist()
        self._clients = workload.client.tolist()
        limited = np.isfinite(workload.deadline)
        self._deadlines = np.where(limited, workload.deadline, 0.0).tolist()
        # what is in a prompt is all the same here; `cache_salt` keeps two prompts from being one prefix
        self._words = np.full(int(workload.prompt.max()), WORD, np.int32)
        self._words.flags.writeable = False
        info = EngineInfo(
            model=calibration.name,
            max_model_len=config.max_model_len or calibration.max_model_len,
            vocab_size=VOCABULARY,
            num_blocks=config.num_blocks or calibration.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            dtype="none",
            device="simulated",
            num_host_blocks=int(config.kv_offloading_size * 2**30) // calibration.block_bytes,
            block_bytes=calibration.block_bytes,
        )
        self._longest = info.max_model_len
        self.core.handle(ExecutorReady(info=info), 0.0, "executor")

    @property
    def unfinished(self) -> int:
        """Requests that it has and that have not ended."""
        core = self.core
        return core.waiting + (0 if core.batch is None else core.batch.num_running)

    def submit(self, index: int, now: float) -> list[Effect]:
        """Request `index` of the workload comes at `now`. Returns what the core has to say."""
        prompt, deadline, client = self._prompts[index], self._deadlines[index], self._clients[index]
        self.submitted += 1
        message = Submit(
            key=index,
            request_id="",
            prompt_token_ids=self._words[:prompt],
            params=self._params_for(index, prompt),
            seed=index,
            eos_token_ids=(EOS,),
            priority=client,
            client=str(client),
            deadline_ms=max(round(deadline * 1e3), 1) if deadline else None,
            cache_salt=str(index),
        )
        effects = self.core.handle(message, now, "simulator")
        self._send_steps(now)
        return effects

    def advance(self) -> list[Effect]:
        """The oldest step under way is done. Returns what the core makes of its result."""
        done = self._running.popleft()
        now = done.ends
        result = StepResult(
            number=done.number,
            slots=done.slots,
            tokens=done.tokens,
            seconds=done.seconds,
            copy_seconds=done.copy_seconds,
        )
        effects = self.core.handle(result, now, "executor")
        self.next_end = self._running[0].ends if self._running else DONE
        self._send_steps(now)
        return effects

    def _send_steps(self, now: float) -> None:
        while (step := self.core.schedule(now)) is not None:
            self._start(step, now)

    def _start(self, step: Step, now: float) -> None:
        """Put a step behind those under way."""
        batch = self.core.batch
        if batch is None:
            return
        record = batch.in_flight[-1]
        for admit in step.admit:
            self._known[admit.slot] = len(admit.token_ids)
            self._ends_at[admit.slot] = admit.num_prompt + self._outputs[admit.seed]
        slots = record.sampled.astype(np.int32)
        known = self._known[slots] + 1
        self._known[slots] = known
        tokens = np.where(known == self._ends_at[slots], np.int32(EOS), np.int32(WORD))
        calibration = self.calibration
        seconds = calibration.seconds(record.prefill_tokens, record.rows, record.context)
        copying = calibration.per_copy * record.swapped_blocks
        self._free_at = max(now, self._free_at) + calibration.gap + copying + seconds
        self.busy_seconds += copying + seconds
        self._running.append(Running(step.number, slots, tokens, seconds, copying, self._free_at))
        if len(self._running) == 1:
            self.next_end = self._free_at

    def _params_for(self, index: int, prompt: int) -> SamplingParams:
        wanted = self._outputs[index] if self._max_tokens is None else self._max_tokens
        allowed = max(min(wanted, self._longest - prompt), 1)
        params = self._params.get(allowed)
        if params is None:
            params = self._params[allowed] = SamplingParams(max_tokens=allowed, temperature=0.0)
        return params


def delivered(effects: list[Effect]) -> list[Deliver]:
    """The messages for the detokenizer among what the core asked for."""
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Deliver)]
