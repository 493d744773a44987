"""The requests of a simulation: when each comes, how long its prompt is, how long its answer will turn out.

Owns reading a trace and what a trace does not say (clients, deadlines), drawn from a seed. Must not know engines,
costs or figures. The answer's length is known to the simulated device alone; the scheduler is told `max_tokens`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import InvalidRequest

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Workload:
    """Parallel columns, in the order of arrival."""

    arrival: NDArray[np.float64]  # seconds after the first one
    prompt: NDArray[np.int64]  # tokens
    output: NDArray[np.int64]  # tokens, the one that ends the answer among them
    client: NDArray[np.int64]  # who asks: 0, 1, ..; the number is the priority too: who asks less often is more urgent
    deadline: NDArray[np.float64]  # seconds from arrival to the first token; infinite: none

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def clients(self) -> int:
        return int(self.client.max()) + 1


def read_trace(path: Path) -> Workload:
    """All rows of a CSV file with the columns TIMESTAMP (ISO 8601, or seconds), ContextTokens and GeneratedTokens.

    One client, no deadlines. Raises `InvalidRequest` naming the row and the column that can't be read.
    """
    if not path.is_file():
        raise InvalidRequest(f"trace must be a CSV file, got {str(path)!r}", param="trace")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise InvalidRequest(f"trace must have the columns {', '.join(COLUMNS)}: {path} has not", param="trace")
        rows = [_row(path, number, row) for number, row in enumerate(reader, start=2)]
    if not rows:
        raise InvalidRequest(f"trace must have at least 1 row, {path} has 0", param="trace")
    columns = np.array(sorted(rows), np.float64)
    return Workload(
        arrival=columns[:, 0] - columns[0, 0],
        prompt=columns[:, 1].astype(np.int64),
        output=columns[:, 2].astype(np.int64),
        client=np.zeros(len(rows), np.int64),
        deadline=np.full(len(rows), np.inf),
    )


def shaped(
    trace: Workload,
    *,
    requests: int | None = None,
    speed_up: float = 1.0,
    scale_tokens: float = 1.0,
    clients: int = 1,
    deadline: tuple[float, float] | None = None,
    seed: int = 0,
) -> Workload:
    """`trace` with `requests` rows (it starts over when it has fewer), its clock `speed_up` times as fast, lengths
    times `scale_tokens`.

    Each request belongs to one of `clients`, the i-th asking 1/i as often as the first, and, with `deadline` (low,
    high: seconds), wants its first token in a time drawn evenly from there; both drawn from `seed`. Raises
    `InvalidRequest` naming the argument that is out of range.
    """
    count = len(trace) if requests is None else requests
    least: dict[str, tuple[float, float]] = {
        "requests": (count, 1),
        "speed_up": (speed_up, 1e-6),
        "scale_tokens": (scale_tokens, 1e-6),
        "clients": (clients, 1),
    }
    for name, (value, low) in least.items():
        if not value >= low:
            raise InvalidRequest(f"{name} must be at least {low:g}, got {value:g}", param=name)
    if deadline is not None and not 0 < deadline[0] <= deadline[1]:
        raise InvalidRequest(
            f"deadline must be 0 < low <= high seconds, got {deadline[0]:g} and {deadline[1]:g}", param="deadline"
        )
    place = np.arange(count) % len(trace)
    # the trace starts over after a pause as long as its mean one
    period = float(trace.arrival[-1]) * len(trace) / max(len(trace) - 1, 1)
    rng = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, clients + 1)
    return Workload(
        arrival=(trace.arrival[place] + np.arange(count) // len(trace) * period) / speed_up,
        prompt=_scaled(trace.prompt[place], scale_tokens),
        output=_scaled(trace.output[place], scale_tokens),
        client=rng.choice(clients, count, p=shares / shares.sum()),
        deadline=np.full(count, np.inf) if deadline is None else rng.uniform(*deadline, count),
    )


def _scaled(tokens: NDArray[np.int64], scale: float) -> NDArray[np.int64]:
    whole: NDArray[np.int64] = np.maximum(np.rint(tokens * scale), 1).astype(np.int64)
    return whole


def _row(path: Path, number: int, row: dict[str, str]) -> tuple[float, int, int]:
    column = COLUMNS[0]
    try:
        arrival = _seconds(row[column])
        lengths = []
        for column in COLUMNS[1:]:
            lengths.append(int(row[column]))
            if lengths[-1] < 1:
                raise ValueError("less than 1")
    except (TypeError, ValueError):
        raise InvalidRequest(f"{path}, line {number}: {column} can't be {row[column]!r}", param="trace") from None
    return arrival, lengths[0], lengths[1]


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # fromisoformat takes at most 6 digits after the second's point on Python 3.10 and cuts a seventh off since 3.11
        return datetime.fromisoformat(text).timestamp()
