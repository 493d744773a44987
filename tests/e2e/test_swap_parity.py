"""Greedy parity with blocks on the way to host memory and back: the text of a request that was preempted by swap, or by
recompute, or whose prompt came from the host's prefix cache, is the text without.

The engine runs on one thread, and the rates that it would measure are given, so that what is copied and what is
computed is settled beforehand.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from fast_inference import SamplingParams
from fast_inference.scheduler.swap import Rates

from .greedy_reference import Comparison, Reference, greedy_reference
from .one_thread_engine import OneThreadEngine
from .small_checkpoints import VOCAB_SIZE, save_checkpoint

CHECKPOINTS = ("llama-untied-llama3-rope", "qwen2-window", "gpt2")
NEW_TOKENS = 14
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
LENGTHS = (1, 7, 16, 17, 33, 64, 75, 90, 100)
SHARED = 41  # tokens that the last prompts have in common with the longest one
TIGHT = {"block_size": 4, "num_blocks": 64, "max_num_batched_tokens": 48}  # 256 tokens, of about 800 together
COPY, COMPUTE = Rates(prefill=1.0, copy=1e15), Rates(prefill=1e15, copy=1.0)  # what is cheaper
AMPLE = 0.02  # GiB: more blocks than the prompts have together


def make_prompts() -> list[list[int]]:
    """Mixed lengths, in no order; some share their beginning with another one."""
    rng = random.Random(7)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    prompts += [prompts[-1][:SHARED] + [rng.randrange(3, VOCAB_SIZE) for _ in range(own)] for own in (2, 30)]
    rng.shuffle(prompts)
    return prompts


PROMPTS = make_prompts()
Checkpoint = tuple[str, list[Reference]]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small checkpoint: its folder and what transformers says to `PROMPTS`."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_checkpoint(request.param, folder)
    return str(folder), greedy_reference(model, PROMPTS, NEW_TOKENS, padded_tokens=1000)


def compare(checkpoint: Checkpoint, passages: int = 1, **options: Any) -> OneThreadEngine:
    """Generate for all prompts together, `passages` times, and hold every token against the reference."""
    folder, references = checkpoint
    engine = OneThreadEngine(folder, **{**TIGHT, "max_model_len": max(LENGTHS) + NEW_TOKENS, **options})
    comparison = Comparison()
    for passage in range(passages):
        comparison.add(references, engine.generate(PROMPTS, GREEDY), f"passage {passage}")
    assert not comparison.wrong, comparison.summary()
    return engine


@pytest.mark.parametrize("run_ahead", [1, 2])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_requests_that_were_swapped_out_say_the_same(
    checkpoint: Checkpoint, run_ahead: int, prefix_cache: bool
) -> None:
    engine = compare(
        checkpoint,
        run_ahead=run_ahead,
        enable_prefix_caching=prefix_cache,
        preemption="swap",
        kv_offloading_size=AMPLE,
        rates=COPY,
    )
    stats = engine.stats()
    assert stats.swap_preemptions == stats.preemptions > 0
    assert stats.swapped_out_blocks > 0 and stats.swapped_in_blocks > 0
    assert stats.host_used_blocks == 0


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_requests_that_were_computed_again_beside_a_host_pool_say_the_same(
    checkpoint: Checkpoint, run_ahead: int
) -> None:
    engine = compare(checkpoint, run_ahead=run_ahead, preemption="recompute", kv_offloading_size=AMPLE, rates=COMPUTE)
    stats = engine.stats()
    assert stats.preemptions > 0 == stats.swap_preemptions
    assert stats.swapped_in_blocks == 0


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_prompts_that_are_served_from_host_memory_say_the_same(checkpoint: Checkpoint, run_ahead: int) -> None:
    engine = compare(checkpoint, passages=2, run_ahead=run_ahead, kv_offloading_size=AMPLE, rates=COPY)
    stats = engine.stats()
    assert stats.host_hits > 0 and stats.swapped_in_blocks > 0


def test_a_small_host_pool_that_is_full_most_of_the_time_changes_no_token(checkpoint: Checkpoint) -> None:
    block_bytes = compare(checkpoint).info.block_bytes
    engine = compare(
        checkpoint, passages=2, preemption="swap", kv_offloading_size=5.5 * block_bytes / 2**30, rates=COPY
    )
    assert engine.info.num_host_blocks == 5 == engine.stats().host_blocks
    assert engine.stats().swapped_out_blocks > 0
