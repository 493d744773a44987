"""How a step is cut into passes, and where its tokens stand."""

from __future__ import annotations

import numpy as np
from fast_inference.executor.layout import Pass, lay_out, passes
from hypothesis import given
from hypothesis import strategies as st


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_positions_and_places_follow_the_block_tables() -> None:
    tables = np.array([[5, 6, 0], [9, 2, 7], [1, 0, 0]], np.int32)
    work = Pass(ints(0, 1), ints(2, 1), ints(3, 6), ints(1, 4), np.array([True, False]), ints(0, 3))
    layout = lay_out(work, tables, block_size=4, row_tokens=100)
    assert layout.positions.tolist() == [3, 6, 7, 8, 9]
    assert layout.flat_tokens.tolist() == [203, 106, 107, 108, 109]
    assert layout.slot_mapping.tolist() == [1 * 4 + 3, 2 * 4 + 2, 2 * 4 + 3, 7 * 4, 7 * 4 + 1]
    assert layout.query_start.tolist() == [0, 1, 5]
    assert layout.seq_lens.tolist() == [4, 10]
    assert layout.logits_at.tolist() == [0, 1, 2, 3]  # the first row's last token, then the second's first three
    assert (layout.num_decodes, layout.max_query_len, layout.max_seq_len) == (1, 4, 10)


@given(data=st.data())
def test_passes_do_all_work_once_in_order_and_keep_few_logits(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    limit = data.draw(st.integers(1, 9))
    counts = np.sort(np.array([data.draw(st.integers(1, 30)) for _ in range(rows)]))
    starts = np.array([data.draw(st.integers(0, 9)) for _ in range(rows)])
    kept = np.array([data.draw(st.integers(0, int(c))) for c in counts])
    samples = np.array([data.draw(st.booleans()) for _ in range(rows)])
    slots = np.arange(10, 10 + rows)
    position, wanted = starts.copy(), kept.copy()
    parts = list(passes(slots, starts, counts, samples, kept, limit))
    for part in parts:
        assert part.starts.tolist() == position[part.rows].tolist()
        assert part.slots.tolist() == slots[part.rows].tolist()
        position[part.rows] += part.counts
        wanted[part.rows] -= part.prompt_counts
        # The kept ones are the first of a piece, so no later piece may have any once one has left some out.
        unfinished = part.prompt_counts < part.counts
        assert (wanted[part.rows][unfinished] == 0).all()
        assert part.prompt_counts.sum() <= limit + 2 * len(part.rows)
    assert position.tolist() == (starts + counts).tolist() and not wanted.any()
    assert [bool(p.samples.any()) for p in parts[:-1]] == [False] * (len(parts) - 1)
    last = parts[-1]
    assert last.rows.tolist() == list(range(rows)) and last.samples.tolist() == samples.tolist()
    decode = last.counts == 1
    assert (decode == (counts == 1)).all()  # decode rows stay in front
