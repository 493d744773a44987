"""How much device memory all recordings will take, from a few of them.

Owns the estimate; must not know CUDA. Recordings of one choice share their scratch memory, so the largest of each
tells that, and one more tells what each takes for itself.
"""

from __future__ import annotations

from collections.abc import Callable

from .decode_graphs import DecodeGraphs
from .sampling_columns import Choice


def bytes_of_all(graphs: DecodeGraphs, used: Callable[[], int]) -> int:
    """Make some of `graphs`, and reckon what all of them take. `used()`: bytes of the device in use by anyone."""
    smallest, largest = graphs.sizes[0], graphs.sizes[-1]
    before = used()
    for choice in Choice:
        graphs.record(choice, largest)
    between = used()
    for choice in Choice:
        graphs.record(choice, smallest)
    each = max(0, used() - between) / len(Choice)
    return max(0, between - before) + int(each * (graphs.total - len(Choice)))
