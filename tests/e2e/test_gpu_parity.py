"""On a GPU: the tokens of the small native checkpoints in float32 are transformers', with CUDA graphs and without; and
in bfloat16 the log-probabilities are as near to float32's as transformers' own.

The references are computed on the CPU. `test_graph_parity.py` asks the same of recorded steps where there is no GPU.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from fast_inference import LLM, SamplingParams
from transformers import AutoModelForCausalLM, PreTrainedModel

from .greedy_reference import Comparison, greedy_reference
from .one_thread_engine import OneThreadEngine
from .small_checkpoints import NATIVE, VOCAB_SIZE, save_checkpoint

NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
LOGPROBS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
SAMPLED = [
    SamplingParams(temperature=0.9, top_k=30, seed=1, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
    GREEDY,
]
rng = random.Random(8)
LENGTHS = (1, 5, 16, 17, 40, 63, 100, 217)
PROMPTS = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
TIGHT = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 320, "block_size": 16, "num_blocks": 40}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(("backend", "graphs"), [("torch", False), ("triton", False), ("triton", True)])
def test_greedy_tokens_in_float32_are_transformers(name: str, backend: str, graphs: bool, tmp_path: Path) -> None:
    references = greedy_reference(save_checkpoint(name, tmp_path), PROMPTS, NEW_TOKENS)
    engine = OneThreadEngine(str(tmp_path), device="cuda", attention_backend=backend, enforce_eager=not graphs, **TIGHT)
    if graphs:
        engine.record_steps()
    comparison = Comparison()
    comparison.add(references, engine.generate(PROMPTS, GREEDY), "cold")
    comparison.add(references, engine.generate(PROMPTS, GREEDY), "warm")
    assert not comparison.wrong, comparison.summary()


def test_graphs_change_no_drawn_token(tmp_path: Path) -> None:
    save_checkpoint("llama-untied-llama3-rope", tmp_path)
    params = [SAMPLED[i % len(SAMPLED)] for i in range(len(PROMPTS))]
    said = []
    for eager in (True, False):
        engine = OneThreadEngine(str(tmp_path), device="cuda", attention_backend="triton", enforce_eager=eager, **TIGHT)
        if not eager:
            engine.record_steps()
        said.append(engine.generate(PROMPTS, params))
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["llama-untied-llama3-rope", "qwen3-wide-heads"])
def test_logprobs_in_bfloat16_are_as_near_to_float32_as_transformers_own(name: str, tmp_path: Path) -> None:
    exact = save_checkpoint(name, tmp_path)
    rough = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with LLM(str(tmp_path), skip_tokenizer_init=True, device="cuda", dtype="bfloat16", **TIGHT) as llm:
        outputs = llm.generate(prompts, LOGPROBS)
    ours, theirs = [], []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens, steps = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert steps is not None
        wanted, other = (forced(model, prompt, list(tokens)) for model in (exact, rough))
        said = torch.tensor([step[token].logprob for step, token in zip(steps, tokens, strict=True)])
        ours.append((said - wanted).abs())
        theirs.append((other - wanted).abs())
    assert float(torch.cat(ours).mean()) <= 1.5 * float(torch.cat(theirs).mean()) + 0.01


def forced(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The log-probability that `model` gives each of `tokens` behind `prompt`."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
