"""What is told at the end: the machine, tables on the terminal, and the JSON file.

Owns the forms of the reports; must not know how anything was measured.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fast_inference.executor.threads import usable_cores
from records import METRICS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PACKAGES = ("fast-inference", "torch", "transformers")
WIDTH = 120  # of tables in a file or a pipe, which have no width of their own
console = Console(width=None if sys.stdout.isatty() else WIDTH)


def machine() -> dict[str, Any]:
    """Where and when this runs. `load_average`: of the last minute before the start; above 0 means company."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write `report` to `path`, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"Written to {path}")


def progress_bar() -> Progress:
    """A bar that counts requests."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def phase_progress(bar: Progress, label: str, total: int) -> Callable[[str, int], None]:
    """A row of `bar` for work in phases of `total` requests each; call it with the phase and what is done of it."""
    task = bar.add_task(label, total=total)

    def show(phase: str, done: int) -> None:
        if done == 0:
            bar.reset(task, description=f"{label}: {phase}")
        bar.update(task, completed=done)

    return show


def offline_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table for each workload, one row for each engine."""
    for workload in report["workloads"]:
        shape = f"{workload['requests']} requests, {workload['prompt_tokens']:,} in, {workload['output_tokens']:,} out"
        table = Table(title=f"{workload['name']}: {shape}", title_justify="left")
        table.add_column("engine")
        for column in ("output tok/s", "min to max", "runs", "mean TTFT ms", "ours / theirs", "at least"):
            table.add_column(column, justify="right")
        for name, engine in workload["engines"].items():
            ratio = workload["ratios"].get(name)
            table.add_row(
                name,
                f"{engine['median']:.1f}",
                f"{engine['min']:.1f} to {engine['max']:.1f}",
                str(len(engine["runs"])),
                f"{engine['mean_ttft_ms']:.0f}",
                f"{ratio['ratio']:.2f}" if ratio else "",
                ratio_target(ratio),
            )
        yield table


def ratio_target(ratio: dict[str, Any] | None) -> str:
    """The wanted ratio, in green where it is reached."""
    if ratio is None or ratio["target"] is None:
        return ""
    return f"[{'green' if ratio['reached'] else 'red'}]{ratio['target']:g}[/]"


SERVING_ROWS = (
    ("Successful requests", "completed", "d"),
    ("Failed requests", "failed", "d"),
    ("Benchmark duration (s)", "duration", ".2f"),
    ("Total input tokens", "total_input_tokens", "d"),
    ("Total generated tokens", "total_output_tokens", "d"),
    ("Request throughput (req/s)", "request_throughput", ".2f"),
    ("Request goodput (req/s)", "request_goodput", ".2f"),
    ("Output token throughput (tok/s)", "output_throughput", ".2f"),
    ("Total token throughput (tok/s)", "total_token_throughput", ".2f"),
    *(
        (f"{kind.capitalize()} {metric.upper()} (ms)", f"{kind}_{metric}_ms", ".2f")
        for metric in METRICS
        for kind in ("mean", "median", "p99")
    ),
)


def serving_table(report: dict[str, Any]) -> Table:
    """One column for each engine, one row for each figure that somebody has."""
    engines = report["engines"]
    table = Table(title=f"{report['requests']} requests, {report['arrivals']}")
    table.add_column("figure")
    for name in engines:
        table.add_column(name, justify="right")
    for label, key, form in SERVING_ROWS:
        if any(key in figures for figures in engines.values()):
            table.add_row(label, *(format(f[key], form) if key in f else "" for f in engines.values()))
    return table
