"""KV blocks in host memory: what preempted requests left there, and what fell out of the device's prefix cache.

Owns the books of the host pool and the list of copies that the next step carries. Must not know slots, policies or
when a copy pays.

Why no copy meets a block that something else writes: the executor takes steps in their order, and in each step all
copies out of the device come before anything that writes to it, all copies into it before the work that reads them.
So a device block may be given out again by the very step that copies it. A host block that a step names stays
referenced until that step is acknowledged: no step has two copies to one block, or reads one that it overwrites.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from .blocks import BlockPool
from .prefix import PrefixIndex

CACHED = -1  # in `Saved.blocks`: nothing was copied, the prefix cache held it


@dataclass(slots=True, frozen=True)
class Saved:
    """What a preempted request left in host memory: keys and values of its first `tokens` tokens.

    `blocks[i]` is the host block of its i-th block, or `CACHED`. `step` carries the copies.
    """

    tokens: int
    blocks: list[int]
    step: int

    @property
    def held(self) -> list[int]:
        """The host blocks among `blocks`."""
        return [block for block in self.blocks if block != CACHED]


@dataclass(slots=True)
class Swaps:
    """The copies of one step, as pairs of block ids: out of the device, then into it."""

    out_from: list[int] = field(default_factory=list)  # device
    out_to: list[int] = field(default_factory=list)  # host
    in_from: list[int] = field(default_factory=list)  # host
    in_to: list[int] = field(default_factory=list)  # device


class HostBlocks:
    """Host blocks 0 to `num_blocks` - 1; with none of them, every question has the answer "not here"."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.prefix = PrefixIndex()
        self.pool = BlockPool(num_blocks, self.prefix)
        self.saved: dict[int, Saved] = {}  # by the number of the waiting request
        self.next = Swaps()  # for the step in the making
        self._under_way: deque[tuple[int, Swaps]] = deque()

    def keep(self, block: int, digest: bytes) -> None:
        """Device block `block`, whose prefix has the hash `digest`, is about to be given out: let its content go on
        here. Where every host block is held, it is lost."""
        there = self.prefix.block_of.get(digest)
        if there is not None:  # used again just now: the last to be forgotten
            self.pool.reference([there])
            self.pool.release([there])
        elif self.pool.available:
            (target,) = self.pool.allocate(1)
            self.prefix.register([digest], [target])
            self.next.out_from.append(block)
            self.next.out_to.append(target)

    def save(self, number: int, step: int, tokens: int, sources: list[int]) -> None:
        """Request `number` is preempted after `tokens` computed tokens. `sources`: its device blocks, `CACHED` in
        place of those that the prefix cache holds. There must be room; `step` is the next to be sent."""
        wanted = [block for block in sources if block != CACHED]
        targets = self.pool.allocate(len(wanted))
        self.pool.reference(targets)  # once for the request, once for the copy
        self.next.out_from += wanted
        self.next.out_to += targets
        left = iter(targets)
        blocks = [CACHED if block == CACHED else next(left) for block in sources]
        self.saved[number] = Saved(tokens, blocks, step)

    def drop(self, number: int) -> None:
        """Request `number` needs no more what it saved, if it did."""
        saved = self.saved.pop(number, None)
        if saved is not None:
            self.pool.release(saved.held)

    def fetch(self, blocks: list[int], targets: list[int]) -> None:
        """Copy host `blocks` to device blocks `targets`. The caller has referenced `blocks` already, before it
        allocated `targets`: what that evicts may end up here."""
        self.next.in_from += blocks
        self.next.in_to += targets

    def sent(self, step: int) -> Swaps:
        """The copies that `step` carries."""
        swaps, self.next = self.next, Swaps()
        if swaps.out_to or swaps.in_to:
            self._under_way.append((step, swaps))
        return swaps

    def acknowledge(self, step: int) -> None:
        """The copies of steps up to `step` are done."""
        while self._under_way and self._under_way[0][0] <= step:
            _, swaps = self._under_way.popleft()
            self.pool.release(swaps.out_to)
            self.pool.release(swaps.in_from)

    def distrust(self, failed: int) -> None:
        """A row of step `failed`, which was the last to be acknowledged, did not get its keys and values written:
        forget what was copied out since."""
        for swaps in [*(swaps for _, swaps in self._under_way), self.next]:
            for block in swaps.out_to:
                self.pool.forget(block)
        for number in [number for number, saved in self.saved.items() if saved.step > failed]:
            self.drop(number)

    def check(self) -> None:
        """Raise `BrokenInvariant` unless the books agree."""
        self.pool.check(self._tables())

    def _tables(self) -> Iterator[list[int]]:
        for saved in self.saved.values():
            yield saved.held
        for swaps in chain((swaps for _, swaps in self._under_way), (self.next,)):
            yield swaps.out_to
            yield swaps.in_from
