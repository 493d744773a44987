"""From rows of work to the arrays that a model wants: pure arithmetic on numpy.

Owns how a step is cut into passes of the model, and where each token of a pass stands. Must not know tensors,
parameters or messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that go through the model together. All arrays [B]."""

    rows: Int  # index of each in the step's work
    slots: Int
    starts: Int  # index of the first token to compute
    counts: Int
    samples: NDArray[np.bool_]
    prompt_counts: Int  # the first so many of its tokens have their logits kept, for prompt logprobs

    def only(self, i: int) -> Pass:
        """Row i alone."""
        part = slice(i, i + 1)
        return Pass(
            self.rows[part],
            self.slots[part],
            self.starts[part],
            self.counts[part],
            self.samples[part],
            self.prompt_counts[part],
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the T tokens of a pass stand, request after request."""

    positions: Int  # [T]
    flat_tokens: Int  # [T] slot * row_tokens + position: where the token's id is
    slot_mapping: Int  # [T] block * block_size + offset: where its keys go
    query_start: NDArray[np.int32]  # [B + 1]
    seq_lens: NDArray[np.int32]  # [B]
    logits_at: Int  # [M] first the last token of each row that samples, then the prompt positions, row by row
    num_decodes: int
    max_query_len: int
    max_seq_len: int


def passes(
    slots: Int, starts: Int, counts: Int, samples: NDArray[np.bool_], prompt_counts: Int, limit: int
) -> Iterator[Pass]:
    """Cut a step so that no pass keeps the logits of more than `limit` prompt positions.

    A row that would go over first sends its tokens through alone, `limit` at a time; its last two go with the others
    (two, not one: decode rows must stay in front). What a row has in its arrays is [B], as `Pass` says.
    """
    starts, counts, prompt_counts = starts.copy(), counts.copy(), prompt_counts.copy()
    left = limit
    for row in np.flatnonzero(prompt_counts).tolist():
        here = np.array([row])
        while prompt_counts[row] > left and counts[row] > 2:
            piece = np.minimum(limit, counts[here] - 2)
            kept = np.minimum(piece, prompt_counts[here])
            yield Pass(here, slots[here], starts[here], piece, np.zeros(1, np.bool_), kept)
            starts[row] += piece[0]
            counts[row] -= piece[0]
            prompt_counts[row] -= kept[0]
        left -= int(prompt_counts[row])
    yield Pass(np.arange(len(slots)), slots, starts, counts, samples, prompt_counts)


def lay_out(work: Pass, tables: NDArray[np.int32] | None, block_size: int, row_tokens: int) -> Layout:
    """The layout of one pass.

    `tables` [slots, blocks]: the block tables; None for a model without keys, which gets every mapping as 0.
    """
    counts, starts = work.counts, work.starts
    ends = np.cumsum(counts)
    firsts = ends - counts
    total = int(ends[-1])
    if total == len(counts):  # all decode
        positions, slots = starts, work.slots
    else:
        positions = np.arange(total) - np.repeat(firsts - starts, counts)
        slots = np.repeat(work.slots, counts)
    if tables is None:
        slot_mapping = np.zeros(total, np.int64)
    else:
        block, offset = np.divmod(positions, block_size)
        slot_mapping = tables[slots, block].astype(np.int64) * block_size + offset
    query_start = np.zeros(len(counts) + 1, np.int32)
    query_start[1:] = ends
    seq_lens = starts + counts
    logits_at = (ends - 1)[work.samples]
    if work.prompt_counts.any():
        kept = [np.arange(f, f + n) for f, n in zip(firsts.tolist(), work.prompt_counts.tolist(), strict=True) if n]
        logits_at = np.concatenate([logits_at, *kept])
    longer = np.flatnonzero(counts > 1)
    return Layout(
        positions=positions,
        flat_tokens=slots * row_tokens + positions,
        slot_mapping=slot_mapping,
        query_start=query_start,
        seq_lens=seq_lens.astype(np.int32),
        logits_at=logits_at,
        num_decodes=int(longer[0]) if len(longer) else len(counts),
        max_query_len=int(counts.max()),
        max_seq_len=int(seq_lens.max()),
    )
