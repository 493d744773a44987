"""Log-probabilities between their ragged columns on the wire and one record per token.

Pure. Owns `TokenLogprobs`; must not know HTTP shapes, sockets or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..protocol.messages import TopLogprobs
from ..protocol.ragged import pick_rows
from .outputs import Logprob


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: entry 0 is the token itself, the others are the likeliest ones, best first."""

    rank: int
    token_ids: list[int]
    values: list[float]
    texts: list[str]

    def chosen(self) -> tuple[int, str, float]:
        """Token id, text and log-probability of the token itself."""
        return self.token_ids[0], self.texts[0], self.values[0]

    def top(self, count: int) -> list[tuple[int, str, float]]:
        """The `count` likeliest tokens, best first."""
        return list(zip(self.token_ids, self.texts, self.values, strict=True))[1 : count + 1]

    def by_token(self) -> dict[int, Logprob]:
        """vLLM's form: token id -> `Logprob`, the token itself first."""
        out = {self.token_ids[0]: Logprob(self.values[0], self.rank, self.texts[0])}
        for place in range(1, len(self.token_ids)):
            token = self.token_ids[place]
            if token not in out:
                out[token] = Logprob(self.values[place], place, self.texts[place])
        return out


def by_row(top: TopLogprobs, texts: list[str]) -> dict[int, TokenLogprobs]:
    """Row number -> its record. `texts` are the decoded entries of `top.token_ids`, in parallel; where they are
    missing (no tokenizer) every text is ""."""
    ids, values = top.token_ids.tolist(), top.values.tolist()
    if len(texts) != len(ids):
        texts = [""] * len(ids)
    out: dict[int, TokenLogprobs] = {}
    at = 0
    for row, count, rank in zip(top.rows.tolist(), top.counts.tolist(), top.ranks.tolist(), strict=True):
        end = at + count
        if count:
            out[row] = TokenLogprobs(rank, ids[at:end], values[at:end], texts[at:end])
        at = end
    return out


def select(top: TopLogprobs, texts: list[str], keep: NDArray[np.bool_]) -> tuple[TopLogprobs | None, list[str]]:
    """The records of those rows for which `keep[row]` is true, numbered anew as if the others had never been."""
    chosen = keep[top.rows]
    part = pick_rows(top, chosen, (np.cumsum(keep) - 1)[top.rows])
    if part is None or len(texts) != len(top.token_ids):
        return part, []
    return part, [texts[i] for i in np.flatnonzero(np.repeat(chosen, top.counts)).tolist()]


def prompt_positions(
    length: int, top: list[tuple[TopLogprobs, list[str]]], decode: Callable[[int], str] | None = None
) -> list[TokenLogprobs | None]:
    """One record per prompt position from the parts that came; None where there is none (position 0).

    `decode` gives the text of a token where a part came without texts.
    """
    out: list[TokenLogprobs | None] = [None] * length
    for part, texts in top:
        if not texts and decode is not None:
            texts = [decode(token) for token in part.token_ids.tolist()]
        for position, record in by_row(part, texts).items():
            if 0 < position < length:
                out[position] = record
    return out
