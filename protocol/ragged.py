"""Operations on `TopLogprobs`, whose rows are ragged columns: what every actor that passes them on must do alike.

Pure functions of messages; must not know requests or sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .messages import TopLogprobs


def well_formed(top: TopLogprobs) -> bool:
    """Whether the ragged columns fit one another."""
    rows = len(top.rows)
    if len(top.counts) != rows or len(top.ranks) != rows or len(top.token_ids) != len(top.values):
        return False
    return bool((top.counts >= 0).all()) and int(top.counts.sum()) == len(top.token_ids)


def pick_rows(top: TopLogprobs, keep: NDArray[np.bool_], rename: NDArray[Any]) -> TopLogprobs | None:
    """The rows of `top` that `keep` [rows] bool marks, `rows` replaced by the `rename`d [rows] of them; None if no
    row is left."""
    if not keep.any():
        return None
    entries = np.repeat(keep, top.counts)
    return TopLogprobs(
        rows=rename[keep].astype(np.int32),
        counts=top.counts[keep],
        ranks=top.ranks[keep],
        token_ids=top.token_ids[entries],
        values=top.values[entries],
    )


def follow_rows(top: TopLogprobs, place: NDArray[np.int64]) -> TopLogprobs | None:
    """`top` for rows that moved: what was row i is row `place[i]` now, or gone where that is -1."""
    inside = (top.rows >= 0) & (top.rows < len(place))
    moved = np.where(inside, place[np.where(inside, top.rows, 0)], -1)
    return pick_rows(top, moved >= 0, moved)


def concatenated(parts: Iterable[tuple[int, TopLogprobs | None]]) -> TopLogprobs | None:
    """Records of several messages as one; each part's rows are moved by its number. None if there are none."""
    present = [(offset, top) for offset, top in parts if top is not None]
    if not present:
        return None
    if len(present) == 1 and present[0][0] == 0:  # nothing moves
        return present[0][1]
    return TopLogprobs(
        rows=np.concatenate([top.rows + np.int32(offset) for offset, top in present]),
        counts=np.concatenate([top.counts for _, top in present]),
        ranks=np.concatenate([top.ranks for _, top in present]),
        token_ids=np.concatenate([top.token_ids for _, top in present]),
        values=np.concatenate([top.values for _, top in present]),
    )
