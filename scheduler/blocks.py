"""The pool of KV blocks: reference counts, and in which order blocks are given out.

A block is *used* (referenced), *cached* (unreferenced, but the prefix index knows its content) or *free*. Free ones
are given out first, the one freed last before others; then cached ones, least recently used first. All operations
are O(1) a block. Owns block ids; must not know requests or steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ..protocol.errors import EngineError
from .prefix import PrefixIndex


class BrokenInvariant(EngineError):
    """The books of the scheduler contradict one another: a defect of the scheduler."""


class BlockPool:
    """Blocks 0 to `num_blocks` - 1."""

    def __init__(self, num_blocks: int, prefix: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self.prefix = prefix
        self.evicted: list[tuple[int, bytes]] = []  # cached blocks that the last `allocate` gave out, with their hashes
        self.refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Unreferenced blocks that are kept for a prefix hit."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Referenced blocks."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    def can_allocate(self, count: int, hits: Iterable[int] = ()) -> bool:
        """Whether `count` blocks could be allocated once `hits` are referenced."""
        refs = self.refs
        return count + sum(1 for block in hits if not refs[block]) <= self.available

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, referenced once each. Raises `BrokenInvariant` if the caller did not ask first."""
        free, refs = self._free, self.refs
        if count > self.available:
            raise BrokenInvariant(f"{count} blocks wanted, {self.available} available")
        self.evicted.clear()
        first = max(len(free) - count, 0)
        taken = free[first:]
        taken.reverse()  # the one freed last goes first
        del free[first:]
        while len(taken) < count:
            block, _ = self._cached.popitem(last=False)
            self.evicted.append((block, self.prefix.hash_of[block]))
            self.prefix.forget(block)
            taken.append(block)
        for block in taken:
            refs[block] = 1
        return taken

    def reference(self, blocks: Iterable[int]) -> None:
        """One more reader for each of `blocks`, used or cached."""
        refs = self.refs
        for block in blocks:
            if not refs[block]:
                del self._cached[block]
            refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One reader less for each block of a request's table. Its tail is the first to be evicted later."""
        refs, known = self.refs, self.prefix.hash_of
        for block in reversed(blocks):
            refs[block] -= 1
            if not refs[block]:
                if block in known:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def forget(self, block: int) -> None:
        """The content of `block` is not to be trusted: no further hits on it."""
        self.prefix.forget(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise `BrokenInvariant` unless every block is free, cached, or referenced exactly as `tables` say."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        if counted != self.refs:
            wrong = [b for b in range(self.num_blocks) if counted[b] != self.refs[b]]
            raise BrokenInvariant(f"reference counts differ from the tables for blocks {wrong[:10]}")
        free = set(self._free)
        if len(free) != len(self._free) or free & self._cached.keys():
            raise BrokenInvariant("a block is free twice")
        if any(counted[b] for b in free) or any(counted[b] for b in self._cached):
            raise BrokenInvariant("a free or cached block is referenced")
        if len(free) + len(self._cached) + sum(1 for c in counted if c) != self.num_blocks:
            raise BrokenInvariant("a block is neither free, cached nor used")
        hash_of, block_of = self.prefix.hash_of, self.prefix.block_of
        if any(b in hash_of for b in free) or any(b not in hash_of for b in self._cached):
            raise BrokenInvariant("a free block is in the prefix index, or a cached one is not")
        if {d: b for b, d in hash_of.items()} != block_of:
            raise BrokenInvariant("the prefix index contradicts itself")
