"""What goes to the detokenizer: rows of log-probabilities picked out, and two `Deliver`s made one.

Pure functions of messages; must not know requests or sockets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.messages import Deliver, TopLogprobs


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


def well_formed(top: TopLogprobs) -> bool:
    """Whether the ragged columns fit one another."""
    rows = len(top.rows)
    if len(top.counts) != rows or len(top.ranks) != rows or len(top.token_ids) != len(top.values):
        return False
    return bool((top.counts >= 0).all()) and int(top.counts.sum()) == len(top.token_ids)


def merge(first: Deliver, second: Deliver) -> Deliver:
    """One message with the effect of `first`, then `second`."""
    return Deliver(
        opened=first.opened + second.opened,
        numbers=np.concatenate((first.numbers, second.numbers)),
        tokens=np.concatenate((first.tokens, second.tokens)),
        logprobs=_joined(first.logprobs, second.logprobs, len(first.numbers)),
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        ended=first.ended + second.ended,
    )


def _joined(first: TopLogprobs | None, second: TopLogprobs | None, offset: int) -> TopLogprobs | None:
    if second is None:
        return first
    shifted = second.rows + np.int32(offset)
    if first is None:
        return TopLogprobs(
            rows=shifted,
            counts=second.counts,
            ranks=second.ranks,
            token_ids=second.token_ids,
            values=second.values,
        )
    return TopLogprobs(
        rows=np.concatenate((first.rows, shifted)),
        counts=np.concatenate((first.counts, second.counts)),
        ranks=np.concatenate((first.ranks, second.ranks)),
        token_ids=np.concatenate((first.token_ids, second.token_ids)),
        values=np.concatenate((first.values, second.values)),
    )
