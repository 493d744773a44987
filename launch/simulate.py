"""`fast-inference simulate`: a trace through the scheduler's own core on a virtual clock.

Owns the command's flags and what it prints; must not know how anything is simulated (`simulator/`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .flags import engine_config

if TYPE_CHECKING:
    from ..simulator.comparison import Run
    from ..simulator.simulation import Result

WIDTH = 200  # of tables in a file or a pipe, which have no width of their own

COLUMNS = (  # of a comparison: title, figure, form
    ("tok/s out", "output_throughput", ",.0f"),
    ("mean TTFT ms", "mean_ttft_ms", ",.0f"),
    ("p99 TTFT ms", "p99_ttft_ms", ",.0f"),
    ("mean ITL ms", "mean_itl_ms", ".1f"),
    ("p99 ITL ms", "p99_itl_ms", ".1f"),
    ("p99 E2EL ms", "p99_e2el_ms", ",.0f"),
    ("preempted", "preemptions", ",d"),
    ("KV used", "kv_utilization", ".0%"),
    ("refused", "refused", ",d"),
    ("deadlines met", "deadlines_met", ",d"),
    ("Jain", "jain_index", ".3f"),
    ("service gap", "largest_service_gap", ",.0f"),
    ("urgent TTFT ms", "urgent_mean_ttft_ms", ",.0f"),
)


def simulate(
    trace: Annotated[
        Path, typer.Option("--trace", help="CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens")
    ],
    policy: Annotated[str, typer.Option("--policy", "--scheduling-policy", help="the scheduling policy")] = "fcfs",
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="A,B,..", help="several policies, as a table")
    ] = None,
    speed_up: Annotated[
        str, typer.Option("--speed-up", metavar="X[,Y..]", help="of the trace's clock; several: a run for each")
    ] = "1",
    calibrate: Annotated[
        str,
        typer.Option("--calibrate", metavar="NAME|FILE", help="a built-in device, a JSON file, or a run's journal"),
    ] = "h200-llama-8b",
    replicas: Annotated[int, typer.Option("--replicas", help="engines behind one router")] = 1,
    router: Annotated[str, typer.Option("--router", help="least-loaded or round-robin")] = "least-loaded",
    num_prompts: Annotated[
        int | None,
        typer.Option("--num-prompts", "--max-requests", help="requests; more than the trace has: it starts over"),
    ] = None,
    scale_tokens: Annotated[float, typer.Option("--scale-tokens", help="times every length of the trace")] = 1.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="what each request allows; answers end where the trace says")
    ] = 2048,
    clients: Annotated[int, typer.Option("--clients", help="who ask: the i-th 1/i as often, with more priority")] = 1,
    deadline_ms: Annotated[
        str | None, typer.Option("--deadline-ms", metavar="LOW[-HIGH]", help="for the first token, drawn evenly")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of clients and deadlines")] = 0,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg|png", help="draw a chart there")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures there")] = None,
    **engine: Any,
) -> None:
    """Predict latency and throughput of a trace: the real scheduler, a virtual clock, a device's measured costs."""
    from ..simulator import plot as charts
    from ..simulator.comparison import runs
    from ..simulator.measured import find_calibration
    from ..simulator.simulation import Setup
    from ..simulator.workload import read_trace, shaped

    if plot is not None:
        charts.check_file(plot)
    if as_json is not None and not as_json.absolute().parent.is_dir():
        raise typer.BadParameter(f"--json must be in a folder that exists, got {str(as_json)!r}")
    calibration = find_calibration(calibrate)
    requests = read_trace(trace)
    count = len(requests) if num_prompts is None else num_prompts
    # requests wait without a limit unless one is given: who is refused would be missing from the latencies
    defaults = {"max_num_queued_reqs": max(count, 1), "block_size": calibration.block_size}
    given = {name: value for name, value in engine.items() if value is not None}
    setup = Setup(
        config=engine_config({**defaults, **given}),
        calibration=calibration,
        replicas=replicas,
        router=router,
        max_tokens=max_tokens,
    )
    workload = partial(
        shaped,
        requests,
        requests=count,
        scale_tokens=scale_tokens,
        clients=clients,
        deadline=_range(deadline_ms),
        seed=seed,
    )
    policies = [name.strip() for name in (compare or policy).split(",")]
    chosen = list(runs(setup, policies, _numbers(speed_up), lambda speed: workload(speed_up=speed)))
    _run(chosen, calibration.name, as_json, plot)


def _run(chosen: Sequence[Run], calibration: str, as_json: Path | None, plot: Path | None) -> None:
    from ..simulator import plot as charts
    from ..simulator.comparison import chart, report, run_all

    with _collector_at_rest(), _progress(chosen) as progress:
        done = run_all(chosen, progress)
    _print(done, calibration)
    if as_json is not None:
        as_json.write_text(json.dumps(report(done), indent=2) + "\n")
    if plot is not None:
        charts.write(chart(done), plot)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """The core makes no reference cycles: over a million requests the collector would look for them in vain."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def _progress(chosen: Sequence[Run]) -> Iterator[Callable[[Run, int], None]]:
    """A bar of the requests of all runs that have ended, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        before = {id(run): sum(len(r.workload) for r in chosen[:place]) for place, run in enumerate(chosen)}
        task = bar.add_task("simulate", total=sum(len(run.workload) for run in chosen))
        yield lambda run, ended: bar.update(
            task, completed=before[id(run)] + ended, description=f"{run.policy} {run.speed_up:g}x"
        )


def _print(done: Sequence[tuple[Run, Result]], calibration: str) -> None:
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    run, result = done[0]
    several = f", {run.setup.replicas} replicas ({run.setup.router})" if run.setup.replicas > 1 else ""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(f"{len(run.workload):,} requests, simulated on {calibration}{several}\n")
    table = Table(box=MARKDOWN)
    if len(done) == 1:
        table.add_column(f"{run.policy}, {run.speed_up:g}x")
        table.add_column("", justify="right")
        for name, value in result.figures.items():
            if not isinstance(value, list):
                table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    else:
        shown = [column for column in COLUMNS if any(_worth_a_column(column[1], r.figures) for _, r in done)]
        for title in ("speed", "policy", *(column[0] for column in shown)):
            table.add_column(title, justify="left" if title == "policy" else "right")
        for run, result in done:
            cells = (format(result.figures[key], form) if key in result.figures else "" for _, key, form in shown)
            table.add_row(f"{run.speed_up:g}x", run.policy, *cells)
    console.print(table)


def _worth_a_column(key: str, figures: dict[str, Any]) -> bool:
    return bool(figures.get("refused")) if key == "refused" else key in figures


def _numbers(text: str) -> list[float]:
    """`X[,Y..]`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--speed-up must be numbers with commas between, got {text!r}") from None


def _range(text: str | None) -> tuple[float, float] | None:
    """`LOW[-HIGH]` milliseconds, as seconds."""
    if text is None:
        return None
    low, _, high = text.partition("-")
    try:
        return float(low) / 1e3, float(high or low) / 1e3
    except ValueError:
        raise typer.BadParameter(f"--deadline-ms must be LOW or LOW-HIGH in milliseconds, got {text!r}") from None
