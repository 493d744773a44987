"""How many compute threads this process should use: the cores that are really there for it.

Owns that number; must not know kernels or models. Imports neither torch nor numpy, since `launch` may ask too.
"""

from __future__ import annotations

import os

from .cgroup import cpu_quota


def usable_cores() -> int:
    """Cores that this process may run on: its affinity mask, cut down to the CPU time of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    # Half a core more still pays for a thread; less than that, and the threads wait for one another.
    return cores if quota is None else max(1, min(cores, int(quota + 0.5)))
