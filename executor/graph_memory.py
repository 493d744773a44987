"""How much device memory all recordings will take, from a few of them.

Owns the estimate; must not know CUDA. Recordings share their scratch memory, so the largest of each kind tell that, and
the smallest tell what each takes for itself.
"""

from __future__ import annotations

from collections.abc import Callable

from .recordings import Recordings


def bytes_of_all(recordings: Recordings, used: Callable[[], int]) -> int:
    """Make some of `recordings`, and reckon what all of them take. `used()`: bytes of the device in use by anyone."""
    total, smallest, largest = recordings.total, recordings.ends(min), recordings.ends(max)
    before = used()
    for key in largest:
        recordings.record(key)
    between = used()
    smallest = [key for key in smallest if key not in largest]
    for key in smallest:
        recordings.record(key)
    each = max(0, used() - between) / max(1, len(smallest))
    return max(0, between - before) + int(each * (total - len(largest)))
