"""The engine with its steps recorded says what transformers says, and what it says without recordings.

On a CPU a replay runs the recorded function again: the same buffers, padding and order of things as on a GPU.
`test_gpu_parity.py` asks the same of real CUDA graphs.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fast_inference import SamplingParams
from fast_inference.executor import startup

from .greedy_reference import Comparison, greedy_reference
from .one_thread_engine import OneThreadEngine
from .small_checkpoints import VOCAB_SIZE, save_checkpoint

NEW_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
SAMPLED = [
    SamplingParams(temperature=0.9, top_k=30, seed=1, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
    SamplingParams(
        temperature=0.7, frequency_penalty=0.4, seed=3, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    ),
    GREEDY,
]
rng = random.Random(8)
PROMPTS = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 16, 17, 40, 63)]

pytestmark = pytest.mark.usefixtures("one_thread")


def start(folder: Path, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> OneThreadEngine:
    """Room for less than the prompts need at their end, and prompts cut into chunks beside the decode rows."""
    with monkeypatch.context() as patch:
        patch.setattr(startup, "wants_graphs", lambda *_: graphs)
        engine = OneThreadEngine(
            str(folder),
            device="cpu",
            attention_backend="torch",
            max_num_seqs=8,
            max_num_batched_tokens=24,
            max_model_len=96,
            block_size=4,
            num_blocks=48,
        )
    if graphs:
        assert engine.record_steps() == 3 * len((1, 2, 4, 8)) + 2 * len((16, 32, 64, 96))
    return engine


@pytest.mark.parametrize("name", ["llama-untied-llama3-rope", "mistral-window", "qwen2-tied", "qwen3-wide-heads"])
def test_recorded_steps_change_no_token(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references = greedy_reference(save_checkpoint(name, tmp_path), PROMPTS, NEW_TOKENS)
    recorded = start(tmp_path, True, monkeypatch)
    comparison = Comparison()
    comparison.add(references, recorded.generate(PROMPTS, GREEDY), "cold")
    comparison.add(references, recorded.generate(PROMPTS, GREEDY), "warm")
    assert not comparison.wrong, comparison.summary()
    assert recorded.stats().preemptions > 0


def test_recorded_steps_draw_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("llama-tied", tmp_path)
    params = [SAMPLED[i % len(SAMPLED)] for i in range(len(PROMPTS))]
    recorded = start(tmp_path, True, monkeypatch).generate(PROMPTS, params)
    assert recorded == start(tmp_path, False, monkeypatch).generate(PROMPTS, params)
