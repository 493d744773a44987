"""Traces: what is read, how a trace is sped up, shortened, started over, and shared out among clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.simulator.workload import Workload, read_trace, shaped

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def trace(path: Path, *rows: str) -> Workload:
    file = path / "trace.csv"
    file.write_text(HEAD + "".join(f"{row}\n" for row in rows))
    return read_trace(file)


def test_a_trace_starts_at_zero_in_order_of_arrival(tmp_path: Path) -> None:
    read = trace(tmp_path, "2023-11-16 18:15:50.5000000,10,3", "2023-11-16 18:15:48.2500000,20,4")
    assert read.arrival.tolist() == [0.0, 2.25]
    assert (read.prompt.tolist(), read.output.tolist()) == ([20, 10], [4, 3])
    assert trace(tmp_path, "5,1,2", "7.5,1,2").arrival.tolist() == [0.0, 2.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,0,3", "line 2: ContextTokens can't be '0'"),
        ("1,5,x", "line 2: GeneratedTokens can't be 'x'"),
        ("soon,5,5", "line 2: TIMESTAMP can't be 'soon'"),
        ("1,5", "line 2: GeneratedTokens can't be None"),
    ],
)
def test_a_row_that_can_not_be_read_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        trace(tmp_path, row)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="trace must be a CSV file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(InvalidRequest, match="at least 1 row"):
        trace(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidRequest, match="must have the columns TIMESTAMP"):
        read_trace(tmp_path / "other.csv")


def test_a_trace_is_sped_up_shortened_and_started_over(tmp_path: Path) -> None:
    read = trace(tmp_path, "0,100,10", "10,30,1", "20,50,7")
    longer = shaped(read, requests=7, speed_up=2.0, scale_tokens=0.1)
    assert longer.arrival.tolist() == [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0]
    assert longer.prompt.tolist() == [10, 3, 5, 10, 3, 5, 10]
    assert longer.output.tolist() == [1, 1, 1, 1, 1, 1, 1]
    assert np.isinf(longer.deadline).all() and not longer.client.any()


def test_clients_and_deadlines_are_drawn_from_the_seed(tmp_path: Path) -> None:
    read = trace(tmp_path, *(f"{second},10,10" for second in range(300)))
    first, again, other = (shaped(read, clients=3, deadline=(0.5, 2.0), seed=seed) for seed in (1, 1, 2))
    assert first.client.tolist() == again.client.tolist() != other.client.tolist()
    assert first.deadline.tolist() == again.deadline.tolist()
    assert first.deadline.min() >= 0.5 and first.deadline.max() <= 2.0
    counts = np.bincount(first.client)
    assert counts[0] > counts[1] > counts[2] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"speed_up": 0.0}, "speed_up must be at least 1e-06, got 0"),
        ({"scale_tokens": float("nan")}, "scale_tokens must be at least 1e-06, got nan"),
        ({"clients": 0}, "clients must be at least 1, got 0"),
        ({"deadline": (2.0, 1.0)}, "deadline must be 0 < low <= high seconds, got 2 and 1"),
    ],
)
def test_an_argument_out_of_range_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        shaped(trace(tmp_path, "0,10,10"), **change)  # type: ignore[arg-type]
