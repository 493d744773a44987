"""Where a request's time has gone: spans that add up exactly, each with its reason."""

from __future__ import annotations

import math

import pytest
from fast_inference.protocol.messages import Abort, GetTimeline, SequenceTimeline, Timeline, TimelineSpan
from fast_inference.scheduler import stories
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fake_executor import make_info
from .harness import Harness
from .test_scheduler_histories import Sequence, engines, play, sequences


def ask(harness: Harness, *names: str) -> tuple[SequenceTimeline, ...]:
    harness.sent.clear()
    harness.handle(GetTimeline(token=5, request_ids=names))
    answer = harness.sent.pop().message
    assert isinstance(answer, Timeline) and answer.token == 5
    return answer.sequences


def story(harness: Harness, key: int) -> SequenceTimeline:
    (found,) = ask(harness, f"r{key}")
    return found


def kinds(told: SequenceTimeline) -> list[str]:
    return [span.kind for span in told.spans]


def span(told: SequenceTimeline, kind: str) -> TimelineSpan:
    (found,) = (span for span in told.spans if span.kind == kind)
    return found


def check(told: SequenceTimeline) -> None:
    """The spans lie end to end from arrival to the end."""
    assert told.spans[0].start == told.arrival and told.spans[-1].end == told.finished
    for before, after in zip(told.spans, told.spans[1:], strict=False):
        assert before.end == after.start
    for part in told.spans:
        assert part.end >= part.start
        if part.causes:
            assert math.isclose(sum(part.causes.values()), part.end - part.start, rel_tol=1e-6, abs_tol=1e-6)


def test_a_request_alone_is_prefilled_and_decodes() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3, 4, 5], max_tokens=4)
    harness.drain()
    told = story(harness, 1)
    check(told)
    assert kinds(told) == ["executor busy", "prefill", "decode"]
    assert span(told, "prefill").tokens == 5
    assert (told.reason, told.prompt_tokens, told.completion_tokens, told.preemptions) == ("length", 5, 4, 0)
    assert told.finished - told.arrival == harness.ends[1].finished - harness.ends[1].arrival


def test_who_comes_while_the_device_is_busy_waits_for_the_executor() -> None:
    harness = Harness(run_ahead=1)
    harness.submit(1, [1, 2], max_tokens=9)
    harness.schedule()
    harness.submit(2, [3, 4], max_tokens=2)
    harness.now += 2.5
    harness.answer()
    harness.schedule()
    told = story(harness, 2)
    assert kinds(told) == ["executor busy"] and told.spans[0].end - told.spans[0].start == 2.5
    assert told.reason == ""


def test_without_a_free_slot_the_first_waits_for_one_and_the_others_behind_it() -> None:
    harness = Harness(max_num_seqs=1)
    for key in (1, 2, 3):
        harness.submit(key, [1, 2], max_tokens=4)
    harness.drain()
    second, third = story(harness, 2), story(harness, 3)
    check(second)
    check(third)
    assert kinds(second) == ["executor busy", "no slot", "prefill", "decode"]
    assert kinds(third) == ["executor busy", "behind", "no slot", "prefill", "decode"]
    behind = span(third, "behind")
    assert behind.other == "r2" and behind.passed == 2
    assert list(behind.causes) == ["no slot"]


def test_without_blocks_it_says_how_many_were_wanted() -> None:
    harness = Harness(make_info(num_blocks=6))
    harness.submit(1, [1] * 9, max_tokens=9)
    harness.submit(2, [2] * 13, max_tokens=3)
    harness.drain()
    told = story(harness, 2)
    check(told)
    blocks = span(told, "no blocks")
    assert (blocks.wanted, blocks.there) == (4, 3)


def test_a_full_step_is_a_matter_of_the_token_budget() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.submit(1, [1] * 10, max_tokens=2)
    harness.submit(2, [2] * 3, max_tokens=2)
    harness.drain()
    assert kinds(story(harness, 2)) == ["executor busy", "token budget", "prefill", "decode"]


def test_a_prompt_that_begins_alike_waits_for_the_prefix() -> None:
    harness = Harness(run_ahead=1)
    harness.submit(1, [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=2)
    harness.submit(2, [1, 2, 3, 4, 5, 6, 7, 8, 7], max_tokens=2)
    harness.drain()
    told = story(harness, 2)
    check(told)
    assert "prefix" in kinds(told)
    assert span(told, "prefill").tokens == 1 and told.cached_tokens == 8


def preempted_harness() -> Harness:
    harness = Harness(make_info(num_blocks=8), enable_prefix_caching=False)
    harness.submit(1, [1] * 8, max_tokens=20)
    harness.submit(2, [2] * 8, max_tokens=20)
    harness.drain()
    return harness


def test_a_preemption_says_by_whom_and_what_was_lost() -> None:
    told = story(preempted_harness(), 2)
    check(told)
    assert told.preemptions == 1
    out = span(told, "preempted")
    assert out.other == "r1" and out.tokens >= 8
    assert kinds(told)[-2:] == ["recompute", "decode"]
    assert span(told, "recompute").tokens > 8


def test_a_request_with_priority_is_named_by_the_one_it_pushed_out() -> None:
    harness = Harness(max_num_seqs=1, scheduling_policy="priority")
    harness.submit(1, [1, 2], max_tokens=20, priority=0)
    for _ in range(4):
        harness.step()
    harness.submit(2, [3, 4], max_tokens=3, priority=5)
    harness.drain()
    told = story(harness, 1)
    check(told)
    assert span(told, "preempted").other == "r2"


def test_a_lost_executor_shows() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=9)
    for _ in range(3):
        harness.step()
    harness.now += 5.0
    harness.replace_device(make_info())
    harness.drain()
    told = story(harness, 1)
    check(told)
    assert kinds(told) == ["executor busy", "prefill", "decode", "lost", "recompute", "decode"]


def test_who_comes_before_the_executor_is_ready_waits_for_its_start() -> None:
    harness = Harness(ready=False)
    harness.submit(1, [1, 2], max_tokens=2)
    harness.now += 7.0
    harness.replace_device(make_info())
    harness.drain()
    told = story(harness, 1)
    check(told)
    assert span(told, "starting").end - told.arrival == 7.0


def test_an_abort_in_the_queue_and_a_refusal_are_stories_too() -> None:
    harness = Harness(max_num_seqs=1)
    harness.submit(1, [1, 2], max_tokens=9)
    harness.submit(2, [1, 2], max_tokens=9)
    harness.step()
    harness.handle(Abort(keys=(2,)))
    harness.submit(3, [], max_tokens=9)
    assert story(harness, 2).reason == "abort"
    check(story(harness, 2))
    refused = story(harness, 3)
    assert refused.reason == "rejected" and refused.spans == () and refused.arrival == refused.finished


def test_the_sequences_of_one_request_are_told_together_and_an_unknown_one_is_none() -> None:
    harness = Harness()
    harness.submit(1, [1, 2], max_tokens=2)
    harness.submit(2, [1, 2], max_tokens=9)
    harness.step()
    for request in harness.core._streams:
        request.request_id = f"cmpl-x-{request.key}"
    assert [told.request_id for told in ask(harness, "x", "cmpl-x")] == ["cmpl-x-1", "cmpl-x-2"]
    assert [told.request_id for told in ask(harness, "cmpl-x-2")] == ["cmpl-x-2"]
    assert ask(harness, "unknown", "cmpl") == ()


def test_only_the_last_ended_requests_are_remembered_unless_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "REMEMBERED", 3)
    harness = Harness()
    harness.core.stories = stories.Stories()
    harness.core.stories.followed = frozenset({"r1"})
    harness.core.stories._ended = stories.deque(maxlen=3)
    for key in range(6):
        harness.submit(key, [1, 2], max_tokens=1)
        harness.drain()
    assert [len(ask(harness, f"r{key}")) for key in range(6)] == [0, 1, 0, 1, 1, 1]


def test_a_clock_that_is_set_back_gives_no_negative_span() -> None:
    harness = Harness()
    harness.submit(1, [1, 2], max_tokens=5)
    harness.step()
    harness.now -= 50.0
    harness.drain()
    told = story(harness, 1)
    assert all(part.end >= part.start for part in told.spans)
    assert told.spans[-1].end == told.finished


def test_over_many_requests_with_preemptions_the_parts_are_the_whole() -> None:
    harness = Harness(make_info(num_blocks=24), max_num_batched_tokens=32)
    for key in range(200):
        harness.submit(key, [key % 7] * (5 + key % 9), max_tokens=10 + key % 15)
        if key % 3 == 0:
            harness.step()
    harness.drain()
    assert harness.core.totals.preemptions >= 10
    for key in range(200):
        told, end = story(harness, key), harness.ends[key]
        check(told)
        whole = end.finished - end.arrival
        assert math.isclose(sum(part.end - part.start for part in told.spans), whole, rel_tol=1e-9)
        assert told.preemptions == end.preemptions == kinds(told).count("preempted") + kinds(told).count("lost")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sequences, min_size=1, max_size=8), engines, st.lists(st.booleans(), max_size=40))
def test_in_every_history_the_spans_lie_end_to_end(
    work: list[Sequence], engine: dict[str, object], answers: list[bool]
) -> None:
    harness = play(work, engine, answers)
    for key in range(len(work)):
        told = story(harness, key)
        if told.spans:
            check(told)
        assert told.arrival == harness.ends[key].arrival and told.finished == harness.ends[key].finished


def test_what_was_swapped_out_comes_back_as_such() -> None:
    info = make_info(num_blocks=8, num_host_blocks=16, block_bytes=1024)
    harness = Harness(info, enable_prefix_caching=False, preemption="swap", kv_offloading_size=1.0)
    harness.submit(1, [1] * 8, max_tokens=20)
    harness.submit(2, [2] * 8, max_tokens=20)
    harness.drain()
    told = story(harness, 2)
    check(told)
    assert span(told, "swapped").other == "r1"
    assert "swap in" in kinds(told) and "recompute" not in kinds(told)
