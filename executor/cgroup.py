"""What the control group that holds this process allows it: CPU time and memory, version 1 and 2 alike.

Owns the reading of `/proc/self/cgroup` and the files it points to; must not know who asks. A limit that no file
names is no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def cpu_quota(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> float | None:
    """Cores' worth of CPU time that every enclosing group allows, None without a limit."""
    quotas = []
    for folder in _folders("cpu", membership, mount):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        # "max" and -1 are no limit
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> int | None:
    """Bytes that the tightest enclosing group may hold, None without a limit."""
    return min((limit for limit, _ in _memory(membership, mount)), default=None)


def memory_left(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> int | None:
    """Bytes that this process can still allocate before an enclosing group is full, None without a limit.

    File pages in use count against a group, but those it has not touched lately are given back on demand.
    """
    return min((max(0, limit - used) for limit, used in _memory(membership, mount)), default=None)


def _memory(membership: Path, mount: Path) -> Iterator[tuple[int, int]]:
    for folder in _folders("memory", membership, mount):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        # version 1 writes "no limit" as the largest multiple of a page
        if limit and used and limit[0].isdigit() and int(limit[0]) < 1 << 60:
            words = _words(folder / "memory.stat")
            counts = dict(zip(words[::2], words[1::2], strict=False))
            idle = int(counts.get("total_inactive_file") or counts.get("inactive_file") or 0)
            yield int(limit[0]), max(0, int(used[0]) - idle)


def _folders(controller: str, membership: Path, mount: Path) -> Iterator[Path]:
    """The group of this process for `controller` and the groups around it, inside out."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no control groups here
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            roots = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            roots = [mount / controllers, mount / controller]
        else:
            continue
        for root in roots:
            folder = root / group.lstrip("/")
            # Inside a container the path may be the host's, while the mount shows the container's own group.
            for candidate in [folder, *folder.parents]:
                if candidate.is_dir():
                    yield candidate
                if candidate == root:
                    break


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # this version of control groups has no such file
        return []
