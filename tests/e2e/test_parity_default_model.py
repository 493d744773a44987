"""Greedy parity of the default model with transformers' `generate` in float32, through the real processes.

Fifty conversations of 30 to 2,000 tokens; the engine puts the chat template on by itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fast_inference import LLM, EngineConfig, SamplingParams
from fast_inference.executor.threads import usable_cores
from fast_inference.launch.models import ModelFinder
from transformers import AutoModelForCausalLM, AutoTokenizer

from .chat_prompts import chats
from .greedy_reference import Comparison, Reference, greedy_reference

NEW_TOKENS = 24
PADDED_TOKENS = 2500  # in one batch of the reference


@pytest.fixture(scope="module")
def folder() -> str:
    return ModelFinder().find(EngineConfig(model=""), lambda progress: None).model


@pytest.fixture(scope="module")
def prompts(folder: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats()]


@pytest.fixture(scope="module")
def references(folder: str, prompts: list[list[int]]) -> list[Reference]:
    """Computed before any engine runs, so that neither slows the other down."""
    torch.set_num_threads(usable_cores())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return greedy_reference(model, prompts, NEW_TOKENS, PADDED_TOKENS)


@pytest.mark.timeout(900)  # a minute and a half on two idle cores, most of it the reference
def test_fifty_conversations_get_the_tokens_that_transformers_generates(
    folder: str, prompts: list[list[int]], references: list[Reference], record_property: Any
) -> None:
    assert len(prompts) == 50
    assert 1900 < max(len(prompt) for prompt in prompts) <= 2000
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(folder, dtype="float32") as llm:
        outputs = llm.chat(chats(), params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    comparison = Comparison()
    comparison.add(references, [output.outputs[0].token_ids for output in outputs])
    record_property("tokens_compared", comparison.tokens)
    record_property("near_ties", comparison.near_ties)
    assert not comparison.wrong, comparison.summary()
