"""What a step's result means: tokens appended, who has ended and why, what is passed on.

Reads a `StepResult` against the record of its step, so that rows of requests that have left their slot since are
thrown away. Owns that reading; must not end or move a request itself: it says who is to be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import EngineError
from ..protocol.messages import PromptLogprobs, StepResult, StreamPromptLogprobs, TopLogprobs
from ..protocol.ragged import follow_rows, pick_rows, well_formed
from .batch import Batch, InFlight
from .prefix import extend_hashes
from .request import Request, RequestState
from .timeline import first_word

_NO_NUMBERS = np.empty(0, np.int64)
_NO_TOKENS = np.empty(0, np.int32)


@dataclass(slots=True)
class Outcome:
    """What came out of a step, for `core.py` to act upon."""

    slots: NDArray[np.int64] = field(default_factory=lambda: _NO_NUMBERS)  # parallel to `numbers` and `tokens`
    numbers: NDArray[np.int64] = field(default_factory=lambda: _NO_NUMBERS)
    tokens: NDArray[np.int32] = field(default_factory=lambda: _NO_TOKENS)
    logprobs: TopLogprobs | None = None
    prompt_logprobs: list[StreamPromptLogprobs] = field(default_factory=list)
    ended: list[tuple[Request, RequestState, int | None]] = field(default_factory=list)  # with the stop token
    failed: list[tuple[Request, EngineError]] = field(default_factory=list)
    spoiled: list[int] = field(default_factory=list)  # slots whose requests must start again


@dataclass(slots=True)
class _Rows:
    """The rows of a result that count: parallel arrays."""

    slots: NDArray[np.int64]
    tokens: NDArray[np.int32]
    logprobs: TopLogprobs | None


def apply_result(batch: Batch, result: StepResult, *, prefix_caching: bool, now: float) -> Outcome:
    """Acknowledge the oldest step in flight, whose result this is, and write its tokens into the table."""
    record = batch.in_flight.popleft()
    batch.acknowledge(record.number)
    outcome = Outcome()
    if result.failed:
        _fail_rows(batch, record, result, outcome)
    rows = _living_rows(batch, record, result, outcome)
    if result.prompt_logprobs:
        _pass_prompt_logprobs(batch, record, result.prompt_logprobs, outcome)
    if not len(rows.slots):
        return outcome
    table = batch.table
    before = table.append(rows.slots, rows.tokens)
    outcome.slots = rows.slots
    outcome.numbers = table.number[rows.slots]
    outcome.tokens = rows.tokens
    outcome.logprobs = rows.logprobs
    if batch.silent:
        _first_words(batch, rows.slots, now)
    if prefix_caching:
        _register_filled(batch, rows.slots, before)
    _find_ended(batch, rows, before + 1, outcome)
    return outcome


def _living_rows(batch: Batch, record: InFlight, result: StepResult, outcome: Outcome) -> _Rows:
    """The result's rows whose request still holds its slot, in the order of the step's work."""
    slots, leases, tokens, logprobs = record.sampled, record.sampled_leases, result.tokens, result.logprobs
    if logprobs is not None and not well_formed(logprobs):
        logprobs = None
    if not len(result.slots) == len(tokens) == len(slots) or np.count_nonzero(result.slots != slots):
        slots, leases, tokens, logprobs = _match(batch, record, result, logprobs, outcome)
    alive = batch.table.lease[slots] == leases
    if outcome.failed:
        alive &= ~np.isin(slots, [request.slot for request, _ in outcome.failed])
    if np.count_nonzero(alive) == len(alive):
        return _Rows(slots, tokens, logprobs)
    if logprobs is not None:
        logprobs = follow_rows(logprobs, np.where(alive, np.cumsum(alive) - 1, -1))
    return _Rows(slots[alive], tokens[alive], logprobs)


def _match(
    batch: Batch, record: InFlight, result: StepResult, logprobs: TopLogprobs | None, outcome: Outcome
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], TopLogprobs | None]:
    """Rows failed, or the executor did not answer as asked: take what belongs to the step. A row without a token
    that isn't said to have failed would wait for ever, so it fails here."""
    at = {slot: row for row, slot in enumerate(result.slots.tolist()) if row < len(result.tokens)}
    rows = np.array([at.get(slot, -1) for slot in record.sampled.tolist()], np.int64)
    said = {request.slot for request, _ in outcome.failed}
    for row in np.flatnonzero(rows < 0).tolist():
        slot = int(record.sampled[row])
        request = batch.table.requests[slot]
        if request is not None and slot not in said and batch.table.lease[slot] == record.sampled_leases[row]:
            error = EngineError(f"step {record.number} of the executor gave no token for this request")
            outcome.failed.append((request, error))
    kept = rows >= 0
    if logprobs is not None:
        place = np.full(len(result.slots), -1, np.int64)
        place[rows[kept]] = np.arange(int(kept.sum()))
        logprobs = follow_rows(logprobs, place)
    return record.sampled[kept], record.sampled_leases[kept], result.tokens[rows[kept]], logprobs


def _fail_rows(batch: Batch, record: InFlight, result: StepResult, outcome: Outcome) -> None:
    leases = dict(zip(record.slots.tolist(), record.leases.tolist(), strict=True))
    for failure in result.failed:
        lease = leases.pop(failure.slot, None)
        if lease is None:  # no slot of this step, or told twice
            continue
        # even if its request has left: others may have taken its blocks for a prefix
        outcome.spoiled += batch.distrust(record)
        request = batch.table.requests[failure.slot]
        if request is not None and batch.table.lease[failure.slot] == lease:
            outcome.failed.append((request, EngineError(failure.message)))


def _pass_prompt_logprobs(batch: Batch, record: InFlight, parts: tuple[PromptLogprobs, ...], outcome: Outcome) -> None:
    leases = dict(zip(record.slots.tolist(), record.leases.tolist(), strict=True))
    for part in parts:
        lease = leases.get(part.slot)
        request = None if lease is None else batch.table.requests[part.slot]
        if request is None or batch.table.lease[part.slot] != lease or not well_formed(part.top):
            continue
        # computed again after a preemption: what was said is not said twice
        fresh = pick_rows(part.top, part.top.rows > request.prompt_logprobs_sent, part.top.rows)
        if fresh is not None:
            request.prompt_logprobs_sent = int(fresh.rows.max())
            outcome.prompt_logprobs.append(StreamPromptLogprobs(key=request.number, top=fresh))


def _first_words(batch: Batch, slots: NDArray[np.int64], now: float) -> None:
    for slot in batch.silent.intersection(slots.tolist()):
        batch.silent.discard(slot)
        request = batch.table.living(slot)
        request.first_token = request.first_token or now
        first_word(request, now)


def _register_filled(batch: Batch, slots: NDArray[np.int64], computed: NDArray[np.int64]) -> None:
    """The keys of the first `computed` tokens are written: where those fill a block, it may serve hits."""
    table, size = batch.table, batch.block_size
    rows = (computed % size == 0).nonzero()[0]
    if not len(rows):
        return
    at, last = slots[rows], computed[rows] // size - 1
    blocks: list[int] = table.blocks[at, last].tolist()
    hashes: list[bytes] = []
    for slot, index in zip(at.tolist(), last.tolist(), strict=True):
        request = table.living(slot)
        if len(request.hashes) <= index:
            extend_hashes(request.hashes, table.tokens[slot, : (index + 1) * size], size, request.cache_salt)
        hashes.append(request.hashes[index])
    batch.prefix.register(hashes, blocks)


def _find_ended(batch: Batch, rows: _Rows, lengths: NDArray[np.int64], outcome: Outcome) -> None:
    table = batch.table
    ended = lengths >= table.limit[rows.slots]
    stopped = table.stop_hits(rows.slots, rows.tokens, lengths) if table.has_stops else None
    if stopped is not None:
        ended |= stopped
    if not np.count_nonzero(ended):
        return
    for row in np.flatnonzero(ended).tolist():
        request = table.living(int(rows.slots[row]))
        if stopped is None or not stopped[row]:
            outcome.ended.append((request, RequestState.LENGTH, None))
            continue
        token = int(rows.tokens[row])
        reason = None if token in request.eos_token_ids else token
        outcome.ended.append((request, RequestState.STOPPED, reason))
