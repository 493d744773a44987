"""The layout of weights that linear.c reads: panels of 32 output features.

Owns the order of numbers in memory; must not know how they are multiplied. In a panel, unit after unit, 32 bits of each
of its features lie side by side, so that a panel is read once, from its first byte to its last.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 32  # as in element.h


def _column_order(values: Tensor) -> Tensor:
    """[panels * 32, ...] -> [panels, 2, 16, ...]: the two vectors of each panel (see `columns` in element.h)."""
    panels = values.shape[0] // PANEL
    if values.dtype is torch.bfloat16:
        return values.view(panels, PANEL // 2, 2, *values.shape[1:]).transpose(1, 2)
    return values.view(panels, 2, PANEL // 2, *values.shape[1:])


def pack_weight(weight: Tensor) -> Tensor:
    """`weight` [out, in], bfloat16 or float32 -> int32 [panels, units, 32], a unit being 32 bits of one row."""
    rows = -(-weight.shape[0] // PANEL) * PANEL
    unit = 4 // weight.element_size()
    width = -(-weight.shape[1] // unit) * unit
    padded = weight.new_zeros(rows, width)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    columns = _column_order(padded)
    return columns.view(torch.int32).permute(0, 3, 1, 2).contiguous().view(rows // PANEL, width // unit, PANEL)


def pack_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`bias` [out] -> float32 [panels * 32] in the column order of a weight of `dtype`."""
    padded = bias.new_zeros(-(-bias.shape[0] // PANEL) * PANEL, dtype=dtype)
    padded[: bias.shape[0]] = bias
    return _column_order(padded).float().contiguous().view(-1)
