"""`max_step_ms`: prompts are cut so that the running streams don't stall. The steps' costs are made up here."""

from __future__ import annotations

import pytest
from fast_inference.protocol.messages import Step

from .fake_executor import make_info, token_at
from .harness import Harness

BASE, PER_TOKEN, PER_ROW = 0.004, 0.0005, 0.0002


def cost(step: Step) -> float:
    counts = step.work_counts
    return BASE + PER_TOKEN * int(counts[counts > 1].sum()) + PER_ROW * int((counts == 1).sum())


def bounded(**config: object) -> Harness:
    """A harness whose step model has seen some prompts beside some decoding."""
    info = make_info(num_blocks=400, block_size=8, max_model_len=1200, max_num_seqs=16)
    harness = Harness(info, cost=cost, max_num_batched_tokens=600, enable_prefix_caching=False, **config)
    for i in range(10):
        harness.submit(-1 - i, [i] * (16 + 7 * i), max_tokens=4 + i)
        for _ in range(3):
            harness.step()
    harness.drain()
    return harness


def longest(harness: Harness, first: int) -> float:
    return max(cost(step) for step in harness.steps[first:])


def long_prompt_beside_streams(harness: Harness) -> int:
    """Four streams, then a prompt of 1,000 tokens. Returns the number of steps sent before it came."""
    for key in range(4):
        harness.submit(key, [key, 1], max_tokens=60)
    for _ in range(4):
        harness.step()
    before = len(harness.steps)
    harness.submit(9, [9] * 1000, max_tokens=5)
    harness.drain()
    assert harness.tokens[9] == [token_at(9, 1000 + i, 100) for i in range(5)]
    return before


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_long_prompt_is_cut_so_that_no_step_passes_the_bound(run_ahead: int, policy: str) -> None:
    free = bounded(run_ahead=run_ahead, scheduling_policy=policy)
    assert longest(free, long_prompt_beside_streams(free)) > 0.25
    cut = bounded(run_ahead=run_ahead, scheduling_policy=policy, max_step_ms=40.0)
    before = long_prompt_beside_streams(cut)
    assert longest(cut, before) <= 0.040 * 1.02
    # and no more than it takes: its chunks come near the bound
    assert len(cut.steps) - before < 80


def test_the_preset_for_latency_sets_a_bound_and_says_so() -> None:
    harness = bounded(latency=True)
    assert longest(harness, long_prompt_beside_streams(harness)) <= 0.050 * 1.02
    assert [log.text for log in harness.logs] == ["prompts are cut so that a step stays under 50 ms"]


def test_a_bound_that_no_step_can_keep_leaves_a_block_of_progress() -> None:
    harness = bounded(max_step_ms=0.5)
    before = len(harness.steps)
    harness.submit(9, [9] * 80, max_tokens=2)
    harness.drain()
    chunks = [int(step.work_counts.max()) for step in harness.steps[before:]]
    assert chunks[:10] == [8] * 10


def test_before_anything_was_seen_nothing_is_cut() -> None:
    info = make_info(num_blocks=400, block_size=8, max_model_len=1200)
    harness = Harness(info, cost=cost, max_num_batched_tokens=600, max_step_ms=10.0)
    harness.submit(1, [1] * 500, max_tokens=2)
    harness.step()
    assert int(harness.steps[0].work_counts[0]) == 500


def test_an_urgent_prompt_keeps_the_bound_as_well() -> None:
    harness = bounded(scheduling_policy="priority", max_step_ms=40.0)
    for key in range(16):
        harness.submit(key, [key, 1], max_tokens=80)
    for _ in range(6):
        harness.step()
    before = len(harness.steps)
    harness.submit(99, [99] * 300, max_tokens=2, priority=5)
    harness.drain()
    assert any(admit.seed == 99 for admit in harness.steps[before].admit)
    assert longest(harness, before) <= 0.040 * 1.02
