"""`fast-inference replay`: what it prints, and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
from fast_inference.launch.cli import app
from fast_inference.protocol.codec import encode
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import GetStats, Stats
from fast_inference.scheduler.core import SchedulerCore
from fast_inference.scheduler.journal import Call, Header, JournalError, Record
from fast_inference.scheduler.recorder import RecordedCore
from typer.testing import CliRunner


def test_a_journal_that_replays_ends_with_status_0(tmp_path: Path) -> None:
    config = EngineConfig(journal=str(tmp_path / "j"))
    core = RecordedCore(SchedulerCore(config), config)
    core.handle(GetStats(token=1), 10.0, "frontend-0")
    core.close()
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "j")])
    assert done.exit_code == 0
    assert "1 records, 0 steps" in done.output and "every output is the same" in done.output


def test_a_difference_is_shown_and_ends_with_status_1(tmp_path: Path) -> None:
    outputs: list[tuple[str, bytes | str]] = [("frontend-0", encode(Stats(token=1, steps=7)))]
    record = Record(Call.HANDLE, 10.0, "frontend-0", encode(GetStats(token=1)), outputs)
    (tmp_path / "j").write_bytes(Header(EngineConfig(), redacted=False).pack() + record.pack())
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "j")])
    assert done.exit_code == 1
    assert "record 1 at 10.0 (1970-01-01T00:00:10.000000+00:00): handle GetStats from 'frontend-0'" in done.output
    assert "Stats.steps: journal 7, replay 0" in done.output


def test_a_file_that_is_no_journal_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("nothing of the kind")
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "j")])
    assert isinstance(done.exception, JournalError)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--journal", "FILE"], {"journal": "FILE"}),
        (
            ["--journal", "FILE", "--journal-max-bytes", "2MiB", "--journal-redact"],
            {"journal": "FILE", "journal_max_bytes": 2**21, "journal_redact": True},
        ),
    ],
)
def test_the_flags_of_serve(flags: list[str], settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineConfig] = []

    class Seen(Exception):
        pass

    def launcher(config: EngineConfig, **rest: object) -> None:
        seen.append(config)
        raise Seen

    monkeypatch.setattr("fast_inference.launch.launcher.Launcher", launcher)
    assert isinstance(CliRunner().invoke(app, ["serve", *flags]).exception, Seen)
    assert seen[0] == EngineConfig(**settings)  # type: ignore[arg-type]
