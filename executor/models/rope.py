"""The table of rotary positions (Su et al., 2021) and its stretchings for longer contexts.

Owns the frequencies of the kinds `default`, `linear`, `llama3` and `yarn` (Peng et al., 2023); must not know models
or config files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Rope


def rope_table(rope: Rope, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """[positions, head_dim] float32: the first half of the columns cosines, the second half sines."""
    frequencies, scale = _frequencies(rope, head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    table = torch.empty((positions, head_dim), dtype=torch.float32)
    torch.cos(angles, out=table[:, : head_dim // 2])
    torch.sin(angles, out=table[:, head_dim // 2 :])
    if scale != 1.0:
        table *= scale
    return table.to(device)


def _frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position [head_dim / 2], and the factor on cosines and sines."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / powers
    match rope.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn":
            return _yarn(rope, powers, head_dim), _yarn_scale(rope)
    raise ValueError(f"unknown rope kind {rope.kind!r}")


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """High frequencies stay, low ones are divided by the factor, those between are blended."""
    turns = rope.original_max_position / (2 * math.pi / plain)  # rotations within the original context
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * plain / rope.factor + share * plain
    stretched = torch.where(turns < rope.low_freq_factor, plain / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, plain, stretched)


def _yarn(rope: Rope, powers: Tensor, head_dim: int) -> Tensor:
    """Blend plain and divided frequencies along a ramp between two numbers of rotations."""

    def dimension_of(rotations: float) -> float:
        wavelength = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * ramp + 1.0 / powers * (1 - ramp)


def _yarn_scale(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
