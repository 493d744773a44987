"""Whole models on the Triton kernels, in the interpreter: the greedy tokens are those of transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from ..checkpoints import SMALL, load, make_checkpoint, prompt, reference_tokens
from ..step_driver import Sequences

pytest.importorskip("triton")

from fast_inference.executor.backends.triton import TritonBackend

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: tests/e2e has this parity on it"),
]

TINY = SMALL | {"num_hidden_layers": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY, head_dim=24),
    "mistral_window": MistralConfig(**TINY, sliding_window=24),
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, head_dim=32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_the_kernels_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    reference = make_checkpoint(FAMILIES[family], tmp_path)
    prompts = [prompt(40, 1), prompt(1, 2)]
    tokens = Sequences(load(tmp_path, TritonBackend())).generate(prompts, new=2, chunk=32)
    assert tokens == [reference_tokens(reference, ids, 2) for ids in prompts]
