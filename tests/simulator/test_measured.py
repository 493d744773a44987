"""A journal tells the costs of the device that it was written beside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fast_inference.protocol.codec import encode
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.scheduler.core import EXECUTOR
from fast_inference.scheduler.journal import Call, Header, Record, outputs_of
from fast_inference.simulator import replica
from fast_inference.simulator.costs import TERMS, Calibration
from fast_inference.simulator.measured import find_calibration, observe
from fast_inference.simulator.simulation import Setup, simulate
from fast_inference.simulator.workload import Workload

DEVICE = Calibration(
    name="real",
    base=0.02,
    per_token=3e-4,
    per_row=2e-3,
    per_context=5e-6,
    gap=0.004,
    num_blocks=60,
    max_model_len=512,
)
CONFIG = EngineConfig(model="m", max_num_seqs=8, max_num_batched_tokens=64)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What a journal of a simulated run would hold: the blocks are short, so requests are preempted and resumed."""
    written: list[Record] = []

    class Written(replica.SchedulerCore):
        def handle(self, message, now, sender=""):  # type: ignore[no-untyped-def]
            effects = super().handle(message, now, sender)
            written.append(Record(Call.HANDLE, now, sender, encode(message), outputs_of(effects, redacted=False)))
            return effects

        def schedule(self, now):  # type: ignore[no-untyped-def]
            step = super().schedule(now)
            if step is not None:
                written.append(Record(Call.SCHEDULE, now, "", None, outputs_of(step, redacted=False)))
            return step

    monkeypatch.setattr(replica, "SchedulerCore", Written)
    rng = np.random.default_rng(5)
    requests = Workload(
        arrival=np.sort(rng.uniform(0, 10, 60)),
        prompt=rng.integers(1, 200, 60),
        output=rng.integers(1, 100, 60),
        client=np.zeros(60, np.int64),
        deadline=np.full(60, np.inf),
    )
    result = simulate(Setup(config=CONFIG, calibration=DEVICE, max_tokens=120), requests)
    assert result.figures["preemptions"] > 0
    return written


def test_a_journal_gives_back_the_costs_of_its_device(records: list[Record]) -> None:
    seen = observe(records)
    found = seen.calibrated("from a journal", request=0.25)
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(DEVICE, term), rel=1e-3)
    assert found.gap == pytest.approx(DEVICE.gap, rel=1e-6)
    assert (found.num_blocks, found.max_model_len, found.request) == (60, 512, 0.25)
    assert len(seen.ends) == 60


def test_results_that_were_seen_late_make_no_gap(records: list[Record]) -> None:
    """As on a GPU: while the host launches a step, the result of the one before it waits, and the next is on time."""
    late = [
        replace(record, now=record.now + 0.01) if record.sender == EXECUTOR and place % 3 == 0 else record
        for place, record in enumerate(records)
    ]
    assert observe(late).calibrated("late").gap == pytest.approx(DEVICE.gap, rel=0.01)


def test_steps_of_requests_from_before_the_journal_are_left_out(records: list[Record]) -> None:
    late = observe(records[len(records) // 2 :])
    assert late.info is None
    assert 8 <= len(late.steps) < len(observe(records).steps)
    assert late.calibrated("late").per_row == pytest.approx(DEVICE.per_row, rel=1e-3)


def test_a_part_of_a_run_can_be_left_out(records: list[Record]) -> None:
    whole = observe(records)
    begun, ended = whole.times[100], whole.times[200]
    rest = whole.outside(begun, ended)
    assert len(rest.steps) == len(rest.gaps) == len(whole.steps) - 101
    assert 0 < len(rest.ends) < 60
    assert not [end for end in rest.ends if begun <= end.finished <= ended]


def test_a_journal_file_is_a_calibration(records: list[Record], tmp_path: Path) -> None:
    file = tmp_path / "run.journal"
    file.write_bytes(Header(CONFIG, False).pack() + b"".join(record.pack() for record in records))
    found = find_calibration(str(file))
    assert (found.name, found.num_blocks) == ("run.journal", 60)
    assert found.base == pytest.approx(DEVICE.base, rel=1e-3)


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "noise"
    file.write_bytes(b"\x93noise")
    with pytest.raises(InvalidRequest, match=r"calibrate: .* is no journal"):
        find_calibration(str(file))
    file.write_bytes(Header(CONFIG, False).pack())
    with pytest.raises(InvalidRequest, match="steps must be at least 8, got 0"):
        find_calibration(str(file))
