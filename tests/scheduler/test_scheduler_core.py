"""The core by message lists: what a request lives through, from its `Submit` to its one end."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fast_inference.protocol.messages import (
    Abort,
    Attach,
    Deliver,
    EngineInfo,
    ExecutorReady,
    GetStats,
    Shutdown,
    Stats,
    StepResult,
    StopFound,
)
from fast_inference.scheduler.core import Send
from fast_inference.scheduler.request import InvalidTransition, Request, RequestState

from .fake_executor import make_info, token_at
from .harness import Harness


def said(seed: int, prompt: int, count: int) -> list[int]:
    return [token_at(seed, prompt + i, 100) for i in range(count)]


def stats(harness: Harness) -> Stats:
    harness.handle(GetStats(token=5))
    message = harness.sent.pop().message
    assert isinstance(message, Stats)
    return message


def test_a_request_says_its_tokens_and_ends_by_length() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3, 4, 5], max_tokens=7)
    harness.drain()
    assert harness.tokens[1] == said(1, 5, 7)
    end = harness.ends[1]
    assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("length", 5, 7)
    assert end.arrival < end.first_scheduled < end.first_token < end.finished
    assert harness.core.idle


def test_a_request_ends_at_eos_without_a_reason_and_at_a_stop_id_with_it() -> None:
    harness = Harness()
    tokens = said(1, 5, 10)
    harness.submit(1, [1, 2, 3, 4, 5], seed=1, max_tokens=10, eos=(tokens[3],))
    harness.submit(2, [1, 2, 3, 4, 6], seed=1, max_tokens=10, stop_token_ids=(tokens[5],))
    harness.submit(3, [1, 2, 3, 4, 7], seed=1, max_tokens=10, eos=(tokens[3],), ignore_eos=True)
    harness.submit(4, [1, 2, 3, 4, 8], seed=1, max_tokens=10, stop_token_ids=(*range(200, 220), tokens[2]))
    harness.drain()
    assert (harness.ends[1].reason, harness.ends[1].stop_reason, len(harness.tokens[1])) == ("stop", None, 4)
    assert (harness.ends[2].reason, harness.ends[2].stop_reason, len(harness.tokens[2])) == ("stop", tokens[5], 6)
    assert harness.ends[3].reason == "length"
    assert (harness.ends[4].reason, harness.ends[4].stop_reason, len(harness.tokens[4])) == ("stop", tokens[2], 3)


def test_a_length_that_is_known_is_not_run_over() -> None:
    harness = Harness(run_ahead=2)
    harness.submit(1, [1, 2, 3], max_tokens=5)
    harness.drain()
    assert len(harness.steps) == 5


def test_a_stop_id_before_min_tokens_ends_nothing() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=8, min_tokens=3, stop_token_ids=(7,))
    for _ in range(5):
        harness.schedule()
        result = harness.device.run(harness.queue.popleft())
        harness.handle(dataclasses.replace(result, tokens=np.full(1, 7, np.int32)), "executor")
        if harness.ends:
            break
    assert harness.tokens[1] == [7, 7, 7, 7] and harness.ends[1].reason == "stop"


def test_what_a_step_ahead_computed_for_an_ended_request_is_thrown_away() -> None:
    harness = Harness(run_ahead=2)
    harness.submit(1, [1, 2, 3], max_tokens=50, eos=(said(1, 3, 4)[3],))
    harness.drain()
    assert len(harness.tokens[1]) == 4
    assert len(harness.steps) == 5


def test_the_blocks_of_an_ended_request_come_back_with_the_last_step_that_names_them() -> None:
    harness = Harness(run_ahead=2)
    harness.submit(1, [1, 2, 3], max_tokens=50)
    harness.step()
    harness.schedule()
    harness.handle(Abort(keys=(1,)))
    assert stats(harness).used_blocks == 2 and harness.ends[1].reason == "abort"
    harness.answer()
    assert stats(harness).used_blocks == 2
    harness.answer()
    assert stats(harness).used_blocks == 0
    assert harness.core.idle


def test_one_step_ahead_is_in_flight_by_default_and_none_with_depth_one() -> None:
    for depth in (1, 2):
        harness = Harness(run_ahead=depth)
        harness.submit(1, [1, 2, 3], max_tokens=50)
        harness.schedule()
        assert len(harness.queue) == depth


def test_a_long_prompt_is_cut_into_chunks_beside_decoding_requests() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.submit(1, [1, 2, 3], max_tokens=40)
    harness.step()
    harness.submit(2, list(range(30)), max_tokens=2)
    harness.drain()
    mixed = [step for step in harness.steps if len(step.work_slots) == 2]
    assert [step.work_counts.tolist() for step in mixed[:5]] == [[1, 7], [1, 7], [1, 7], [1, 7], [1, 2]]
    assert harness.tokens[2] == said(2, 30, 2)


def test_a_step_holds_as_many_tokens_as_the_executor_says_unless_the_settings_say_it() -> None:
    for settings, expected in (({}, [24, 24, 12]), ({"max_num_batched_tokens": 40}, [40, 20])):
        harness = Harness(info=make_info(max_num_batched_tokens=24), **settings)
        harness.submit(1, list(range(60)), max_tokens=1)
        harness.drain()
        counts = [int(step.work_counts.sum()) for step in harness.steps]
        assert counts == expected


def test_without_chunked_prefill_a_prompt_goes_whole_or_not_at_all() -> None:
    harness = Harness(max_num_batched_tokens=32, enable_chunked_prefill=False)
    harness.submit(1, list(range(20)), max_tokens=3)
    harness.submit(2, list(range(40, 60)), max_tokens=3)
    harness.submit(3, list(range(32)), max_tokens=3)
    harness.drain()
    assert harness.steps[0].work_counts.tolist() == [20]
    assert harness.steps[1].work_counts.tolist() == [1, 20]
    assert harness.ends[3].reason == "rejected" and "32 tokens" in harness.ends[3].message


def test_a_prompt_that_was_seen_is_taken_from_the_cache_but_for_its_last_token() -> None:
    harness = Harness()
    prompt = list(range(16))
    harness.submit(1, prompt, max_tokens=3)
    harness.drain()
    harness.submit(2, prompt, seed=1, max_tokens=3)
    harness.submit(3, [*prompt, 50], max_tokens=3)
    harness.drain()
    assert [harness.ends[key].cached_tokens for key in (1, 2, 3)] == [0, 12, 16]
    assert harness.tokens[2] == harness.tokens[1]
    gauges = stats(harness)
    assert (gauges.prefix_queries, gauges.prefix_hits) == (49, 28)


def test_what_was_generated_is_found_by_the_next_turn_of_a_chat() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3, 4, 5], max_tokens=20)
    harness.drain()
    harness.submit(2, [1, 2, 3, 4, 5, *harness.tokens[1], 9, 9], max_tokens=3)
    harness.drain()
    assert harness.ends[2].cached_tokens == 24


def test_another_cache_salt_or_prompt_logprobs_take_no_hit() -> None:
    harness = Harness()
    prompt = list(range(16))
    harness.submit(1, prompt, max_tokens=3)
    harness.drain()
    harness.submit(2, prompt, max_tokens=3, cache_salt="tenant")
    harness.submit(3, prompt, max_tokens=3, prompt_logprobs=1)
    harness.drain()
    assert harness.ends[2].cached_tokens == harness.ends[3].cached_tokens == 0


def test_requests_with_a_common_start_wait_a_step_for_the_one_that_computes_it() -> None:
    harness = Harness(make_info(num_blocks=200, max_model_len=64), max_num_batched_tokens=512)
    for key in range(8):
        harness.submit(key, [*range(40), key], max_tokens=2)
    harness.drain()
    assert harness.steps[0].work_counts.tolist() == [41]
    assert harness.steps[1].work_counts.tolist() == [1] * 8
    assert harness.device.computed_tokens == 41 + 7 + 8


def test_a_preempted_request_loses_nothing_that_it_has_said() -> None:
    harness = Harness(make_info(num_blocks=12), enable_prefix_caching=False)
    for key in range(4):
        harness.submit(key, [key, 1, 2], max_tokens=24)
    harness.drain()
    assert stats(harness).preemptions > 0
    for key in range(4):
        assert harness.tokens[key] == said(key, 3, 24)
    assert sum(end.preemptions for end in harness.ends.values()) == stats(harness).preemptions
    assert harness.ends[0].preemptions == 0


def test_a_resumed_request_is_no_victim_before_it_has_said_something() -> None:
    harness = Harness(make_info(num_blocks=12), enable_prefix_caching=False, run_ahead=1)
    lengths: dict[int, int] = {}
    for key in range(4):
        harness.submit(key, [key, 1, 2], max_tokens=24)
    while harness.step():
        for admit in harness.steps[-1].admit:
            assert lengths.get(admit.seed, -1) < len(admit.token_ids), "thrown out again without a new token"
            lengths[admit.seed] = len(admit.token_ids)


def test_an_abort_ends_a_waiting_a_running_and_an_unknown_request() -> None:
    harness = Harness(max_num_seqs=1)
    for key in (1, 2):
        harness.submit(key, [1, 2, 3], max_tokens=50)
    harness.step()
    harness.handle(Abort(keys=(1, 2, 77)))
    harness.handle(Abort(keys=(1,)), "another frontend")
    harness.drain()
    assert {key: end.reason for key, end in harness.ends.items()} == {1: "abort", 2: "abort"}
    assert harness.ends[2].first_scheduled == 0.0
    assert stats(harness).used_blocks == 0


def test_a_frontend_cannot_abort_what_another_submitted() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=5)
    harness.handle(Abort(keys=(1,)), "frontend-1")
    harness.drain()
    assert harness.ends[1].reason == "length"


def test_a_stop_string_found_by_the_detokenizer_frees_the_request() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=50, stop=("x",))
    harness.step()
    (number,) = harness.keys
    harness.handle(StopFound(numbers=(number, 999)), "detokenizer")
    harness.drain()
    assert harness.ends[1].reason == "stop"
    assert stats(harness).used_blocks == 0


def test_a_stream_that_nobody_reads_counts_as_aborted_however_much_it_has_said() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=50)
    harness.step()
    harness.step()
    assert harness.tokens[1]
    harness.handle(StopFound(numbers=tuple(harness.keys), reason="abort"), "detokenizer")
    harness.drain()
    assert harness.ends[1].reason == "abort" and stats(harness).finished["abort"] == 1


def test_the_detokenizer_ends_also_what_waits_for_a_frontend_that_is_gone() -> None:
    harness = Harness(max_num_seqs=1)
    harness.submit(1, [1, 2, 3], max_tokens=50)
    harness.submit(2, [1, 2, 3], max_tokens=50)
    harness.step()
    harness.handle(StopFound(numbers=(1, 2), reason="abort"), "detokenizer")
    harness.drain()
    assert harness.core.idle and harness.ends[2].reason == "abort"


def test_a_key_that_is_in_use_is_passed_over_with_a_log_line() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=5)
    harness.submit(1, [4, 5, 6], max_tokens=9)
    harness.drain()
    assert harness.tokens[1] == said(1, 3, 5)
    assert "key 1 again" in harness.logs[0].text


def test_requests_that_come_before_the_executor_wait_for_it() -> None:
    harness = Harness(ready=False)
    harness.handle(Attach(frontend="frontend-0"))
    harness.submit(1, [1, 2, 3], max_tokens=5)
    harness.submit(2, [1, 2, 3], max_tokens=5)
    harness.submit(3, [], max_tokens=5)
    harness.handle(Abort(keys=(2,)))
    harness.schedule()
    assert not harness.queue and stats(harness).waiting == 2
    harness.handle(ExecutorReady(info=harness.info), "executor")
    assert harness.sent.pop() == Send("frontend-0", harness.info)
    harness.drain()
    assert {key: end.reason for key, end in harness.ends.items()} == {1: "length", 2: "abort", 3: "rejected"}


def test_after_a_restart_of_the_executor_every_stream_goes_on_where_it_was() -> None:
    harness = Harness()
    for key in range(3):
        harness.submit(key, [key, 2, 3], max_tokens=20)
    for _ in range(6):
        harness.step()
    harness.schedule()
    harness.replace_device(harness.info)
    harness.drain()
    for key in range(3):
        assert harness.tokens[key] == said(key, 3, 20)


def test_a_restarted_executor_with_less_room_fails_what_does_not_fit_it() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=40)
    harness.submit(2, [1, 2, 3], max_tokens=9)
    harness.step()
    harness.replace_device(make_info(num_blocks=5))
    harness.drain()
    assert harness.ends[1].reason == "error" and "11 blocks" in harness.ends[1].message
    assert harness.tokens[2] == said(2, 3, 9)


def test_gaps_between_decode_steps_are_added_up() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=5)
    for gap in (None, 0.25, 0.5):
        harness.schedule()
        result = harness.device.run(harness.queue.popleft())
        harness.handle(dataclasses.replace(result, gap_seconds=gap), "executor")
    assert (stats(harness).gaps, stats(harness).gap_seconds) == (2, 0.75)


def test_results_that_belong_to_no_step_are_passed_over_with_a_log_line() -> None:
    harness = Harness()
    none = np.empty(0, np.int32)
    harness.handle(StepResult(number=3, slots=none, tokens=none), "executor")
    harness.submit(1, [1, 2, 3], max_tokens=5)
    harness.schedule()
    harness.handle(StepResult(number=99, slots=none, tokens=none), "executor")
    harness.drain()
    assert harness.tokens[1] == said(1, 3, 5)
    assert len(harness.logs) == 2


def test_a_message_that_is_not_for_the_scheduler_is_passed_over_with_a_log_line() -> None:
    harness = Harness()
    harness.handle(Deliver())
    assert "Deliver" in harness.logs[0].text


def test_after_shutdown_nothing_new_is_taken_and_what_runs_goes_on() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=5)
    harness.handle(Shutdown(drain_seconds=1.0))
    harness.submit(2, [1, 2, 3], max_tokens=5)
    harness.drain()
    assert harness.ends[1].reason == "length"
    assert (harness.ends[2].reason, harness.ends[2].code) == ("rejected", "overloaded")


def test_the_end_of_the_engine_ends_every_request() -> None:
    harness = Harness(max_num_seqs=1)
    for key in (1, 2):
        harness.submit(key, [1, 2, 3], max_tokens=50)
    harness.step()
    harness.book(harness.core.end_all(harness.now))
    assert {end.reason for end in harness.ends.values()} == {"abort"} and len(harness.ends) == 2


def test_statistics_tell_blocks_fragmentation_and_ends() -> None:
    harness = Harness(run_ahead=1)
    harness.submit(1, [1, 2, 3, 4, 5], max_tokens=4)
    harness.submit(2, [9], max_tokens=50)
    harness.schedule()
    gauges = stats(harness)
    assert (gauges.token, gauges.running, gauges.waiting, gauges.num_blocks, gauges.used_blocks) == (5, 2, 0, 64, 3)
    assert gauges.utilization == pytest.approx(3 / 64)
    assert gauges.fragmentation == pytest.approx(6 / 12)
    for _ in range(10):
        harness.step()
    gauges = stats(harness)
    assert gauges.finished == {"stop": 0, "length": 1, "abort": 0, "rejected": 0, "error": 0}
    assert gauges.cached_blocks + gauges.free_blocks + gauges.used_blocks == 64
    assert (gauges.prompt_tokens, gauges.generation_tokens) == (6, 4 + len(harness.tokens[2]))


def test_more_rows_than_a_step_may_hold_take_turns() -> None:
    harness = Harness(max_num_batched_tokens=3, run_ahead=1)
    for key in range(7):
        harness.submit(key, [key, 1], max_tokens=6)
    harness.drain()
    assert all(end.reason == "length" for end in harness.ends.values())


def test_a_move_that_no_life_goes_raises_with_the_story() -> None:
    harness = Harness()
    harness.submit(1, [1, 2, 3], max_tokens=5)
    request: Request = next(iter(harness.core.queue.requests()))
    with pytest.raises(InvalidTransition, match=r"'r1'.* from WAITING to PREEMPTED; its story: WAITING at 100"):
        request.move(RequestState.PREEMPTED, 101.0)


def test_a_smaller_batch_of_the_executor_counts() -> None:
    harness = Harness(make_info(max_num_seqs=2))
    for key in range(5):
        harness.submit(key, [key, 1], max_tokens=6)
    harness.drain()
    assert max(len(step.work_slots) for step in harness.steps) == 2


def test_rows_grow_beyond_their_first_width() -> None:
    harness = Harness(make_info(num_blocks=300, block_size=4, max_model_len=1100))
    harness.submit(1, [1] * 250, max_tokens=600)
    harness.drain()
    assert harness.tokens[1] == said(1, 250, 600)


def test_the_engines_info_reaches_a_frontend_that_comes_late() -> None:
    harness = Harness()
    harness.handle(Attach(frontend="frontend-3"), "frontend-3")
    sent = harness.sent.pop()
    assert sent.to == "frontend-3" and isinstance(sent.message, EngineInfo)
