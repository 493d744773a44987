"""How tokens are drawn at random, as columns on the device.

Owns their names and types; must not know whose they are: those of all slots, of the rows of a step, or of some rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DrawColumns(NamedTuple):
    """[N] each. Temperature 0 takes the likeliest."""

    temperature: Tensor  # float32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    top_k: Tensor  # int64, 0: all
    seed: Tensor  # int64
