"""What a starting engine shows: each actor's phase with a bar on a terminal, plain lines elsewhere.

Owns standard error while the engine starts; must not know how it starts. Imports rich only when it draws.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..protocol.messages import Progress, Ready

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PLAIN_SECONDS = 10.0  # between two plain lines about the same phase


class StartDisplay:
    """Shows a start; a context manager. After it, `line` goes on passing lines through, and `later` shows what is made
    while requests are served already.

    Args:
        plain: write plain lines where there is no terminal; else nothing is shown there.
    """

    def __init__(self, *, plain: bool = False) -> None:
        self._plain = plain and not sys.stderr.isatty()
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._phases: dict[str, tuple[str, float]] = {}
        self._began = time.monotonic()
        self._lock = threading.Lock()  # `line` comes from the supervisor's thread

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def event(self, event: Progress | Ready) -> None:
        """An actor tells of its start."""
        if self._bars is not None:
            self._draw(self._bars, event)
        elif self._plain:
            self._write(event)

    def later(self, event: Progress | Ready) -> None:
        """An actor of a ready engine tells of what it makes beside its work. The bar goes when that is done."""
        if isinstance(event, Ready):
            return
        if self._bars is None and sys.stderr.isatty():
            self._open()
        self.event(event)
        if event.done >= event.total:
            self._close()

    def line(self, actor: str, line: str) -> None:
        """A line of an actor's standard error."""
        with self._lock:
            if self._bars is not None:
                self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.fields[actor]:<11}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bars.start()
        with self._lock:
            self._bars, self._tasks = bars, {}

    def _close(self) -> None:
        with self._lock:
            bars, self._bars = self._bars, None
            if bars is not None:
                bars.stop()

    def _draw(self, bars: Bars, event: Progress | Ready) -> None:
        task = self._tasks.get(event.actor)
        if task is None:
            task = self._tasks[event.actor] = bars.add_task("", total=None, actor=event.actor)
        if isinstance(event, Ready):
            bars.update(task, description="ready", total=1, completed=1)
        else:
            bars.update(task, description=event.phase, total=event.total or None, completed=event.done)

    def _write(self, event: Progress | Ready) -> None:
        now = time.monotonic()
        phase = "ready" if isinstance(event, Ready) else event.phase
        last, when = self._phases.get(event.actor, ("", 0.0))
        if phase == last and now - when < PLAIN_SECONDS:
            return
        self._phases[event.actor] = (phase, now)
        share = f" {event.done}/{event.total}" if isinstance(event, Progress) and event.total else ""
        print(f"[{now - self._began:6.1f} s] {event.actor}: {phase}{share}", file=sys.stderr, flush=True)
