"""In what order the executor's loop launches, awaits and records: links and runner are doubles, nothing is computed."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from fast_inference.executor.backends.base import Piece
from fast_inference.executor.process import AWAKE_SECONDS, StepLoop
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

    def go_on(self) -> Piece:
        self.missing -= 1
        self.wanted = False
        self._events.append("record")
        return Piece("recording steps", self.total - self.missing, self.total)


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


@pytest.mark.parametrize(("depth", "awake"), [(2, AWAKE_SECONDS), (1, 0.0)], ids=("device", "CPU"))
def test_the_executor_of_a_device_looks_for_more_work_for_a_while_before_it_sleeps(
    depth: int, awake: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, now, answered, slept = World(1, depth), [0.0], [0.0], [0.0]
    receive, send, wait = world.receive, world.send, world.wait

    def timed_receive() -> tuple[str, Step] | None:
        now[0] += 0.0001
        return receive()

    def timed_send(message: Message) -> bool:
        answered[0] = now[0]
        return send(message)

    def timed_wait(sockets: object, seconds: float) -> None:
        slept[0] = now[0]
        wait(sockets, seconds)

    monkeypatch.setattr("fast_inference.executor.process.time.monotonic", lambda: now[0])
    world.receive, world.send, world.wait = timed_receive, timed_send, timed_wait  # type: ignore[method-assign]
    world.run()
    assert awake <= slept[0] - answered[0] < awake + 0.001


def test_under_load_only_wanted_recordings_are_made_and_steps_have_most_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step takes 10 ms, a recording 50: so twice as long, ten steps, lie between two of them."""
    world, now = World(30, depth=2, missing=9), [0.0]
    launch, go_on, receive = world.launch, world.recordings.go_on, world.receive

    def timed_receive() -> tuple[str, Step] | None:
        now[0] += 0.0001  # patience comes to an end
        return receive()

    def wanting(step: Step) -> Work:
        now[0] += 0.010
        world.recordings.wanted = step.number > 8
        return launch(step)

    def timed_go_on() -> Piece:
        now[0] += 0.050
        return go_on()

    monkeypatch.setattr("fast_inference.executor.process.time.monotonic", lambda: now[0])
    world.launch, world.recordings.go_on = wanting, timed_go_on  # type: ignore[method-assign]
    world.receive = timed_receive  # type: ignore[method-assign]
    events = world.run()
    busy = [event for event in events[: events.index("launch 30")] if not event.startswith("finish")]
    places = [place for place, event in enumerate(busy) if event == "record"]
    assert busy[places[0] - 1] == "launch 9"
    assert {later - earlier for earlier, later in pairwise(places)} == {11} and len(places) == 3
    assert events.count("record") == 9
