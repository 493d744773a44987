"""What a start shows, and what is shown of the work that goes on behind it."""

from __future__ import annotations

import sys

import pytest
from fast_inference.launch.display import StartDisplay
from fast_inference.protocol.messages import Progress, Ready


def recording(done: int) -> Progress:
    return Progress(actor="executor", phase="recording steps", done=done, total=3)


def test_without_a_terminal_each_phase_is_a_line_also_after_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with StartDisplay(plain=True) as display:
        display.event(Progress(actor="executor", phase="loading the model", done=0, total=0))
        display.event(Ready(actor="executor"))
    for done in (1, 2, 3):
        display.later(recording(done))
    lines = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["executor: loading the model", "executor: ready", "executor: recording steps 1/3"]


def test_on_a_terminal_recordings_have_a_bar_that_goes_when_the_last_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with StartDisplay() as display:
        display.event(Ready(actor="executor"))
    assert display._bars is None
    display.later(recording(1))
    bars = display._bars
    assert bars is not None
    (task,) = bars.tasks
    assert (task.description, task.completed, task.total) == ("recording steps", 1, 3)
    display.later(recording(3))
    assert display._bars is None and bars.finished
