"""Random histories, written down and run again; and cores that are frozen and thawed on the way."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import msgpack
import pytest
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.policy_names import SchedulerPolicy
from fast_inference.scheduler.core import SchedulerCore
from fast_inference.scheduler.replay import assert_replays
from fast_inference.scheduler.snapshot import SnapshotError, freeze_core, thaw_core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .harness import Harness
from .recorded import Recorded
from .test_scheduler_histories import Sequence, engines, play, sequences


class Frozen(Harness):
    """A harness whose core is put on disk and taken from there before each step."""

    def schedule(self) -> None:
        packed = msgpack.packb(freeze_core(self.core))
        self.core = SchedulerCore(self.config)
        thaw_core(self.core, msgpack.unpackb(packed))
        super().schedule()


histories = {
    "work": st.lists(sequences, min_size=1, max_size=8),
    "engine": engines,
    "answers": st.lists(st.booleans(), max_size=40),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**histories, redact=st.booleans())
def test_every_history_replays(
    work: list[Sequence], engine: dict[str, object], answers: list[bool], redact: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        harness = play(work, engine, answers, partial(Recorded, path, journal_redact=redact))
        assert isinstance(harness, Recorded)
        harness.recorder.close()
        assert_replays(path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**histories)
def test_a_thawed_core_goes_on_as_the_frozen_one_would_have(
    work: list[Sequence], engine: dict[str, object], answers: list[bool]
) -> None:
    plain, frozen = play(work, engine, answers), play(work, engine, answers, Frozen)
    assert list(map(repr, frozen.steps)) == list(map(repr, plain.steps))
    assert frozen.ends == plain.ends and frozen.tokens == plain.tokens


def test_what_is_no_state_of_this_scheduler_is_refused() -> None:
    core = SchedulerCore(EngineConfig())
    for data in (
        ["object", "os:environ", [], []],
        ["object", ".scheduler.core:EXECUTOR", [], []],
        ["object", ".scheduler.nowhere:Thing", [], []],
        ["again", 7],
        ["nonsense"],
        5,
        ["dict", ["other"], [1]],
    ):
        with pytest.raises(SnapshotError):
            thaw_core(core, data)


def test_state_that_cannot_be_frozen_is_named() -> None:
    core = SchedulerCore(EngineConfig())
    core.totals.finished["stop"] = partial(int)  # type: ignore[assignment]
    with pytest.raises(SnapshotError, match=r"core\['totals'\]\.finished\['stop'\] is a functools\.partial"):
        freeze_core(core)


@pytest.mark.parametrize("policy", list(SchedulerPolicy))
def test_a_snapshot_holds_no_secret_of_the_settings(policy: str) -> None:
    core = SchedulerCore(EngineConfig(model="fake", scheduling_policy=policy, api_key="a very secret key"))
    assert b"a very secret key" not in msgpack.packb(freeze_core(core))
    thawed = SchedulerCore(core.config)
    thaw_core(thawed, freeze_core(core))
    assert thawed.policy.config is core.config
