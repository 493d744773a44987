"""`fast-inference replay FILE`: a journal run again, shown in the terminal.

Owns what is shown and the exit status; how a journal is run is known by `scheduler/replay.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..scheduler.replay import Replay, replay


def show_replay(path: Path) -> int:
    """Run the journal at `path` again and print what came of it; returns the exit status: 1 for a difference."""
    with progress_bar(f"replaying {path.name}") as advance:
        done = replay(path, advance)
    print("\n".join(_lines(path, done)))
    return 0 if done.difference is None else 1


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; gives what is to be told bytes done and bytes in all."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(path: Path, done: Replay) -> list[str]:
    totals = done.core.totals
    lines = [
        f"{path}: {done.records:,} records, {done.steps:,} steps, {totals.generation_tokens:,} tokens generated, "
        f"{totals.preemptions:,} preemptions, {sum(totals.finished.values()):,} requests ended, "
        f"{done.last - done.first:.1f} s" + (", redacted" if done.redacted else "")
    ]
    if done.cut_off:
        lines.append("the file ends within a record: its writer was killed, or is still at work")
    if done.difference is None:
        lines.append("every output is the same")
    else:
        lines.append(f"the first difference: {done.difference}")
    return lines
