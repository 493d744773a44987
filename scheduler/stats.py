"""Running totals, and the gauges that are read off the batch when somebody asks.

Owns counting; must not decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol.messages import Stats
from .batch import Batch
from .request import REASONS


@dataclass(slots=True)
class Totals:
    """What has happened since the scheduler started."""

    generation_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0  # of the last step
    gaps: int = 0  # decode steps that followed a decode step
    gap_seconds: float = 0.0  # between those, all together
    steps_to_record: int = 0  # as the last step's result told
    preemptions: int = 0
    swap_preemptions: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    host_hits: int = 0
    prompt_tokens: int = 0
    scheduled_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS.values(), 0))


def fragmentation(batch: Batch) -> float:
    """Share of the token places in used blocks that hold no token, or that no step in flight fills."""
    # A block that is not full belongs to one request alone, so rows may be added up though full blocks are shared.
    places = batch.pool.used * batch.block_size
    empty = int((batch.table.capacity - batch.table.computed).sum())
    return empty / places if places else 0.0


def snapshot(totals: Totals, batch: Batch | None, *, waiting: int, token: int) -> Stats:
    """Gauges and totals at this moment; `token` goes back to the one who asked."""
    if batch is None:
        return Stats(token=token, waiting=waiting, finished=dict(totals.finished))
    pool, host = batch.pool, batch.host.pool
    return Stats(
        token=token,
        running=batch.num_running,
        waiting=waiting,
        num_blocks=pool.num_blocks,
        free_blocks=pool.free,
        cached_blocks=pool.cached,
        used_blocks=pool.used,
        utilization=pool.used / pool.num_blocks,
        fragmentation=fragmentation(batch),
        prefix_queries=totals.prefix_queries,
        prefix_hits=totals.prefix_hits,
        preemptions=totals.preemptions,
        swap_preemptions=totals.swap_preemptions,
        host_blocks=host.num_blocks,
        host_used_blocks=host.used,
        host_cached_blocks=host.cached,
        swapped_out_blocks=totals.swapped_out_blocks,
        swapped_in_blocks=totals.swapped_in_blocks,
        host_hits=totals.host_hits,
        prompt_tokens=totals.prompt_tokens,
        generation_tokens=totals.generation_tokens,
        steps=totals.steps,
        scheduled_tokens=totals.scheduled_tokens,
        finished=dict(totals.finished),
        step_seconds=totals.step_seconds,
        gaps=totals.gaps,
        gap_seconds=totals.gap_seconds,
        steps_to_record=totals.steps_to_record,
    )
