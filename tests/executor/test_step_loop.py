"""In what order the executor's loop launches, awaits and records: links and runner are doubles, nothing is computed."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from fast_inference.executor.process import RECORD_EVERY, StepLoop
from fast_inference.protocol.messages import Message, Shutdown, Step, StepResult


class Work:
    """A step on a device that is never found to be done, only waited for."""

    def __init__(self, number: int, events: list[str], done: bool) -> None:
        self._number, self._events, self._done = number, events, done

    def done(self) -> bool:
        return self._done

    def finish(self, steps_to_record: int) -> StepResult:
        self._events.append(f"finish {self._number}")
        none = np.empty(0, np.int32)
        return StepResult(number=self._number, slots=none, tokens=none, steps_to_record=steps_to_record)


class Recordings:
    """`missing` recordings to be made."""

    def __init__(self, missing: int, events: list[str]) -> None:
        self.missing = self.total = missing
        self.wanted = False
        self._events = events

    def record_next(self) -> None:
        self.missing -= 1
        self.wanted = False
        self._events.append("record")


class World:
    """Everything that the loop talks to. `steps`: how many are there to be taken, at once; it ends when all are
    answered and the loop has nothing left to do but to wait."""

    def __init__(self, steps: int, depth: int, done: bool = False, missing: int = 0) -> None:
        self.events: list[str] = []
        self.recordings = Recordings(missing, self.events)
        self.graphs = self if missing else None
        self.socket = self
        self.results: list[Message] = []
        self.progress_told: list[tuple[str, int, int]] = []
        self._steps = deque(Step(number=number) for number in range(1, steps + 1))
        self._done = done
        self._over = False
        self.loop = StepLoop(self, self, self, self, self, depth)  # type: ignore[arg-type]

    def launch(self, step: Step) -> Work:
        self.events.append(f"launch {step.number}")
        return Work(step.number, self.events, self._done)

    def receive(self) -> tuple[str, Step] | None:
        return ("scheduler", self._steps.popleft()) if self._steps else None

    def send(self, message: Message) -> bool:
        self.results.append(message)
        return True

    def turn(self) -> Shutdown | None:
        return Shutdown() if self._over else None

    def progress(self, phase: str, done: int, total: int) -> None:
        self.progress_told.append((phase, done, total))

    def wait(self, sockets: object, seconds: float) -> None:
        self.events.append("wait")
        self._over = True

    def run(self) -> list[str]:
        self.loop.run()
        return self.events


def test_with_room_for_two_the_next_step_is_launched_before_the_last_is_awaited() -> None:
    order = ["launch 1", "launch 2", "finish 1", "launch 3", "finish 2", "finish 3", "wait"]
    assert World(3, depth=2).run() == order  # the last is waited for although it is never found to be done


def test_a_step_that_a_result_asks_for_is_launched_behind_the_one_under_way_however_long_steps_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the scheduler does it: two steps at first, another soon after each result. A step takes 5 ms."""
    world = World(6, depth=2)
    now, receive, send = [0.0], world.receive, world.send
    arrivals = deque([0.0, 0.0])

    def timed_receive() -> tuple[str, Step] | None:
        now[0] += 0.0001
        return receive() if arrivals and arrivals[0] <= now[0] and arrivals.popleft() is not None else None

    def answering_send(message: Message) -> bool:
        now[0] += 0.005
        arrivals.append(now[0] + 0.0005)
        return send(message)

    monkeypatch.setattr("fast_inference.executor.process.time.monotonic", lambda: now[0])
    world.receive, world.send = timed_receive, answering_send  # type: ignore[method-assign]
    events = world.run()
    for number in range(2, 6):
        assert events.index(f"launch {number + 1}") < events.index(f"finish {number}")


def test_one_at_a_time_is_awaited_before_the_next_is_taken() -> None:
    assert World(2, depth=1).run() == ["launch 1", "finish 1", "launch 2", "finish 2", "wait"]


@pytest.mark.parametrize("done", [True, False])
def test_an_idle_executor_makes_all_recordings_and_then_sleeps(done: bool) -> None:
    world = World(1, depth=2, done=done, missing=3)
    assert world.run() == ["launch 1", "finish 1", "record", "record", "record", "wait"]
    assert world.progress_told == [("recording steps", n, 3) for n in (1, 2, 3)]


def test_under_load_one_recording_in_some_steps_is_made_and_only_a_wanted_one() -> None:
    world = World(3 * RECORD_EVERY, depth=2, missing=9)
    launch = world.launch

    def wanting(step: Step) -> Work:
        world.recordings.wanted = step.number > RECORD_EVERY
        return launch(step)

    world.launch = wanting  # type: ignore[method-assign]
    events = world.run()
    busy = events[: events.index(f"launch {3 * RECORD_EVERY}")]
    assert "record" not in busy[: busy.index(f"launch {RECORD_EVERY + 1}")]
    assert 1 <= busy.count("record") <= 2
    assert events.count("record") == 9
