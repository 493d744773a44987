"""Preemption with host memory behind it, and prompts served from there: what is copied, when, and what it spares."""

from __future__ import annotations

import pytest
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.protocol.messages import Abort, EngineInfo, GetStats, Stats
from fast_inference.scheduler.swap import CopyRate, Rates

from .fake_executor import make_info, token_at
from .harness import Harness

COPY, COMPUTE = Rates(prefill=1.0, copy=1e12), Rates(prefill=1e12, copy=1.0)  # what is cheaper


def engine(host: int = 40, blocks: int = 12) -> EngineInfo:
    return make_info(num_blocks=blocks, num_host_blocks=host, block_bytes=1024)


def crowded(mode: str, *, run_ahead: int = 1, prefix: bool = False, rates: Rates = COPY, host: int = 40) -> Harness:
    """Four requests that have no room together."""
    harness = Harness(
        engine(host),
        rates=rates,
        preemption=mode,
        kv_offloading_size=1.0,
        run_ahead=run_ahead,
        enable_prefix_caching=prefix,
    )
    for key in range(4):
        harness.submit(key, [key, 1, 2], max_tokens=24)
    harness.drain()
    for key in range(4):
        assert harness.tokens[key] == [token_at(key, 3 + i, 100) for i in range(24)]
    return harness


def stats(harness: Harness) -> Stats:
    harness.handle(GetStats(token=0))
    message = harness.sent.pop().message
    assert isinstance(message, Stats)
    return message


@pytest.mark.parametrize("prefix", [False, True])
def test_a_swapped_request_goes_on_where_it_was(prefix: bool) -> None:
    harness = crowded("swap", prefix=prefix)
    counts = stats(harness)
    assert counts.preemptions == counts.swap_preemptions > 0
    assert counts.swapped_in_blocks > 0
    # every prompt token once, and every generated one but the last of each request: nothing twice
    assert harness.device.computed_tokens == 4 * (3 + 23)
    assert counts.host_used_blocks == 0


@pytest.mark.parametrize("run_ahead", [2, 3])
def test_running_ahead_a_swap_loses_at_most_the_tokens_of_the_steps_in_flight(run_ahead: int) -> None:
    harness = crowded("swap", run_ahead=run_ahead)
    counts = stats(harness)
    assert counts.swap_preemptions > 0
    assert harness.device.computed_tokens <= 4 * (3 + 23) + counts.preemptions * (run_ahead - 1)


def test_recompute_copies_nothing_out_for_a_victim() -> None:
    harness = crowded("recompute")
    counts = stats(harness)
    assert counts.preemptions > 0
    assert counts.swap_preemptions == counts.swapped_out_blocks == counts.swapped_in_blocks == 0
    assert harness.device.computed_tokens > 4 * (3 + 23)


def test_auto_takes_what_is_cheaper_by_the_rates() -> None:
    copied, computed = crowded("auto", rates=COPY), crowded("auto", rates=COMPUTE)
    assert stats(copied).swap_preemptions == stats(copied).preemptions > 0
    assert stats(computed).swap_preemptions == 0 < stats(computed).preemptions


def test_auto_compares_the_way_there_and_back_with_the_tokens_that_would_be_lost() -> None:
    # three blocks of 1,024 bytes hold 10 tokens, the last of which is computed anew in any case: 9 would be lost
    for copy, swapped in ((3 * 2 * 1024 / 9 * 1.01, 1), (3 * 2 * 1024 / 9 * 0.99, 0)):
        harness = Harness(
            engine(),
            rates=Rates(prefill=1.0, copy=copy),
            kv_offloading_size=1.0,
            run_ahead=1,
            max_num_seqs=1,
            enable_prefix_caching=False,
            scheduling_policy="priority",
        )
        harness.submit(1, list(range(9)), max_tokens=9)
        harness.step()
        harness.submit(2, [1, 2], max_tokens=2, priority=5)
        harness.drain()
        assert (stats(harness).preemptions, stats(harness).swap_preemptions) == (1, swapped)


def test_where_the_host_has_no_room_the_victim_is_computed_again() -> None:
    harness = crowded("swap", host=1)
    counts = stats(harness)
    assert counts.preemptions > counts.swap_preemptions
    assert counts.host_blocks == 1 and counts.host_used_blocks == 0


def test_a_prompt_with_logprobs_is_computed_again() -> None:
    harness = Harness(engine(), rates=COPY, preemption="swap", kv_offloading_size=1.0, run_ahead=1)
    for key in range(4):
        harness.submit(key, [key, 1, 2], max_tokens=24, prompt_logprobs=1)
    harness.drain()
    assert stats(harness).preemptions > 0 == stats(harness).swap_preemptions


def test_the_abort_of_a_swapped_request_frees_what_it_saved() -> None:
    harness = Harness(engine(), rates=COPY, preemption="swap", kv_offloading_size=1.0, enable_prefix_caching=False)
    for key in range(4):
        harness.submit(key, [key, 1, 2], max_tokens=24)
    while harness.core.batch is None or not harness.core.batch.host.saved:
        assert harness.step()
    assert stats(harness).host_used_blocks > 0
    harness.handle(Abort(keys=(3,)))
    assert harness.ends[3].reason == "abort" and not harness.core.batch.host.saved
    while harness.queue:
        harness.answer()
    harness.step()  # which carries the copies, if those in flight did not
    while harness.queue:
        harness.answer()
    assert stats(harness).host_used_blocks == 0


def test_a_new_executor_finds_nothing_in_host_memory() -> None:
    harness = Harness(engine(), rates=COPY, preemption="swap", kv_offloading_size=1.0, enable_prefix_caching=False)
    for key in range(4):
        harness.submit(key, [key, 1, 2], max_tokens=24)
    while harness.core.batch is None or not harness.core.batch.host.saved:
        assert harness.step()
    harness.replace_device(harness.info)
    assert stats(harness).host_used_blocks == 0
    harness.drain()
    for key in range(4):
        assert harness.tokens[key] == [token_at(key, 3 + i, 100) for i in range(24)]


def test_a_block_that_is_brought_half_filled_serves_no_hits() -> None:
    harness = Harness(
        engine(),
        rates=COPY,
        preemption="swap",
        kv_offloading_size=1.0,
        run_ahead=1,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        scheduling_policy="priority",
    )
    harness.submit(1, list(range(9)), max_tokens=2)
    harness.step()
    harness.submit(2, [50], max_tokens=1, priority=5)
    harness.step()
    harness.step()
    assert stats(harness).swapped_in_blocks == 1, "the first is back, with two tokens of its first block"
    harness.submit(3, [*range(9), 60], max_tokens=2, priority=6)
    harness.drain()
    assert harness.ends[3].cached_tokens == 0
    assert stats(harness).swap_preemptions == 2


def served_again(rates: Rates) -> Harness:
    """A prompt, then others that push it out of the device's cache, then the same once more."""
    harness = Harness(engine(blocks=9), rates=rates, kv_offloading_size=1.0)
    first = list(range(20, 37))
    harness.submit(0, first, seed=5, max_tokens=3)
    harness.drain()
    for key in (1, 2):
        harness.submit(key, [key] * 30, max_tokens=3)
        harness.drain()
    harness.submit(3, first, seed=5, max_tokens=3)
    harness.drain()
    assert harness.tokens[3] == harness.tokens[0]
    return harness


def test_a_prefix_that_fell_out_of_the_device_comes_back_from_the_host_if_that_is_cheaper() -> None:
    harness = served_again(COPY)
    assert harness.ends[3].cached_tokens == 16 == stats(harness).host_hits
    assert stats(harness).swapped_in_blocks == 4
    computed = served_again(COMPUTE)
    assert computed.ends[3].cached_tokens == 0 == stats(computed).host_hits


def test_the_same_prefix_twice_at_once_is_copied_in_once_and_shared() -> None:
    harness = served_again(COPY)
    before = stats(harness).swapped_in_blocks
    harness.submit(4, [4] * 30, max_tokens=3)
    harness.drain()
    for key in (5, 6):
        harness.submit(key, [*range(20, 37), key], seed=key, max_tokens=3)
    harness.drain()
    assert 0 < stats(harness).swapped_in_blocks - before <= 4, "one copy of each block"
    assert harness.ends[5].cached_tokens == harness.ends[6].cached_tokens == 16


def test_the_copy_rate_is_measured_and_forgets() -> None:
    rate = CopyRate()
    assert rate.rate is None
    rate.observe(0, 1.0)
    rate.observe(100, 0.0)
    assert rate.rate is None
    rate.observe(1000, 1.0)
    assert rate.rate == 1000.0
    for _ in range(200):
        rate.observe(4000, 1.0)
    assert rate.rate == pytest.approx(4000.0, rel=0.01)


def test_swapping_without_host_memory_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="kv_offloading_size must be more than 0"):
        Harness(preemption="swap")
