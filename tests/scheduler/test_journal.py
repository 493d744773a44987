"""A journal is a run that can be run again: whole, rotated, redacted, cut off, and up to a failure."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import msgpack
import numpy as np
import pytest
from fast_inference.protocol.codec import decode, encode
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import StartupError
from fast_inference.protocol.messages import (
    Abort,
    Deliver,
    GetStats,
    PromptLogprobs,
    RowFailed,
    Shutdown,
    Step,
    StepResult,
    StopFound,
    Submit,
    TopLogprobs,
)
from fast_inference.scheduler import journal_writer
from fast_inference.scheduler.core import SchedulerCore
from fast_inference.scheduler.journal import Header, JournalError, Reader, Record
from fast_inference.scheduler.journal_writer import JournalWriter, previous
from fast_inference.scheduler.replay import assert_replays, replay

from .fake_executor import make_info
from .recorded import Recorded


def run_some(harness: Recorded, rounds: int = 3) -> None:
    """Prompts that share their start, stop ids, an abort, a stop string, more than the pool can hold."""
    for turn in range(rounds):
        base = 100 * turn
        for key in range(12):
            ids = [91, 92, 93, 94, 95, 96, key % 3, turn, key]
            harness.submit(base + key, ids, max_tokens=5 + key, stop_token_ids=(key,), eos=(50,), priority=key % 2)
        for _ in range(6):
            harness.step()
        harness.handle(Abort(keys=(base + 2, 9999)))
        harness.handle(StopFound(numbers=(12 * turn + 5,)), "detokenizer")
        harness.handle(GetStats(token=turn))
        harness.drain()


SMALL = {"num_blocks": 20}


def recorded(path: Path, **config: object) -> Recorded:
    harness = Recorded(path, make_info(**SMALL), max_num_batched_tokens=16, **config)
    run_some(harness)
    harness.recorder.close()
    assert harness.core.totals.preemptions, "the work is meant to be too much for the pool"
    return harness


@pytest.mark.parametrize("policy", ["fcfs", "priority", "memory-aware"])
def test_a_journal_replays_as_it_was(tmp_path: Path, policy: str) -> None:
    harness = Recorded(tmp_path / "j", make_info(**SMALL), max_num_batched_tokens=16, scheduling_policy=policy)
    run_some(harness)
    harness.handle(Shutdown(drain_seconds=1.0), "")
    harness.book(harness.recorder.end_all(harness.now))
    harness.recorder.close()
    again = replay(tmp_path / "j")
    assert again.difference is None and not again.cut_off and not again.redacted
    assert again.steps == len(harness.steps)
    assert again.core.totals == harness.core.totals
    assert (again.first, again.last) == (100.0, harness.now)


def test_the_journal_holds_every_message_in_and_out(tmp_path: Path) -> None:
    harness = recorded(tmp_path / "j")
    reader = Reader(tmp_path / "j")
    records = list(reader)
    reader.close()
    came = [decode(record.frame) for record in records if record.frame]
    went = [decode(content) for record in records for _, content in record.outputs or () if isinstance(content, bytes)]
    assert sum(isinstance(message, Submit) for message in came) == 36
    assert sum(isinstance(message, Step) for message in went) == len(harness.steps)
    tokens = [t for m in went if isinstance(m, Deliver) for t in m.tokens.tolist()]
    assert len(tokens) == sum(len(t) for t in harness.tokens.values())
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600


def test_progress_is_told_in_bytes_of_the_file(tmp_path: Path) -> None:
    recorded(tmp_path / "j")
    seen: list[tuple[int, int]] = []
    replay(tmp_path / "j", lambda done, size: seen.append((done, size)))
    size = (tmp_path / "j").stat().st_size
    assert seen[-1] == (size, size)


# ---- differences -------------------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Put each record through `change`."""
    reader = Reader(path)
    data = reader.header.pack() + b"".join(change(record).pack() for record in reader)
    reader.close()
    path.write_bytes(data)


def test_the_first_difference_is_shown_field_by_field(tmp_path: Path) -> None:
    recorded(tmp_path / "j")
    changed: list[int] = []

    def change(record: Record) -> Record:
        if not changed and record.outputs and isinstance(record.outputs[0][1], bytes):
            message = decode(record.outputs[0][1])
            if isinstance(message, Deliver) and len(message.tokens):
                changed.append(int(message.tokens[0]))
                other = Deliver(
                    opened=message.opened, numbers=message.numbers, tokens=message.tokens + 1, ended=message.ended
                )
                outputs = [(record.outputs[0][0], encode(other)), *record.outputs[1:]]
                return Record(record.call, record.now, record.sender, record.frame, outputs)
        return record

    rewrite(tmp_path / "j", change)
    with pytest.raises(AssertionError) as caught:
        assert_replays(tmp_path / "j")
    text = str(caught.value)
    assert "handle StepResult from 'executor'" in text
    assert f"Deliver.tokens[0]: journal {changed[0] + 1}, replay {changed[0]}" in text


def test_an_output_that_is_only_on_one_side_is_named(tmp_path: Path) -> None:
    recorded(tmp_path / "j")
    rewrite(
        tmp_path / "j",
        lambda r: Record(
            r.call, r.now, r.sender, r.frame, [] if r.outputs and r.outputs[0][0] == "executor" else r.outputs
        ),
    )
    difference = replay(tmp_path / "j").difference
    assert difference is not None and difference.call == "schedule"
    assert difference.lines == ["  output 1 is only in the replay: executor: Step"]


def test_a_failure_of_the_core_is_in_the_journal_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Recorded(tmp_path / "j")

    def broken(self: SchedulerCore, message: GetStats, now: float, sender: str) -> None:
        raise ZeroDivisionError("a defect")

    harness.core._handlers[GetStats] = broken.__get__(harness.core)
    with pytest.raises(ZeroDivisionError):
        harness.handle(GetStats(token=1))
    harness.recorder.close()
    difference = replay(tmp_path / "j").difference  # this core has no such defect
    assert difference is not None
    assert difference.lines == ["  raised nothing; in the journal the scheduler failed here"]
    monkeypatch.setattr(SchedulerCore, "_on_get_stats", broken)
    assert_replays(tmp_path / "j")


def test_a_file_that_ends_within_a_record_replays_up_to_there(tmp_path: Path) -> None:
    recorded(tmp_path / "j")
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:-5])
    again = replay(tmp_path / "j")
    assert again.difference is None and again.cut_off


@pytest.mark.parametrize("content", [b"", b"text", b"\x81\xa1a\x01", b"\xc1"])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalError, match="is no journal"):
        replay(tmp_path / "j")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 99}, "has journal version 99"),
        ({"protocol": [7, 0]}, r"protocol \[7, 0\]"),
        ({"config": {"new_setting": 1}}, "other settings: .*new_setting"),
        ({"config": {"port": -1}}, "other settings: port must be"),
    ],
)
def test_a_journal_of_another_version_is_refused(tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    header = msgpack.unpackb(Header(EngineConfig(), redacted=False).pack())
    (tmp_path / "j").write_bytes(msgpack.packb({**header, **changes}))
    with pytest.raises(JournalError, match=problem):
        replay(tmp_path / "j")


def test_a_broken_record_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(Header(EngineConfig(), redacted=False).pack() + b"\x01")
    with pytest.raises(JournalError, match="is broken at byte"):
        replay(tmp_path / "j")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="No such file"):
        replay(tmp_path / "none")


# ---- bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redact", [False, True])
def test_a_journal_is_rotated_and_both_segments_replay(tmp_path: Path, redact: bool) -> None:
    path = tmp_path / "j"
    harness = Recorded(
        path, make_info(**SMALL), max_num_batched_tokens=16, journal_max_bytes=2**16, journal_redact=redact
    )
    for _ in range(8):
        harness.keys.clear(), harness.tokens.clear(), harness.ends.clear()
        run_some(harness, rounds=1)
    harness.recorder.close()
    for segment in (path, previous(path)):
        reader = Reader(segment)
        assert reader.header.snapshot is not None and reader.header.redacted == redact
        reader.close()
        # the header with its snapshot comes on top, and the record that filled the segment
        assert segment.stat().st_size - len(reader.header.pack()) < 2**15 + 5_000
        assert_replays(segment)
    assert replay(path).core.totals == harness.core.totals
    prompt = np.arange(91, 97, dtype=np.int32).tobytes()
    assert (prompt in path.read_bytes()) is not redact


def test_what_an_earlier_life_has_left_is_kept(tmp_path: Path) -> None:
    recorded(tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    recorded(tmp_path / "j")
    assert previous(tmp_path / "j").read_bytes() == before
    assert_replays(tmp_path / "j")


def test_the_api_key_is_not_in_the_journal(tmp_path: Path) -> None:
    recorded(tmp_path / "j", api_key="secret-key")
    assert b"secret-key" not in (tmp_path / "j").read_bytes()


def test_a_full_disk_ends_the_journal_with_one_line_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Recorded(tmp_path / "j")

    def no_space(file: io.FileIO, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_writer, "_write_all", no_space)
    run_some(harness, rounds=2)
    harness.recorder.close()
    assert len(harness.ends) == 24
    assert caplog.text.count("No space left on device") == 1


def test_a_disk_that_is_slower_than_the_engine_ends_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_writer, "QUEUE_BYTES", -1)
    harness = Recorded(tmp_path / "j")
    run_some(harness, rounds=1)
    harness.recorder.close()
    assert len(harness.ends) == 12
    assert caplog.text.count("the disk is slower than the engine") == 1


def test_a_path_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="journal"):
        JournalWriter(tmp_path / "no" / "folder", b"", 100)


# ---- redaction ---------------------------------------------------------------------------------------------------


def messages_of(path: Path) -> list[object]:
    reader = Reader(path)
    found: list[object] = []
    for record in reader:
        found += [decode(record.frame)] if record.frame else []
        found += [decode(content) for _, content in record.outputs or () if isinstance(content, bytes)]
    reader.close()
    return found


def test_a_redacted_journal_replays_and_holds_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "j"
    harness = recorded(path, journal_redact=True)
    assert harness.core.totals.prefix_hits
    again = replay(path)
    assert again.difference is None and again.redacted
    assert again.core.totals == harness.core.totals
    stops = set(range(12)) | {50}
    for message in messages_of(path):
        if isinstance(message, Submit):
            assert len(message.prompt_token_ids) == 9 and (message.prompt_token_ids >= 2**30).all()
        elif isinstance(message, StepResult):
            assert all(token >= 2**30 or token in stops or token == 0 for token in message.tokens.tolist())
        elif isinstance(message, Deliver):
            assert not message.tokens.any()
            assert not any(opened.context_token_ids.any() for opened in message.opened)
        elif isinstance(message, Step):
            assert not any(admit.token_ids.any() for admit in message.admit)


def test_redaction_keeps_the_hits_on_what_was_generated_before(tmp_path: Path) -> None:
    harness = Recorded(tmp_path / "j", journal_redact=True)
    harness.submit(1, [5, 6, 7], max_tokens=12)
    harness.drain()
    harness.submit(2, [5, 6, 7, *harness.tokens[1], 8], max_tokens=3)
    harness.drain()
    harness.recorder.close()
    assert harness.core.totals.prefix_hits == 12
    assert_replays(tmp_path / "j")


def test_a_defect_of_the_redaction_ends_the_journal_not_the_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Recorded(tmp_path / "j", journal_redact=True)
    harness.recorder._redacted._handlers.clear()  # type: ignore[union-attr]
    harness.recorder._redacted.batch.in_flight = None  # type: ignore[union-attr,assignment]
    harness.submit(1, [1, 2, 3], max_tokens=3)
    harness.drain()
    harness.recorder.close()
    assert harness.ends[1].reason == "length"
    assert caplog.text.count("fed its redacted messages failed") == 1


def test_redaction_leaves_out_texts_salts_and_probabilities_and_keeps_refusals(tmp_path: Path) -> None:
    harness = Recorded(tmp_path / "j", journal_redact=True)
    harness.submit(1, [5, 6, 7], max_tokens=4, stop=("private words",), cache_salt="private salt", logprobs=1)
    harness.submit(2, [5, 100], max_tokens=4)  # outside the vocabulary
    harness.submit(3, [5], max_tokens=4, logit_bias={300: 1.0})
    harness.submit(4, [5], max_tokens=4, allowed_token_ids=(1, 300))
    harness.submit(5, [5], max_tokens=4, stop_token_ids=(300,), logit_bias={77: 1.0}, prompt_logprobs=1)
    harness.schedule()
    result = harness.device.run(harness.queue.popleft())
    column = np.arange(len(result.slots), dtype=np.int32)
    top = TopLogprobs(
        rows=column,
        counts=column * 0 + 1,
        ranks=column + 1,
        token_ids=column + 77,
        values=column.astype(np.float32) + 1,
    )
    harness.handle(
        StepResult(
            number=result.number,
            slots=result.slots,
            tokens=result.tokens,
            logprobs=top,
            prompt_logprobs=(PromptLogprobs(slot=int(result.slots[0]), top=top),),
            failed=(RowFailed(slot=int(result.slots[1]), message="private failure"),),
        ),
        "executor",
    )
    harness.drain()
    harness.recorder.close()
    assert {key: end.reason for key, end in harness.ends.items()} == {
        1: "error",
        2: "rejected",
        3: "rejected",
        4: "rejected",
        5: "length",
    }
    data = (tmp_path / "j").read_bytes()
    assert b"private" not in data
    assert replay(tmp_path / "j").difference is None
