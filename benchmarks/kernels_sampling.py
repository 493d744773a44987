"""Cases of the sampler's kernels, at the vocabularies of llama-8b and qwen3-0.6b.

Owns shapes, inputs and the count of bytes, which is one reading of the logits; must not know how time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from device_timing import Case, copies_beyond_l2
from fast_inference.executor.draw_columns import DrawColumns
from fast_inference.executor.random import stream_keys_tensor
from fast_inference.executor.sampler import GROUP, draw
from fast_inference.executor.step_kernels import step_kernels_unchecked
from torch import Tensor

VOCABULARIES = {"llama-8b": 128_256, "qwen3-0.6b": 151_936}
ROWS = (1, 128, 256)


@dataclass(frozen=True, slots=True)
class Wish:
    """How every row is drawn."""

    temperature: float
    top_k: int
    top_p: float


WISHES = {
    "greedy": Wish(0.0, 0, 1.0),
    "T 0.8": Wish(0.8, 0, 1.0),
    "T 0.8, top-k 50, top-p 0.95": Wish(0.8, 50, 0.95),
    "T 0.8, top-p 0.95": Wish(0.8, 0, 0.95),
}


def sampling_cases(device: torch.device, dtype: torch.dtype, tune: bool) -> Iterator[Case]:
    """All ways of drawing, for all vocabularies and numbers of rows. Logits are float32 whatever the `dtype`."""
    for model, vocab in VOCABULARIES.items():
        for rows in ROWS:
            for name, wish in WISHES.items():
                yield make_case(f"{model} {rows} rows, {name}", rows, vocab, wish, device)


def make_case(name: str, rows: int, vocab: int, wish: Wish, device: torch.device) -> Case:
    """Choosing a token for each of `rows` rows, as the end of a recorded step does."""
    size = rows * vocab * 4
    logits = list(3 * torch.randn(copies_beyond_l2(size), rows, vocab, device=device))
    slots = torch.arange(rows, device=device)
    columns = DrawColumns(
        temperature=torch.full((rows,), wish.temperature, device=device),
        top_p=torch.full((rows,), wish.top_p, device=device),
        min_p=torch.zeros(rows, device=device),
        top_k=torch.full((rows,), wish.top_k, device=device),
        seed=slots * 7,
    )
    token_ids, lengths = torch.zeros((rows, 2), dtype=torch.int32, device=device), torch.ones_like(slots)
    choose = partial(
        step_kernels_unchecked().choose,
        slots=slots,
        known=torch.ones_like(slots),
        token_ids=token_ids,
        lengths=lengths,
        scratch=rows,
        columns=columns if wish.temperature else None,
    )
    return Case(
        name,
        [partial(_tokens, choose, part) for part in logits],
        partial(_by_sorting, logits[0], torch.ones_like(slots), columns),
        size,
        0,
    )


def _tokens(choose: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    return choose(logits)[0]


def _by_sorting(logits: Tensor, lengths: Tensor, columns: DrawColumns) -> Tensor:
    """The same draw, with its cut found by sorting whole rows. Rounding may part the two once in many thousand rows."""
    random = columns.temperature > 0
    weights = ((logits - logits.amax(-1, keepdim=True)) / torch.where(random, columns.temperature, 1.0)[:, None]).exp()
    values = weights.sort(-1, descending=True).values.double()
    place = torch.arange(values.shape[1], device=values.device)
    values = torch.where((columns.top_k[:, None] == 0) | (place < columns.top_k[:, None]), values, 0)
    before = values.cumsum(-1) - values
    kept = (values > 0) & ((columns.top_p[:, None] >= 1) | (before < columns.top_p[:, None] * values.sum(-1)[:, None]))
    least = values.gather(1, kept.sum(-1)[:, None] - 1)
    weights = torch.where(weights >= least, weights, 0)
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % GROUP))
    tokens = draw(weights, stream_keys_tensor(columns.seed, lengths))
    return torch.where(random, tokens, logits.argmax(-1))
