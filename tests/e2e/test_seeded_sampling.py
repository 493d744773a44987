"""A sampled token is a function of (seed, position): company, chunks, preemption and running ahead change nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_inference import LLM, SamplingParams

from .one_thread_engine import OneThreadEngine
from .small_checkpoints import VOCAB_SIZE, save_checkpoint

NEW_TOKENS = 20
LENGTHS = (3, 17, 40, 41, 90, 130)
LONGEST = max(LENGTHS) + NEW_TOKENS

rng = random.Random(9)
PROMPTS = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
# One way of sampling per prompt, so that the rows of a batch differ in theirs.
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.0, "logit_bias": {7: 2.0}, "top_k": 50, "top_p": 0.8},
)


def params(seed: int) -> list[SamplingParams]:
    """For each of `PROMPTS`, its own way and a seed of its own."""
    return [
        SamplingParams(**way, seed=seed + row, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        for row, way in enumerate(WAYS)
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("llama")
    save_checkpoint("llama-untied-llama3-rope", path)
    return str(path)


@pytest.fixture(scope="module")
def alone(folder: str) -> list[list[int]]:
    """Each request by itself, its prompt in one step."""
    return OneThreadEngine(folder, num_blocks=100, run_ahead=1).generate(PROMPTS, params(1), together=False)


def test_another_seed_gives_other_tokens(folder: str, alone: list[list[int]]) -> None:
    other = OneThreadEngine(folder, num_blocks=100, run_ahead=1).generate(PROMPTS, params(100), together=False)
    assert all(a != b for a, b in zip(alone, other, strict=True))


def test_a_batch_samples_what_each_of_its_requests_samples_alone(folder: str, alone: list[list[int]]) -> None:
    assert OneThreadEngine(folder, num_blocks=100).generate(PROMPTS, params(1)) == alone


def test_the_order_of_arrival_changes_no_sampled_token(folder: str, alone: list[list[int]]) -> None:
    backwards = OneThreadEngine(folder, num_blocks=100).generate(PROMPTS[::-1], params(1)[::-1])
    assert backwards[::-1] == alone


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_chunks_and_a_warm_prefix_cache_change_no_sampled_token(
    folder: str, run_ahead: int, alone: list[list[int]]
) -> None:
    engine = OneThreadEngine(folder, max_num_batched_tokens=16, block_size=8, num_blocks=200, run_ahead=run_ahead)
    assert engine.generate(PROMPTS, params(1)) == alone
    assert engine.generate(PROMPTS, params(1)) == alone
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_a_preempted_request_goes_on_with_the_tokens_it_would_have_had(
    folder: str, run_ahead: int, alone: list[list[int]]
) -> None:
    tight = {"block_size": 4, "num_blocks": 60, "max_model_len": LONGEST, "enable_prefix_caching": False}
    engine = OneThreadEngine(folder, max_num_batched_tokens=64, run_ahead=run_ahead, **tight)
    assert engine.generate(PROMPTS, params(1)) == alone
    assert engine.stats().preemptions > 0


def test_the_real_processes_sample_the_same(folder: str, alone: list[list[int]]) -> None:
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with LLM(folder, skip_tokenizer_init=True, dtype="float32", threads=1, num_blocks=100) as llm:
        outputs = llm.generate(prompts, params(1), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == alone
