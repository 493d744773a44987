"""Which scheduling policies there are: the built-in names, and the entry points of other packages.

Reads the names from the metadata of installed packages and imports nothing, so that any process may check a setting.
Must not know what a policy does.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from importlib.metadata import EntryPoint, entry_points

POLICY_GROUP = "fast_inference.policies"


class SchedulerPolicy(StrEnum):
    """How the scheduler orders the waiting queue (`scheduler/policies.py`)."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    MEMORY_AWARE = "memory-aware"
    SHORTEST_FIRST = "shortest-first"
    FAIR = "fair"
    DEADLINE = "deadline"


@cache  # the search path of a process is read once
def custom_policies() -> dict[str, list[EntryPoint]]:
    """Name -> the entry points that claim it (more than one is a clash)."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=POLICY_GROUP):
        claims = found.setdefault(point.name, [])
        if point.value not in [claim.value for claim in claims]:
            claims.append(point)
    return found


def known_policies() -> tuple[str, ...]:
    """Every name that `scheduling_policy` may have."""
    return tuple(dict.fromkeys((*SchedulerPolicy, *sorted(custom_policies()))))
