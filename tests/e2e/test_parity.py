"""Greedy parity, token for token, with transformers' `generate` in float32.

Every small family goes through the whole matrix (chunks, prefix cache, preemption, running ahead, kernels) with the
engine on one thread, and once through the real processes with all of it at work at once. The default model answers
fifty conversations through the real processes.

Where transformers' own two best logits are closer than 1e-4 the token may differ, and that request is compared no
further; how many did is recorded as the property `near_ties`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from fast_inference import LLM, SamplingParams

from .greedy_reference import Comparison, Reference, greedy_reference
from .one_thread_engine import OneThreadEngine
from .small_checkpoints import NATIVE, THROUGH_TRANSFORMERS, VOCAB_SIZE, save_checkpoint

NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
LENGTHS = (1, 2, 7, 15, 16, 17, 33, 64, 100, 150, 217, 300)
SHARED = 70  # tokens that the last prompts have in common with the longest one
LONGEST = max(LENGTHS) + NEW_TOKENS
TIGHT = {"block_size": 4, "num_blocks": 100}  # 400 tokens, of more than a thousand that the prompts have together


def make_prompts() -> list[list[int]]:
    """Mixed lengths, in no order; some share their beginning with another one."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    prompts += [prompts[-1][:SHARED] + [rng.randrange(3, VOCAB_SIZE) for _ in range(own)] for own in (1, 6, 30)]
    rng.shuffle(prompts)
    return prompts


PROMPTS = make_prompts()
pytestmark = pytest.mark.usefixtures("one_thread")
Checkpoint = tuple[str, list[Reference]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A small checkpoint by name: its folder and what transformers says to `PROMPTS`. Made once."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = save_checkpoint(name, folder)
            made[name] = str(folder), greedy_reference(model, PROMPTS, NEW_TOKENS)
        return made[name]

    return make


def agree(comparison: Comparison, record_property: Callable[[str, object], None]) -> None:
    record_property("tokens_compared", comparison.tokens)
    record_property("near_ties", comparison.near_ties)
    assert not comparison.wrong, comparison.summary()


@pytest.mark.parametrize("name", [*NATIVE, *THROUGH_TRANSFORMERS])
@pytest.mark.parametrize(("run_ahead", "kernels"), [(1, "auto"), (2, "torch")])
def test_chunks_of_sixteen_with_a_cold_and_a_warm_prefix_cache_change_no_token(
    name: str, run_ahead: int, kernels: str, checkpoint: Any, record_property: Any
) -> None:
    folder, references = checkpoint(name)
    engine = OneThreadEngine(
        folder, max_num_batched_tokens=16, num_blocks=400, block_size=8, run_ahead=run_ahead, attention_backend=kernels
    )
    comparison = Comparison()
    comparison.add(references, engine.generate(PROMPTS, GREEDY), "cold")
    hits = engine.stats().prefix_hits
    comparison.add(references, engine.generate(PROMPTS, GREEDY), "warm")
    known = sum(len(prompt) for prompt in PROMPTS)
    assert engine.stats().prefix_hits - hits > known * 0.9, "the second time the prompts must come from the cache"
    agree(comparison, record_property)


@pytest.mark.parametrize("name", [*NATIVE, *THROUGH_TRANSFORMERS])
@pytest.mark.parametrize("run_ahead", [1, 2])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_requests_that_are_preempted_for_lack_of_blocks_say_the_same(
    name: str, run_ahead: int, prefix_cache: bool, checkpoint: Any, record_property: Any
) -> None:
    folder, references = checkpoint(name)
    engine = OneThreadEngine(
        folder,
        max_num_batched_tokens=64,
        max_model_len=LONGEST,
        run_ahead=run_ahead,
        enable_prefix_caching=prefix_cache,
        **TIGHT,
    )
    comparison = Comparison()
    comparison.add(references, engine.generate(PROMPTS, GREEDY))
    record_property("preemptions", engine.stats().preemptions)
    assert engine.stats().preemptions > 0
    agree(comparison, record_property)


@pytest.mark.parametrize("name", [*NATIVE, *THROUGH_TRANSFORMERS])
def test_whole_prompts_in_one_step_say_the_same_together_and_alone(
    name: str, checkpoint: Any, record_property: Any
) -> None:
    folder, references = checkpoint(name)
    engine = OneThreadEngine(folder, max_num_batched_tokens=4096, num_blocks=200, enable_prefix_caching=False)
    comparison = Comparison()
    comparison.add(references, engine.generate(PROMPTS, GREEDY), "together")
    comparison.add(references, engine.generate(PROMPTS, GREEDY, together=False), "alone")
    agree(comparison, record_property)


@pytest.mark.parametrize("name", [*NATIVE, *THROUGH_TRANSFORMERS])
def test_the_real_processes_say_the_same_chunked_cached_and_preempted(
    name: str, checkpoint: Any, record_property: Any
) -> None:
    folder, references = checkpoint(name)
    comparison = Comparison()
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        threads=1,
        max_num_batched_tokens=16,
        max_model_len=LONGEST,
        run_ahead=2,
        **TIGHT,
    ) as llm:
        for passage in ("cold", "warm"):
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            comparison.add(references, [output.outputs[0].token_ids for output in outputs], passage)
        stats = llm.get_stats()
    record_property("preemptions", stats.preemptions)
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    agree(comparison, record_property)
