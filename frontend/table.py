"""The frontend's request table: which sequence is whose, and how a batch of text is shared out.

A pure core: no sockets, no clock, no loop. Sequences live in numpy columns indexed by slot, so that a batch that
belongs to one native client passes through without Python touching its rows. A key is `generation << 20 | slot`;
a row whose key is no longer in its slot is late and is dropped.

Every sequence stays in the table until its one `StreamEnd` has come (also after a cancel), or its owner is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import Overloaded
from ..protocol.messages import StreamEnd, StreamPromptLogprobs, TextBatch
from .logprobs import by_row, select
from .stream import Stream

SLOT_BITS = 20
MAX_SEQUENCES = 1 << SLOT_BITS
LOCAL = 0  # owner number of the HTTP server's own requests
NOBODY = -1


@dataclass(slots=True)
class Entry:
    """What is known of a live sequence beside the columns."""

    owner: int
    index: int
    client_key: int
    stream: Stream | None


@dataclass(slots=True)
class Delivery:
    """What one batch of text comes to."""

    woken: list[Stream] = field(default_factory=list)
    outgoing: list[tuple[int, TextBatch]] = field(default_factory=list)  # (owner, its part)
    ended: list[StreamEnd] = field(default_factory=list)
    first_waits: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # seconds to the first token
    token_gaps: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # seconds since the one before


class RequestTable:
    """The live sequences of one frontend.

    `generation` must be greater than any that an earlier life of this frontend used (start time in seconds does).
    """

    def __init__(self, generation: int = 1) -> None:
        self._generation = generation
        self._keys = np.full(0, -1, np.int64)
        self._owners = np.full(0, NOBODY, np.int32)
        self._client_keys = np.zeros(0, np.int64)
        self._indexes = np.zeros(0, np.int32)
        self._started = np.zeros(0, np.float64)
        self._last = np.zeros(0, np.float64)  # when the last token came, 0: none yet
        self._entries: list[Entry | None] = []
        self._free: list[int] = []
        self._by_client: dict[tuple[int, int], list[int]] = {}  # (owner, client key) -> live keys

    def __len__(self) -> int:
        return len(self._entries) - len(self._free)

    # ---- opening and closing -----------------------------------------------------------------------------------

    def open_local(self, count: int, now: float, *, whole: bool = False) -> Stream:
        """Take in `count` sequences of an HTTP request, with indexes 0 to count - 1."""
        stream = Stream([], whole=whole)
        stream.keys = self._open(LOCAL, -1, count, now, stream)
        stream.remaining = count
        return stream

    def open_native(self, owner: int, client_key: int, count: int, now: float) -> list[int]:
        """Take in the `count` sequences of a native client's request; returns their keys, by index."""
        keys = self._open(owner, client_key, count, now, None)
        self._by_client[owner, client_key] = list(keys)
        return keys

    def forget(self, keys: list[int]) -> None:
        """Drop sequences that were never submitted, or whose owner is gone."""
        for key in keys:
            if (entry := self._find(key)) is not None:
                self._close(key, entry)

    def keys_of_request(self, owner: int, client_key: int) -> list[int]:
        """Live keys of one request of a native client."""
        return list(self._by_client.get((owner, client_key), ()))

    def keys_of_owner(self, owner: int) -> list[int]:
        return [int(k) for k in self._keys[self._owners == owner]]

    def live_keys(self, keys: list[int]) -> list[int]:
        """Those of `keys` that have not ended."""
        return [key for key in keys if self._find(key) is not None]

    def end_all(self, code: str, message: str, now: float) -> tuple[list[int], Delivery]:
        """End every live sequence with an error; returns their keys and the ends to deliver."""
        keys = [int(k) for k in self._keys[self._owners != NOBODY]]
        ends = tuple(StreamEnd(key=k, reason="error", code=code, message=message, finished=now) for k in keys)
        return keys, self.deliver(TextBatch(ended=ends), now)

    # ---- sharing out -------------------------------------------------------------------------------------------

    def deliver(self, batch: TextBatch, now: float) -> Delivery:
        """Share out a batch: local rows go into their streams, the others to their clients under the clients' own
        keys. `now`: `time.time()` seconds."""
        out = Delivery()
        woken: dict[int, Stream] = {}
        parts: dict[int, _Part] = {}
        for item in batch.prompt_logprobs:
            self._prompt_logprobs(item, parts)
        if len(batch.keys) == 1:
            self._one_row(batch, now, out, woken, parts)
        elif len(batch.keys) and len(self._keys):
            slots = np.minimum(batch.keys & (MAX_SEQUENCES - 1), len(self._keys) - 1)
            owners = np.where(self._keys[slots] == batch.keys, self._owners[slots], NOBODY)
            self._time_rows(slots[(owners != NOBODY) & (batch.counts > 0)], now, out)
            first = int(owners[0])  # one owner for all is the usual case, and np.unique is dear for a small batch
            for owner in [first] if (owners == first).all() else np.unique(owners).tolist():
                if owner == LOCAL:
                    self._local_rows(batch, np.flatnonzero(owners == LOCAL).tolist(), slots.tolist(), woken)
                elif owner != NOBODY:
                    part = parts.setdefault(owner, _Part())
                    part.rows = self._rows_of(batch, slots, owners, owner)
        for end in batch.ended:
            self._end(end, out, woken, parts)
        out.woken = list(woken.values())
        out.outgoing = [(owner, part.message()) for owner, part in parts.items()]
        return out

    def _one_row(
        self, batch: TextBatch, now: float, out: Delivery, woken: dict[int, Stream], parts: dict[int, _Part]
    ) -> None:
        """The batch of a request that runs alone: somebody waits, and arithmetic on columns is dear for one row."""
        key = int(batch.keys[0])
        entry = self._find(key)
        if entry is None:
            return
        slot = key & (MAX_SEQUENCES - 1)
        if batch.counts[0] > 0:
            last = float(self._last[slot])
            if last == 0.0:
                out.first_waits = np.array([now - float(self._started[slot])])
            else:
                out.token_gaps = np.array([now - last])
            self._last[slot] = now
        if entry.stream is not None:
            self._local_rows(batch, [0], [slot], woken)
        else:
            keys, indexes = np.array([entry.client_key], np.int64), np.array([entry.index], np.int32)
            parts.setdefault(entry.owner, _Part()).rows = _renamed(batch, keys, indexes)

    def _time_rows(self, slots: NDArray[np.int64], now: float, out: Delivery) -> None:
        last = self._last[slots]
        first = last == 0.0
        out.first_waits = now - self._started[slots[first]]
        out.token_gaps = now - last[~first]
        self._last[slots] = now

    def _local_rows(self, batch: TextBatch, rows: list[int], at: list[int], woken: dict[int, Stream]) -> None:
        """`rows`: which of the batch's are local; `at`: the slots of all."""
        starts = (np.cumsum(batch.counts) - batch.counts).tolist()
        counts, token_ids, texts = batch.counts.tolist(), batch.token_ids.tolist(), batch.texts
        records = None if batch.logprobs is None else by_row(batch.logprobs, batch.logprob_texts)
        entries = self._entries
        for row in rows:
            entry = entries[at[row]]
            if entry is None or entry.stream is None or entry.stream.closed:
                continue
            stream = entry.stream
            piece = stream.piece(entry.index)
            if texts[row]:
                piece.texts.append(texts[row])
            start, count = starts[row], counts[row]
            piece.count += count
            piece.token_ids += token_ids[start : start + count]
            if records is not None:
                piece.logprobs += [records[i] for i in range(start, start + count) if i in records]
            woken[id(stream)] = stream

    def _rows_of(self, batch: TextBatch, slots: NDArray[np.int64], owners: NDArray[np.int32], owner: int) -> TextBatch:
        mine = owners == owner
        if mine.all():  # one client has the whole batch: only the names of the rows change
            return _renamed(batch, self._client_keys[slots], self._indexes[slots])
        tokens = np.repeat(mine, batch.counts)
        logprobs, logprob_texts = (
            (None, []) if batch.logprobs is None else select(batch.logprobs, batch.logprob_texts, tokens)
        )
        return TextBatch(
            keys=self._client_keys[slots[mine]],
            indexes=self._indexes[slots[mine]],
            texts=[batch.texts[i] for i in np.flatnonzero(mine).tolist()],
            counts=batch.counts[mine],
            token_ids=batch.token_ids[tokens],
            logprobs=logprobs,
            logprob_texts=logprob_texts,
        )

    def _prompt_logprobs(self, item: StreamPromptLogprobs, parts: dict[int, _Part]) -> None:
        entry = self._find(item.key)
        if entry is None:
            return
        if entry.stream is None:
            parts.setdefault(entry.owner, _Part()).prompt_logprobs.append(replace(item, key=entry.client_key))
        elif not entry.stream.closed:
            entry.stream.kept(entry.index).prompt_logprobs.append((item.top, item.texts))

    def _end(self, end: StreamEnd, out: Delivery, woken: dict[int, Stream], parts: dict[int, _Part]) -> None:
        entry = self._find(end.key)
        if entry is None:
            return
        self._close(end.key, entry)
        out.ended.append(end)
        named = replace(end, key=entry.client_key, index=entry.index)
        if entry.stream is None:
            parts.setdefault(entry.owner, _Part()).ended.append(named)
        else:
            entry.stream.end(named)
            woken[id(entry.stream)] = entry.stream

    # ---- slots -------------------------------------------------------------------------------------------------

    def _open(self, owner: int, client_key: int, count: int, now: float, stream: Stream | None) -> list[int]:
        while len(self._free) < count:
            self._grow()
        keys = []
        for index in range(count):
            slot = self._free.pop()
            self._generation += 1
            key = self._generation << SLOT_BITS | slot
            self._keys[slot] = key
            self._owners[slot] = owner
            self._client_keys[slot] = client_key
            self._indexes[slot] = index
            self._started[slot] = now
            self._last[slot] = 0.0
            self._entries[slot] = Entry(owner, index, client_key, stream)
            keys.append(key)
        return keys

    def _grow(self) -> None:
        old = len(self._entries)
        new = max(64, 2 * old)
        if new > MAX_SEQUENCES:
            raise Overloaded(f"this frontend already holds {len(self)} sequences", retry_after=1.0)
        more = new - old
        self._keys = np.concatenate([self._keys, np.full(more, -1, np.int64)])
        self._owners = np.concatenate([self._owners, np.full(more, NOBODY, np.int32)])
        self._client_keys = np.concatenate([self._client_keys, np.zeros(more, np.int64)])
        self._indexes = np.concatenate([self._indexes, np.zeros(more, np.int32)])
        self._started = np.concatenate([self._started, np.zeros(more)])
        self._last = np.concatenate([self._last, np.zeros(more)])
        self._entries.extend([None] * more)
        self._free.extend(range(new - 1, old - 1, -1))

    def _find(self, key: int) -> Entry | None:
        slot = key & (MAX_SEQUENCES - 1)
        if slot >= len(self._entries) or int(self._keys[slot]) != key:
            return None
        return self._entries[slot]

    def _close(self, key: int, entry: Entry) -> None:
        slot = key & (MAX_SEQUENCES - 1)
        self._keys[slot] = -1
        self._owners[slot] = NOBODY
        self._entries[slot] = None
        self._free.append(slot)
        if entry.stream is None:
            siblings = self._by_client.get((entry.owner, entry.client_key))
            if siblings is not None:
                siblings.remove(key)
                if not siblings:
                    del self._by_client[entry.owner, entry.client_key]


def _renamed(batch: TextBatch, keys: NDArray[np.int64], indexes: NDArray[np.int32]) -> TextBatch:
    """The rows of `batch` under a client's own names."""
    return TextBatch(
        keys=keys,
        indexes=indexes,
        texts=batch.texts,
        counts=batch.counts,
        token_ids=batch.token_ids,
        logprobs=batch.logprobs,
        logprob_texts=batch.logprob_texts,
    )


class _Part:
    """One native client's share of a batch, while it is put together."""

    __slots__ = ("ended", "prompt_logprobs", "rows")

    def __init__(self) -> None:
        self.rows = TextBatch()
        self.prompt_logprobs: list[StreamPromptLogprobs] = []
        self.ended: list[StreamEnd] = []

    def message(self) -> TextBatch:
        if not self.prompt_logprobs and not self.ended:
            return self.rows
        return replace(self.rows, prompt_logprobs=tuple(self.prompt_logprobs), ended=tuple(self.ended))
