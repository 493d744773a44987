"""Sizes of grids and tiles, for launchers. Triton's own functions for it are made for its kernels too, and cost a
launcher some microseconds a call: as much as a tenth of what an eager step needs.
"""

from __future__ import annotations


def tiles_of(size: int, tile: int) -> int:
    """How many tiles of `tile` hold `size`."""
    return -(-size // tile)


def power_of_two(size: int) -> int:
    """The least one that is `size`, at least 1, or more."""
    return 1 << (size - 1).bit_length()
