"""What `gpu.py` measures: the models' shapes and the cells, to the token those that vLLM was measured on.

Owns the definition of the work; must not know engines, clocks or reports. The draws and their order are those of
`shared/gpu/peer_vllm.py`, so that both engines get the same prompts and lengths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from workloads import Request

MAX_MODEL_LEN = 8192
MAX_NUM_SEQS = 256
GPU_MEMORY = 0.85
ENGINE: dict[str, Any] = {  # settings that all share: random weights, token ids, no text
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "device": "cuda",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": MAX_NUM_SEQS,
    "gpu_memory_utilization": GPU_MEMORY,
}
TOKEN_IDS = 10_000  # prompts are drawn from ids up to this one
WARM_TOKENS = 24  # output of a cell's warm-up
RATES = (8, 16, 32)  # requests a second of the online cells
ONLINE_INPUT, ONLINE_OUTPUT = 512, 128
ONLINE_SECONDS = 30.0

MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_theta": 500000.0,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "rope_theta": 1000000.0,
    },
}


@dataclass(frozen=True, slots=True)
class Cell:
    """Requests that are all there at once. `sampling`: fields of `SamplingParams` besides greedy's."""

    name: str
    requests: list[Request]
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.max_tokens for request in self.requests)

    def warm_up(self) -> Cell:
        """The same prompts with short outputs."""
        short = [Request(r.prompt_token_ids, min(r.max_tokens, WARM_TOKENS)) for r in self.requests]
        return Cell(self.name, short, self.sampling)


def mixed(count: int) -> list[Request]:
    """`count` requests of 100 to 1,024 tokens in and as many out."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, TOKEN_IDS) for _ in range(rng.randint(100, 1024))] for _ in range(count)]
    return [Request(prompt, rng.randint(100, 1024)) for prompt in prompts]


def alike(count: int, input_tokens: int, output_tokens: int, seed: int = 0) -> list[Request]:
    """`count` requests of one length."""
    rng = random.Random(seed)
    return [Request([rng.randint(0, TOKEN_IDS) for _ in range(input_tokens)], output_tokens) for _ in range(count)]


def offline_cells() -> dict[str, Cell]:
    """Every cell but the online ones, by name, in the order of vLLM's table."""
    nucleus = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    cells = (
        Cell("offline", mixed(256)),
        Cell("single", alike(1, 128, 256)),
        Cell("batch32", alike(32, 512, 256)),
        Cell("prefill", alike(16, 4096, 1)),
        Cell("prefill1", alike(1, 4096, 1)),
        Cell("sampled", mixed(128), nucleus),
        Cell("greedy128", mixed(128)),
    )
    return {cell.name: cell for cell in cells}


def first_warm_ups() -> tuple[Cell, Cell]:
    """What an engine does before anything is measured."""
    return Cell("warm-up", alike(8, 64, 16, seed=9)), Cell("warm-up", alike(256, 128, 32, seed=8))


def online_requests(rate: float, seconds: float, seed: int = 0) -> list[Request]:
    """Poisson arrivals of `rate` a second for `seconds`."""
    rng = random.Random(seed)
    arrivals: list[float] = []
    time = rng.expovariate(rate)
    while time <= seconds:
        arrivals.append(time)
        time += rng.expovariate(rate)
    return [
        Request([rng.randint(0, TOKEN_IDS) for _ in range(ONLINE_INPUT)], ONLINE_OUTPUT, arrival)
        for arrival in arrivals
    ]


@contextmanager
def shape_folder(name: str) -> Iterator[str]:
    """A model folder with a config.json and nothing else, for `--load-format dummy`."""
    with TemporaryDirectory() as folder:
        config = MODELS[name] | {"dtype": "bfloat16", "hidden_act": "silu"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder
