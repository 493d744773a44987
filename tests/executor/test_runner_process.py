"""The executor's shell with a tiny model: real sockets, the loop on a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fast_inference.executor.models as models
import numpy as np
import pytest
from fast_inference.executor import process, startup
from fast_inference.protocol.actor import Control
from fast_inference.protocol.channel import Wire, ZmqSocket
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.endpoints import Endpoints
from fast_inference.protocol.messages import Admit, ExecutorReady, Message, Progress, Ready, Shutdown, Step, StepResult

from .tiny_model import GREEDY, VOCAB, TinyModel

SECONDS = 30.0


class Engine:
    """Scheduler's and supervisor's ends of the links of an executor that runs on a thread."""

    def __init__(self, folder: Path) -> None:
        self.wire = Wire()
        endpoints = Endpoints(str(folder))
        self.control = self.wire.bind_router(endpoints.control, hwm=100)
        self.results = self.wire.bind_pull(endpoints.results, hwm=100)
        self.config = EngineConfig(
            model="tiny", device="cpu", num_blocks=64, block_size=4, max_num_seqs=4, attention_backend="torch"
        )
        self.thread = threading.Thread(target=self._run, args=(endpoints,))
        self.thread.start()
        self.steps = self.wire.push(endpoints.steps, hwm=100)

    def _run(self, endpoints: Endpoints) -> None:
        wire = Wire()
        try:
            process.run(self.config, endpoints, wire, Control(wire, endpoints, "executor"))
        finally:
            wire.close()

    def await_message(self, socket: ZmqSocket, kind: type[Message]) -> Message:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            self.wire.wait([socket], 0.1)
            while (received := socket.receive()) is not None:
                if isinstance(received[1], kind):
                    return received[1]
        raise AssertionError(f"no {kind.__name__} within {SECONDS} s")

    def close(self) -> None:
        self.control.send(Shutdown(), "executor")
        self.thread.join(SECONDS)
        self.wire.close()
        assert not self.thread.is_alive()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(models, "load_model", lambda *_: TinyModel())
    engine = Engine(tmp_path)
    yield engine
    engine.close()


def test_an_executor_says_what_it_is_answers_steps_in_order_and_stops_when_told(engine: Engine) -> None:
    ready = engine.await_message(engine.results, ExecutorReady)
    assert isinstance(ready, ExecutorReady)
    assert ready.info.num_blocks == 64 and ready.info.vocab_size == VOCAB and ready.info.dtype == "float32"
    assert ready.info.max_model_len == 256
    facts = engine.await_message(engine.control, Ready)
    assert isinstance(facts, Ready) and facts.facts["backend"] == "torch" and "load_seconds" in facts.facts

    prompt = np.array([5, 6, 7], np.int32)
    admit = Admit(
        slot=1, token_ids=prompt, num_prompt=3, params=GREEDY, seed=0, block_ids=np.array([9], np.int32), cached_len=0
    )
    slot, one = np.array([1], np.int32), np.array([1], np.int32)
    engine.steps.send(Step(number=1, admit=(admit,), work_slots=slot, work_counts=np.array([3], np.int32)))
    engine.steps.send(Step(number=2, work_slots=slot, work_counts=one))
    tokens = []
    for number in (1, 2):
        result = engine.await_message(engine.results, StepResult)
        assert isinstance(result, StepResult) and result.number == number
        tokens += result.tokens.tolist()
    assert tokens == TinyModel().generate([5, 6, 7], 2)


def test_an_idle_executor_records_its_steps_and_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_: TinyModel())
    monkeypatch.setattr(startup, "wants_graphs", lambda *_: True)
    engine = Engine(tmp_path)
    try:
        ready = engine.await_message(engine.control, Ready)
        assert isinstance(ready, Ready) and ready.facts["graphs"] == 23  # 3 sizes, 3 ways to choose; prompts 7 and 2
        done: list[int] = []
        while done[-1:] != [23]:
            told = engine.await_message(engine.control, Progress)
            assert isinstance(told, Progress)
            if told.phase == "recording steps":
                done.append(told.done)
                assert told.total == 23
        assert done == list(range(1, 24))
    finally:
        engine.close()


def test_a_frame_that_is_no_message_does_not_stop_the_executor(engine: Engine) -> None:
    engine.await_message(engine.results, ExecutorReady)
    engine.steps.raw.send(b"\xc1 nonsense")
    engine.steps.send(Shutdown())
    engine.steps.send(Step(number=7))
    result = engine.await_message(engine.results, StepResult)
    assert isinstance(result, StepResult) and result.number == 7
