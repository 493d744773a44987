"""Priorities that preempt: how soon the urgent are served, and that the others are served too."""

from __future__ import annotations

import random

import pytest

from .fake_executor import make_info, token_at
from .harness import Harness


def prefill_step(harness: Harness, key: int) -> int:
    """The index of the step that admitted `key` first."""
    return next(i for i, step in enumerate(harness.steps) if any(admit.seed == key for admit in step.admit))


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_when_every_slot_is_taken_the_very_next_step_prefills_the_urgent_request(run_ahead: int) -> None:
    harness = Harness(scheduling_policy="priority", max_num_seqs=4, run_ahead=run_ahead)
    for key in range(8):
        harness.submit(key, [key, 1], max_tokens=60)
    for _ in range(7):
        harness.step()
    harness.schedule()
    before = len(harness.steps)
    harness.submit(9, [9] * 10, max_tokens=3, priority=2)
    while not harness.tokens.get(9):
        assert harness.step()
    assert prefill_step(harness, 9) == before
    harness.drain()
    assert all(harness.tokens[key] == [token_at(key, 2 + i, 100) for i in range(60)] for key in range(8))


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_when_blocks_are_short_too_it_is_prefilled_no_more_than_two_steps_later(run_ahead: int, seed: int) -> None:
    """Victims' blocks come back with the steps in flight; rows that grow meanwhile don't take them away again."""
    draw = random.Random(seed)
    info = make_info(num_blocks=draw.randrange(24, 40), max_num_seqs=8, max_model_len=90)
    harness = Harness(info, scheduling_policy="priority", run_ahead=run_ahead, enable_prefix_caching=False)
    for key in range(20):
        harness.submit(key, [key] * draw.randrange(3, 14), max_tokens=draw.randrange(20, 70))
    for _ in range(draw.randrange(4, 30)):
        harness.step()
    harness.schedule()
    before = len(harness.steps)
    harness.submit(99, [99] * draw.randrange(8, 60), max_tokens=3, priority=2)
    while not harness.tokens.get(99):
        assert harness.step()
    assert prefill_step(harness, 99) - before <= 2
    assert harness.ends.get(99) is None or harness.ends[99].preemptions == 0
    harness.drain()
    assert len(harness.ends) == 21 and {end.reason for end in harness.ends.values()} == {"length"}


@pytest.mark.parametrize("policy", ["priority", "shortest-first", "fair", "memory-aware", "deadline", "fcfs"])
def test_nobody_waits_for_ever_behind_an_endless_stream_that_goes_first(policy: str) -> None:
    harness = Harness(scheduling_policy=policy, max_num_seqs=2, run_ahead=2)
    harness.submit(0, [0] * 40, max_tokens=40, priority=0, client="slow")
    key = 0
    while 0 not in harness.ends:
        key += 1
        assert key < 2500, "starved"
        harness.submit(key, [1, key % 50], max_tokens=3, priority=3, client=f"client {key % 3}", deadline_ms=300)
        harness.now += 0.1
        harness.step()
        harness.step()
    assert len(harness.tokens[0]) == 40


def test_shortest_first_serves_the_least_work_first_and_the_long_one_in_time() -> None:
    harness = Harness(scheduling_policy="shortest-first", max_num_seqs=1)
    for key, prompt, output in ((1, 40, 60), (2, 4, 3), (3, 40, 3), (4, 4, 60)):
        harness.submit(key, [key] * prompt, max_tokens=output)
    harness.drain()
    assert [admit.seed for step in harness.steps for admit in step.admit] == [2, 3, 4, 1]


def test_shortest_first_learns_how_long_outputs_are() -> None:
    harness = Harness(scheduling_policy="shortest-first", max_num_seqs=1)
    for key in range(40):
        stop = token_at(key, 4 + 3, 100)
        harness.submit(key, [key] * 4, max_tokens=100, stop_token_ids=(stop,))
    harness.drain()
    start = len(harness.steps)
    harness.submit(100, [1] * 60, max_tokens=9)  # little to say, but much to read
    harness.submit(101, [2] * 4, max_tokens=100)  # nobody has said so much lately
    harness.drain()
    assert [admit.seed for step in harness.steps[start:] for admit in step.admit] == [101, 100]
