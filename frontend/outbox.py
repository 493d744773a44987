"""Batches of text on their way to frontends: merged while a frontend is full, given up when it is gone.

Owns what could not be sent yet, and its bound. Must not know zmq (a `send` is handed in), clocks or streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..protocol.channel import PeerGone
from ..protocol.messages import TextBatch
from ..protocol.ragged import concatenated

# One message holds at most about this many rows, tokens and log-probability entries, a frontend's backlog this many.
MESSAGE_WEIGHT = 1 << 18
BACKLOG_WEIGHT = 1 << 21
# A frontend that has never been reached may still be connecting: its text is kept this long.
CONNECT_SECONDS = 5.0


@dataclass(slots=True)
class _Pending:
    batches: deque[TextBatch] = field(default_factory=deque)
    weight: int = 0
    unreached_since: float | None = None


class Outbox:
    """What waits for each frontend. `send(batch, frontend)` is `Socket.send`."""

    def __init__(self, send: Callable[[TextBatch, str], bool]) -> None:
        self._send = send
        self._pending: dict[str, _Pending] = {}
        self._reached: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add(self, frontend: str, batch: TextBatch) -> None:
        pending = self._pending.setdefault(frontend, _Pending())
        pending.batches.append(batch)
        pending.weight += weight(batch)

    def overfull(self) -> list[str]:
        """Frontends whose backlog is over its bound: no more of their tokens may be kept."""
        return [frontend for frontend, pending in self._pending.items() if pending.weight > BACKLOG_WEIGHT]

    def flush(self, now: float) -> list[str]:
        """Send what can be sent; returns the frontends that are gone (what waited for them is dropped).
        `now`: monotonic seconds."""
        gone = []
        for frontend in list(self._pending):
            pending = self._pending[frontend]
            try:
                self._flush_one(frontend, pending)
                self._reached.add(frontend)
                pending.unreached_since = None
            except PeerGone:
                if pending.unreached_since is None:
                    pending.unreached_since = now
                if frontend in self._reached or now - pending.unreached_since >= CONNECT_SECONDS:
                    self._reached.discard(frontend)
                    pending.batches.clear()
                    gone.append(frontend)
            if not pending.batches:
                del self._pending[frontend]
        return gone

    def _flush_one(self, frontend: str, pending: _Pending) -> None:
        while pending.batches:
            batch = _take(pending.batches)
            if not self._send_or_keep(batch, frontend, pending):
                return
            pending.weight -= weight(batch)

    def _send_or_keep(self, batch: TextBatch, frontend: str, pending: _Pending) -> bool:
        sent = False
        try:
            sent = self._send(batch, frontend)
        finally:
            if not sent:
                pending.batches.appendleft(batch)
        return sent


def _take(batches: deque[TextBatch]) -> TextBatch:
    """As many first batches as fit one message, merged."""
    parts = [batches.popleft()]
    total = weight(parts[0])
    while batches and (total := total + weight(batches[0])) <= MESSAGE_WEIGHT:
        parts.append(batches.popleft())
    return merged(parts)


def weight(batch: TextBatch) -> int:
    """A measure of a batch's size: its rows, tokens and log-probability entries."""
    prompts = sum(part.top.token_ids.size for part in batch.prompt_logprobs)
    return len(batch.texts) + batch.token_ids.size + len(batch.logprob_texts) + prompts + len(batch.ended)


def merged(parts: Sequence[TextBatch]) -> TextBatch:
    """Several batches for one frontend, in order, as one. A stream may get several rows."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0] + [part.token_ids.size for part in parts[:-1]]).tolist()
    return TextBatch(
        keys=np.concatenate([part.keys for part in parts]),
        indexes=np.concatenate([part.indexes for part in parts]),
        texts=[text for part in parts for text in part.texts],
        counts=np.concatenate([part.counts for part in parts]),
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=concatenated((start, part.logprobs) for start, part in zip(starts, parts, strict=True)),
        logprob_texts=[text for part in parts for text in part.logprob_texts],
        prompt_logprobs=tuple(p for part in parts for p in part.prompt_logprobs),
        ended=tuple(end for part in parts for end in part.ended),
    )
