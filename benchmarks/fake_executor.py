"""An executor that computes nothing and answers at once: what is left of a step is the cost of the actors.

Speaks the real protocol from a process of its own (`python benchmarks/fake_executor.py RUN_DIR LEDGER`). Owns `Ledger`,
a file that both sides map: when each token left, and how long a step takes. Must not import torch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from fast_inference.launch.child import die_with_parent
from fast_inference.launch.rundir import read_card
from fast_inference.protocol.actor import Control
from fast_inference.protocol.channel import Wire
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.endpoints import Endpoints
from fast_inference.protocol.messages import EngineInfo, ExecutorReady, Step, StepResult

VOCAB_SIZE = 49_152
BLOCK_SIZE = 16
LINK_HWM = 64
LEDGER_ENTRIES = 1 << 20


class Ledger:
    """int64 in a shared file: [0] steps that sampled something, [1] nanoseconds that a step takes, then the
    `time.monotonic_ns()` at which each of those steps' result was sent (the latest `LEDGER_ENTRIES`)."""

    def __init__(self, path: Path, create: bool = False) -> None:
        self._data = np.memmap(path, np.int64, "w+" if create else "r+", shape=(2 + LEDGER_ENTRIES,))

    @property
    def steps(self) -> int:
        return int(self._data[0])

    @property
    def step_ns(self) -> int:
        return int(self._data[1])

    @step_ns.setter
    def step_ns(self, value: int) -> None:
        self._data[1] = value

    def sent(self) -> None:
        """Note that a result leaves now."""
        steps = int(self._data[0])
        self._data[2 + steps % LEDGER_ENTRIES] = time.monotonic_ns()
        self._data[0] = steps + 1

    def times(self, first: int, count: int) -> np.ndarray:
        """When the steps `first` to `first + count - 1` were answered [count] int64, nanoseconds."""
        return np.array(self._data[2 + (first + np.arange(count)) % LEDGER_ENTRIES])


class FakeBatch:
    """What a persistent batch must know to answer a step: how far each slot has come."""

    def __init__(self, slots: int, tokens: np.ndarray) -> None:
        self._known = np.zeros(slots, np.int64)
        self._computed = np.zeros(slots, np.int64)
        self._tokens = tokens

    def answer(self, step: Step) -> StepResult:
        """The result of `step`: a token for each row that reached its last known one."""
        for admit in step.admit:
            self._known[admit.slot] = admit.token_ids.size
            self._computed[admit.slot] = admit.cached_len
        self._computed[step.work_slots] += step.work_counts
        done = self._computed[step.work_slots] >= self._known[step.work_slots]
        slots = step.work_slots[done]
        tokens = self._tokens[(slots * 7919 + self._known[slots]) % self._tokens.size]
        self._known[slots] += 1
        return StepResult(number=step.number, slots=slots, tokens=tokens, seconds=1e-6)


def engine_info(config: EngineConfig) -> EngineInfo:
    return EngineInfo(
        model=config.model_name,
        max_model_len=config.max_model_len or 8192,
        vocab_size=VOCAB_SIZE,
        num_blocks=config.num_blocks or 65_536,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        dtype="none",
        device="none",
    )


def spoken_tokens(config: EngineConfig) -> np.ndarray:
    """Token ids of ordinary text, so that the detokenizer has ordinary work."""
    file = Path(config.model) / "tokenizer.json"
    if not file.is_file():
        return np.arange(1000, 2000, dtype=np.int32)
    from tokenizers import Tokenizer

    text = (
        Path(__file__).read_text() + "Dépêche-toi! 東京は日本の首都です。 It was a bright cold day in April. 🙂\n" * 20
    )
    return np.array(Tokenizer.from_file(str(file)).encode(text).ids, np.int32)


def main(run_dir: str, ledger_file: str) -> None:
    die_with_parent(read_card(Path(run_dir)).pid)
    endpoints = Endpoints(run_dir)
    config = EngineConfig.from_json(endpoints.config_file.read_text())
    wire = Wire()
    control = Control(wire, endpoints, "executor")
    steps = wire.bind_pull(endpoints.steps, hwm=LINK_HWM)
    results = wire.push(endpoints.results, hwm=LINK_HWM)
    ledger = Ledger(Path(ledger_file))
    batch = FakeBatch(config.max_num_seqs, spoken_tokens(config))
    results.send(ExecutorReady(info=engine_info(config)))
    control.ready()
    watched = (steps, control.socket)
    while control.turn() is None:
        received = steps.receive()
        if received is None:
            wire.wait(watched, 0.5)
            continue
        message = received[1]
        if not isinstance(message, Step):
            raise TypeError(f"the steps link carried {message!r}")
        result = batch.answer(message)
        if ledger.step_ns:
            time.sleep(ledger.step_ns / 1e9)
        if result.slots.size:
            ledger.sent()
        if not results.send(result):
            raise RuntimeError("the results link is full")
    wire.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
