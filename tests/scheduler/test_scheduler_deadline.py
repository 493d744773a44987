"""The `deadline` policy: who is served in time, who goes behind, who is refused. All times are made up."""

from __future__ import annotations

import random

import pytest
from fast_inference.protocol.messages import Step

from .fake_executor import make_info
from .harness import Harness

BASE, PER_TOKEN, PER_ROW = 0.01, 0.0005, 0.0005


def cost(step: Step) -> float:
    counts = step.work_counts
    return BASE + PER_TOKEN * int(counts[counts > 1].sum()) + PER_ROW * int((counts == 1).sum())


def timed(policy: str = "deadline", **config: object) -> Harness:
    info = make_info(num_blocks=512, block_size=16, max_model_len=1024, max_num_seqs=64)
    settings = {"run_ahead": 1, "enable_prefix_caching": False, "max_num_batched_tokens": 512, **config}
    return Harness(info, cost=cost, scheduling_policy=policy, **settings)


def taught(policy: str = "deadline", **config: object) -> Harness:
    """A harness whose step model has seen prompts of several lengths and decoding."""
    harness = timed(policy, **config)
    for i in range(12):
        harness.submit(-1 - i, [i] * (20 + 40 * i), max_tokens=3 + i)
        for _ in range(3):
            harness.step()
    harness.drain()
    return harness


def test_the_earliest_deadline_goes_first_and_requests_without_one_by_their_age() -> None:
    harness = timed(max_num_seqs=1)
    for key, deadline in ((1, None), (2, 9000), (3, 500), (4, 4000)):
        harness.submit(key, [key, 1], max_tokens=2, deadline_ms=deadline)
    harness.drain()
    assert [admit.seed for step in harness.steps for admit in step.admit] == [3, 4, 2, 1]


def test_what_can_not_be_met_any_more_does_not_hold_up_what_can() -> None:
    harness = timed(max_num_seqs=1)
    harness.submit(1, [1, 1], max_tokens=30)
    harness.step()
    harness.submit(2, [2] * 20, max_tokens=30, deadline_ms=100)  # past when the slot is free
    harness.submit(3, [3] * 20, max_tokens=2, deadline_ms=400)
    harness.drain()
    assert harness.ends[3].first_token - harness.ends[3].arrival < 0.4
    assert harness.ends[2].first_token > harness.ends[3].first_token
    assert harness.ends[2].reason == "length"


def test_a_deadline_that_can_not_be_met_is_refused_with_the_seconds_that_are_missing() -> None:
    harness = taught()
    for key in range(5):
        harness.submit(key, [key] * 500, max_tokens=4)
    harness.submit(9, [9] * 500, max_tokens=4, deadline_ms=100)
    end = harness.ends[9]
    assert end.reason == "rejected" and end.code == "deadline_unreachable" and end.param == "deadline_ms"
    assert "deadline_ms must be at least" in end.message and "got 100" in end.message
    alone = BASE + 500 * PER_TOKEN
    assert end.retry_after == pytest.approx(alone - 0.1, rel=0.05)  # those without a deadline go behind it
    harness.submit(10, [9] * 500, max_tokens=4, deadline_ms=350)
    assert 10 not in harness.ends
    harness.submit(11, [9] * 500, max_tokens=4, deadline_ms=360)  # behind number 10
    assert harness.ends[11].reason == "rejected"
    harness.drain()
    assert harness.ends[10].first_token - harness.ends[10].arrival <= 0.35


def test_the_time_that_is_told_is_one_at_which_the_deadline_can_be_met() -> None:
    harness = taught()
    for key in range(4):
        harness.submit(key, [key] * 500, max_tokens=1, deadline_ms=1150)
    harness.submit(9, [9] * 500, max_tokens=4, deadline_ms=1200)
    retry_after = harness.ends[9].retry_after
    assert retry_after is not None and 0.05 < retry_after < 0.2
    until = harness.now + retry_after
    while harness.now < until and harness.step():
        pass
    harness.submit(10, [9] * 500, max_tokens=4, deadline_ms=1200)
    assert 10 not in harness.ends


def test_the_wait_for_a_slot_counts_as_well_once_outputs_have_been_seen() -> None:
    harness = taught(max_num_seqs=2)
    for key in range(40):
        harness.submit(1000 + key, [key] * 4, max_tokens=100)
    harness.drain()
    for key in (1, 2):
        harness.submit(key, [key] * 20, max_tokens=100)
    for _ in range(10):
        harness.step()
    # both slots are free again after some 90 steps of 11 ms, if these outputs are as long as the last ones
    harness.submit(3, [3] * 20, max_tokens=4, deadline_ms=500)
    harness.submit(4, [4] * 20, max_tokens=4, deadline_ms=1500)
    assert 0.3 < (harness.ends[3].retry_after or 0.0) < 0.7
    assert 4 not in harness.ends
    harness.drain()
    assert harness.ends[4].first_token - harness.ends[4].arrival <= 1.5


def test_nothing_is_refused_before_the_model_has_seen_enough() -> None:
    harness = timed()
    harness.submit(1, [1] * 500, max_tokens=4, deadline_ms=1)
    assert 1 not in harness.ends
    harness.drain()
    assert harness.ends[1].reason == "length"


def test_a_cached_prompt_is_not_counted_as_work() -> None:
    harness = taught(enable_prefix_caching=True)
    harness.submit(1, [7] * 500, max_tokens=2)
    harness.drain()
    harness.submit(2, [7] * 500, max_tokens=2, deadline_ms=50)
    assert 2 not in harness.ends
    harness.drain()
    assert harness.ends[2].first_token - harness.ends[2].arrival <= 0.05


def test_a_stream_of_urgent_requests_holds_back_nobody_for_ever() -> None:
    harness = timed(max_num_seqs=1)
    harness.submit(0, [1, 2], max_tokens=2)
    key = 0
    while 0 not in harness.ends:
        key += 1
        assert key < 3000, "starved"
        harness.submit(key, [1, key % 90], max_tokens=2, deadline_ms=200)
        harness.now += 0.05
        harness.step()
    assert harness.ends[0].finished - harness.ends[0].arrival < 120


def met(policy: str, load: float) -> int:
    """Requests whose first token came in time, of 90 that come at `load` times what can be served."""
    draw = random.Random(7)
    harness = taught(policy, max_num_seqs=4)
    arrivals, at = [], harness.now
    for key in range(90):
        at += draw.expovariate(load / 0.145)  # a request takes about 0.145 s of the device, four at a time
        arrivals.append((at, key, draw.randrange(20, 400), draw.randrange(5, 40), draw.choice([300, 600, 1200])))
    deadlines = {key: deadline / 1000 for _, key, _, _, deadline in arrivals}
    while arrivals or not harness.core.idle:
        if arrivals and (arrivals[0][0] <= harness.now or harness.core.idle):
            at, key, prompt, output, deadline = arrivals.pop(0)
            harness.now = max(harness.now, at)
            harness.submit(key, [key % 90] * prompt, max_tokens=output, deadline_ms=deadline)
        else:
            harness.step()
    ends = [harness.ends[key] for key in deadlines]
    return sum(bool(e.first_token) and e.first_token - e.arrival <= deadlines[k] for k, e in enumerate(ends))


@pytest.mark.parametrize("load", [1.0, 1.5, 3.0])
def test_more_deadlines_are_met_than_by_order_of_arrival_at_every_load_over_saturation(load: float) -> None:
    in_order, by_deadline = met("fcfs", load), met("deadline", load)
    assert by_deadline > in_order
