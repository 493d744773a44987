"""What stands beside a measured cell: the least time that the card could need, and what vLLM needed on it.

Owns the arithmetic of the floors and the table of vLLM's figures (`shared/gpu/PEERS.md`: vLLM 0.26.0, 2026-11-24); must
not know how anything is measured. A floor counts the weights once a step, keys and values of every live request once a
step, both at the card's read rate, and a prompt's products at its product rate, summed: no engine reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_cells import MODELS
from workloads import Request

BYTES = 2  # of a bfloat16


@dataclass(frozen=True, slots=True)
class Card:
    """What a card does at most, as `peer_vllm.py ceilings` measured it."""

    read: float  # bytes per second of a matrix-vector product
    product: float  # floating-point operations per second of a bfloat16 matrix product


CARDS = {"H200": Card(4.31e12, 763e12), "H100": Card(2.85e12, 766e12)}

# By card, model and cell. Offline cells in the unit of `CELL_UNITS`; online ones p99 in ms of (TTFT, ITL).
VLLM: dict[str, dict[str, dict[str, float]]] = {
    "H200": {
        "llama-8b": {
            "offline": 9972, "single": 4.85, "single ttft": 11.4, "batch32": 4424, "prefill": 41630,
            "prefill1": 101, "sampled": 7317, "greedy128": 7485, "startup": 61,
            "online 8 ttft": 111, "online 16 ttft": 92, "online 32 ttft": 124,
            "online 8 itl": 36.2, "online 16 itl": 34.2, "online 32 itl": 42.8,
        },
        "qwen3-0.6b": {
            "offline": 21193, "single": 2.09, "single ttft": 14.7, "batch32": 10802, "prefill": 331743,
            "prefill1": 27.1, "sampled": 14383, "greedy128": 17725, "startup": 81,
            "online 8 ttft": 69, "online 16 ttft": 94, "online 32 ttft": 90,
            "online 8 itl": 26.1, "online 16 itl": 31.0, "online 32 itl": 30.0,
        },
    },
    "H100": {
        "llama-8b": {
            "offline": 8189, "single": 6.47, "single ttft": 18.6, "batch32": 3515, "prefill": 40584,
            "prefill1": 107, "sampled": 5798, "greedy128": 5921, "startup": 78,
            "online 8 ttft": 80, "online 16 ttft": 106, "online 32 ttft": 118,
            "online 8 itl": 30.6, "online 16 itl": 38.6, "online 32 itl": 41.2,
        },
        "qwen3-0.6b": {
            "offline": 18347, "single": 2.45, "single ttft": 13.1, "batch32": 10442, "prefill": 324723,
            "prefill1": 37.0, "sampled": 12274, "greedy128": 13902, "startup": 80,
            "online 8 ttft": 81, "online 16 ttft": 97, "online 32 ttft": 108,
            "online 8 itl": 29.5, "online 16 itl": 32.7, "online 32 itl": 36.4,
        },
    },
}  # fmt: skip

# (unit, the ratio to vLLM that issue 4 asks for at least: llama-8b, qwen3-0.6b)
FIGURES: dict[str, tuple[str, tuple[float, float] | None]] = {
    "offline": ("output tok/s", (1.05, 1.25)),
    "single": ("ms a token", (0.92, 0.60)),
    "single ttft": ("ms", (0.9, 0.6)),
    "batch32": ("output tok/s", (1.05, 1.5)),
    "prefill": ("prompt tok/s", (1.0, 1.05)),
    "prefill1": ("ms", None),
    "sampled": ("output tok/s", (1.05, 1.3)),
    "greedy128": ("output tok/s", None),
    "startup": ("s", None),  # an absolute bound: 30 s
    **{f"online {rate} ttft": ("ms p99", (1.0, 1.0)) for rate in (8, 16, 32)},
    **{f"online {rate} itl": ("ms p99", (0.8, 0.8)) for rate in (8, 16, 32)},
}
HIGHER_IS_BETTER = ("output tok/s", "prompt tok/s")
STARTUP_LIMIT = 30.0


def card_of(name: str) -> str | None:
    """The column of vLLM's table for a card that the driver calls `name`."""
    return next((card for card in CARDS if card in name), None)


def target(model: str, figure: str) -> float | None:
    """The ratio of ours to vLLM's that `figure` must reach, at least (or at most, where less is better)."""
    ratios = FIGURES[figure][1]
    return None if ratios is None else ratios[list(MODELS).index(model)]


def reached(figure: str, ratio: float, wanted: float) -> bool:
    """Whether `ratio` of ours to vLLM's is `wanted` or better."""
    return ratio >= wanted if FIGURES[figure][0] in HIGHER_IS_BETTER else ratio <= wanted


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's size comes to."""

    layer_parameters: int  # of all layers' matrices: what a prompt's token is multiplied with
    head_parameters: int  # of the output projection, which only the last token of a prompt needs
    cache_bytes: int  # of one token's keys and values
    score_operations: int  # for one token to attend to one token, in all layers

    @property
    def step_bytes(self) -> int:
        """Weights that a step reads."""
        return (self.layer_parameters + self.head_parameters) * BYTES


def shape_of(config: dict[str, Any]) -> Shape:
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    return Shape(
        layer_parameters=layers * (hidden * (2 * heads + 2 * kv_heads) * size + 3 * hidden * inner),
        head_parameters=config["vocab_size"] * hidden,
        cache_bytes=layers * 2 * kv_heads * size * BYTES,
        score_operations=layers * 4 * heads * size,
    )


def decode_seconds(shape: Shape, card: Card, lengths: Sequence[int]) -> float:
    """One decode step of requests with `lengths` tokens."""
    return (shape.step_bytes + shape.cache_bytes * sum(lengths)) / card.read


def prompt_seconds(shape: Shape, card: Card, tokens: int) -> float:
    """The products of one prompt, each token attending to itself and those before."""
    pairs = tokens * (tokens + 1) // 2
    return (2 * shape.layer_parameters * tokens + shape.score_operations * pairs) / card.product


def cell_seconds(shape: Shape, card: Card, requests: Sequence[Request]) -> float:
    """All `requests`, there at once and all in one batch; the first token of each comes with its prompt."""
    prompts = sum(prompt_seconds(shape, card, len(r.prompt_token_ids)) for r in requests)
    steps = max(r.max_tokens for r in requests) - 1
    read = shape.cache_bytes * sum(
        (r.max_tokens - 1) * len(r.prompt_token_ids) + (r.max_tokens - 1) * r.max_tokens // 2 for r in requests
    )
    return prompts + (steps * shape.step_bytes + read) / card.read
