"""Several simulations of one trace side by side: each policy at each speed of the trace's clock.

Owns the product of the two, the JSON report and the chart made of it; must not know how either is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .plot import Chart, Line
from .simulation import Result, Setup, simulate
from .workload import Workload

CDF_POINTS = 200


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation of a comparison."""

    policy: str
    speed_up: float
    setup: Setup
    workload: Workload


def runs(
    setup: Setup, policies: Sequence[str], speed_ups: Sequence[float], workload: Callable[[float], Workload]
) -> Iterator[Run]:
    """Every policy at every speed; `workload(speed_up)` makes the requests, the same ones for all policies. Raises
    `InvalidRequest` for a policy that is none."""
    setups = [(policy, _with_policy(setup, policy)) for policy in policies]
    for speed_up in speed_ups:
        requests = workload(speed_up)
        for policy, changed in setups:
            yield Run(policy, speed_up, changed, requests)


def run_all(
    chosen: Sequence[Run], progress: Callable[[Run, int], None] = lambda run, ended: None
) -> list[tuple[Run, Result]]:
    """All of them, one after the other; `progress(run, requests ended)` is called now and then."""
    return [(run, _run_one(run, progress)) for run in chosen]


def report(done: Sequence[tuple[Run, Result]]) -> dict[str, Any]:
    """What was simulated, on what, and what came out, as plain data."""
    first = done[0][0]
    return {
        "calibration": asdict(first.setup.calibration),
        "replicas": first.setup.replicas,
        "router": first.setup.router,
        "max_tokens": first.setup.max_tokens,
        "requests": len(first.workload),
        "runs": [{"policy": run.policy, "speed_up": run.speed_up, **result.figures} for run, result in done],
    }


def chart(done: Sequence[tuple[Run, Result]]) -> Chart:
    """With several speeds the 99th percentile of TTFT over speed, a line for each policy; with one the share of
    requests whose first token came within a time."""
    named = f"{done[0][0].setup.calibration.name}, {len(done[0][0].workload):,} requests"
    policies = list(dict.fromkeys(run.policy for run, _ in done))
    if len({run.speed_up for run, _ in done}) > 1:
        lines = [
            Line(policy, [(r.speed_up, x.figures.get("p99_ttft_ms", 0.0) / 1e3) for r, x in done if r.policy == policy])
            for policy in policies
        ]
        return Chart(
            title=f"Time to first token by load ({named})",
            x_label="speed of the trace's clock",
            y_label="p99 TTFT, seconds",
            lines=lines,
            log_y=True,
            markers=True,
        )
    return Chart(
        title=f"Time to first token ({named})",
        x_label="TTFT, seconds",
        y_label="share of the requests",
        lines=[Line(run.policy, _distribution(result)) for run, result in done],
        log_x=True,
    )


def _distribution(result: Result) -> list[tuple[float, float]]:
    ttft = result.ledger.ttft[~np.isnan(result.ledger.ttft)]
    shares = np.linspace(0.0, 1.0, CDF_POINTS)
    return [] if not len(ttft) else list(zip(np.quantile(ttft, shares).tolist(), shares.tolist(), strict=True))


def _with_policy(setup: Setup, policy: str) -> Setup:
    return Setup(
        config=setup.config.replace(scheduling_policy=policy),
        calibration=setup.calibration,
        replicas=setup.replicas,
        router=setup.router,
        max_tokens=setup.max_tokens,
    )


def _run_one(run: Run, progress: Callable[[Run, int], None]) -> Result:
    return simulate(run.setup, run.workload, lambda ended: progress(run, ended))
