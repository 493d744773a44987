"""When keys and values are copied to host memory and back, and when they are computed again.

Owns the comparison of the two costs and the rates in it; must not know how blocks are counted or steps put together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.messages import EngineInfo
from .batch import Batch
from .host_blocks import CACHED
from .request import Request
from .step_model import StepModel

# until measured: what any machine with a GPU reaches, so that neither way is ruled out before it was tried
FIRST_PREFILL_RATE = 5_000.0  # tokens a second
FIRST_COPY_RATE = 5e9  # bytes a second
KEEP = 0.95  # weight of all copies before, when another is seen


@dataclass(slots=True, frozen=True)
class Rates:
    """How fast the device computes prompts, in tokens a second, and copies blocks one way, in bytes a second."""

    prefill: float
    copy: float


class CopyRate:
    """Bytes a second, from the copies seen; older ones fade."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def observe(self, copied: int, seconds: float) -> None:
        """`copied` bytes took `seconds`."""
        if copied and seconds > 0.0:
            self._bytes = self._bytes * KEEP + copied
            self._seconds = self._seconds * KEEP + seconds

    @property
    def rate(self) -> float | None:
        """None while none was seen."""
        return self._bytes / self._seconds if self._seconds else None


class Swap:
    """The choice between copying and computing.

    Args:
        mode: `EngineConfig.preemption`.
        info: the engine's blocks.
        steps: what it costs to compute.
        rates: by which to choose; None: as measured.
    """

    def __init__(self, mode: str, info: EngineInfo, steps: StepModel, rates: Rates | None) -> None:
        self._mode = mode
        self._block_size = info.block_size
        self._block_bytes = info.block_bytes
        self._steps = steps
        self._copies = CopyRate()
        self._given = rates

    @property
    def rates(self) -> Rates:
        """Those that hold at this moment."""
        if self._given is not None:
            return self._given
        return Rates(self._steps.prefill_rate or FIRST_PREFILL_RATE, self._copies.rate or FIRST_COPY_RATE)

    def copied(self, blocks: int, seconds: float) -> None:
        """A step has copied `blocks` blocks, out or in, in `seconds`."""
        self._copies.observe(blocks * self._block_bytes, seconds)

    def fetches(self, batch: Batch, request: Request) -> bool:
        """Whether blocks of the host's prefix cache are copied in for `request`, rather than computed."""
        if not batch.host.num_blocks:
            return False
        if self._mode == "swap" and request.number in batch.host.saved:
            return True
        rates = self.rates
        return self._block_bytes / rates.copy < self._block_size / rates.prefill

    def save(self, batch: Batch, slot: int) -> bool:
        """Copy what only the request of `slot`, about to leave it, holds to host memory, if that is how it should
        be preempted and there is room. Returns whether it was done.

        What steps in flight compute beyond its known tokens is left behind: those tokens are sampled again.
        """
        request, host, size = batch.table.living(slot), batch.host, self._block_size
        tokens = min(int(batch.table.computed[slot]), len(request.tokens) - 1)
        # log-probabilities of a prompt come from computing it: what a step in flight has of them will be thrown away
        if self._mode == "recompute" or not host.num_blocks or tokens < 1 or not request.takes_prefix_hits:
            return False
        sources = batch.table.blocks_of(slot)[: -(-tokens // size)]
        here, there = batch.prefix.block_of, host.prefix.block_of
        for index, digest in enumerate(request.hashes[: tokens // size]):
            if digest in here or digest in there:
                sources[index] = CACHED
        count = len(sources) - sources.count(CACHED)
        unfilled = len(sources) * size - tokens if sources[-1] != CACHED else 0
        if count > host.pool.available or not self._pays(count * size - unfilled, count):
            return False
        host.save(request.number, batch.last_sent + 1, tokens, sources)
        return True

    def _pays(self, tokens: int, blocks: int) -> bool:
        """Whether to copy `blocks` blocks there and back rather than compute their `tokens` tokens again."""
        if self._mode == "swap":
            return True
        rates = self.rates
        return 2 * blocks * self._block_bytes / rates.copy < tokens / rates.prefill
