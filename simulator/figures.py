"""What came of a simulation: latencies, throughput, preemptions, use of the device, fairness.

`Ledger` books what the cores deliver, as a detokenizer would see it; `figures` makes the report of it. Names are
those of vLLM's serving benchmark, as in `benchmarks/records.py`. Owns the definitions; must not know schedulers,
devices or how a report is shown.

Service of a client: its prompt tokens once they are computed, and twice its generated ones (Sheng et al., "Fairness in
Serving Large Language Models", OSDI 2024, section 3, with the weights of their evaluation). Gaps between tokens are
counted in bins 1% wide, since a million requests have some hundred million of them; their mean is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.messages import Deliver, StreamEnd
from .workload import Workload

PERCENTILES = (50, 90, 99)
INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
SHORTEST_GAP, BIN_WIDTH, BINS = 1e-6, 0.01, 2400  # seconds, relative, up to 23,000 s
FLUSH_GAPS = 200_000
SERVED = ("stop", "length")


@dataclass(slots=True)
class Gaps:
    """A histogram of the times between two tokens of one request."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    total: float = 0.0
    _held: list[NDArray[np.float64]] = field(default_factory=list)
    _size: int = 0

    def add(self, gaps: NDArray[np.float64]) -> None:
        """Book `gaps` [n] seconds; not a number where it is a request's first token."""
        self._held.append(gaps)
        self._size += len(gaps)
        if self._size > FLUSH_GAPS:
            self.flush()

    def flush(self) -> None:
        if self._held:
            gaps = np.concatenate(self._held)
            gaps = gaps[~np.isnan(gaps)]
            self.total += float(gaps.sum())
            places = np.log(np.maximum(gaps, SHORTEST_GAP) / SHORTEST_GAP) / BIN_WIDTH
            self.counts += np.bincount(np.minimum(places.astype(np.int64), BINS - 1), minlength=BINS)
        self._held, self._size = [], 0

    def mean(self) -> float:
        return self.total / max(int(self.counts.sum()), 1)

    def percentile(self, percent: float) -> float:
        """Seconds; the middle of the bin where it lies."""
        seen = np.cumsum(self.counts)
        place = int(np.searchsorted(seen, seen[-1] * percent / 100))
        return SHORTEST_GAP * float(np.exp((min(place, BINS - 1) + 0.5) * BIN_WIDTH))


class Ledger:
    """What became of each request of `workload`; times are those of the virtual clock, `start` its first moment."""

    def __init__(self, workload: Workload, start: float, request_seconds: float) -> None:
        count = len(workload)
        self.workload = workload
        self.sent = workload.arrival + start
        self.ttft = np.full(count, np.nan)
        self.e2el = np.full(count, np.nan)
        self.tokens = np.zeros(count, np.int64)
        self.preemptions = np.zeros(count, np.int64)
        self.refused = np.zeros(count, np.bool_)
        self.ended = 0
        self.last_end = start
        self.gaps = Gaps()
        self._request_seconds = request_seconds
        self._last_token = np.full(count, np.nan)
        self._share = Shares(workload) if workload.clients > 1 else None

    def book(self, message: Deliver, number_of: NDArray[np.int64], now: float) -> None:
        """`number_of`: the place in the workload of each of the replica's numbers."""
        if len(message.numbers):
            index = number_of[message.numbers]
            self.gaps.add(now - self._last_token[index])
            self._last_token[index] = now
            if self._share is not None:
                self._share.spoken(index)
        for end in message.ended:
            self._book_end(end, int(number_of[end.key]))

    def arrived(self, index: int) -> None:
        if self._share is not None:
            self._share.arrived(index)

    def _book_end(self, end: StreamEnd, index: int) -> None:
        self.ended += 1
        self.last_end = max(self.last_end, end.finished)
        self.preemptions[index] = end.preemptions
        if end.reason not in SERVED:
            self.refused[index] = True
            if self._share is not None:
                self._share.refused(index)
            return
        # half of what lies between client and scheduler is in `arrival` already
        back = self._request_seconds / 2
        self.ttft[index] = end.first_token + back - self.sent[index]
        self.e2el[index] = end.finished + back - self.sent[index]
        self.tokens[index] = end.completion_tokens

    @property
    def shares(self) -> Shares | None:
        """Of the clients, where there are several."""
        return self._share


class Shares:
    """Service by client: in all, while all of them had somebody waiting, and the largest difference between two while
    both had."""

    def __init__(self, workload: Workload) -> None:
        clients = workload.clients
        self.service = np.zeros(clients)
        self.contended = np.zeros(clients)  # of it: while every client had somebody waiting
        self.largest_gap = 0.0
        self._client, self._prompt = workload.client, workload.prompt
        self._silent = np.ones(len(workload), np.bool_)
        self._waiting = [0] * clients
        self._backlogged = np.zeros(clients, np.bool_)
        self._since = np.zeros((clients, clients))  # service of row less that of column when both became backlogged

    def arrived(self, index: int) -> None:
        self._wait(int(self._client[index]), 1)

    def refused(self, index: int) -> None:
        if self._silent[index]:
            self._silent[index] = False
            self._wait(int(self._client[index]), -1)

    def spoken(self, index: NDArray[np.int64]) -> None:
        """Each request of `index` said one token; with its first one its prompt is computed."""
        clients = self._client[index]
        fresh = self._silent[index].nonzero()[0]
        given = OUTPUT_WEIGHT * np.bincount(clients, minlength=len(self.service))
        if len(fresh):
            np.add.at(given, clients[fresh], INPUT_WEIGHT * self._prompt[index[fresh]])
        self.service += given
        if self._backlogged.all():
            self.contended += given
        if len(fresh):
            self._silent[index[fresh]] = False
            for client in clients[fresh].tolist():
                self._wait(client, -1)
        if np.count_nonzero(self._backlogged) > 1:
            among = self._backlogged.nonzero()[0]
            ahead = self.service[among, None] - self.service[None, among] - self._since[np.ix_(among, among)]
            self.largest_gap = max(self.largest_gap, float(ahead.max()))

    def _wait(self, client: int, change: int) -> None:
        self._waiting[client] += change
        backlogged = self._waiting[client] > 0
        if backlogged and not self._backlogged[client]:
            ahead = self.service[client] - self.service
            self._since[client], self._since[:, client] = ahead, -ahead
        self._backlogged[client] = backlogged


def jain_index(service: NDArray[np.float64]) -> float:
    """Of what each of n got: 1 if all got the same, 1/n if one got all (Jain, Chiu and Hawe, DEC-TR-301, 1984)."""
    squares = float((service * service).sum())
    return float(service.sum()) ** 2 / (len(service) * squares) if squares else 1.0


def figures(ledger: Ledger, *, seconds: float, preemptions: int, device_busy: float, kv_used: float) -> dict[str, Any]:
    """The report of a run that took `seconds` of virtual time. `device_busy`, `kv_used`: shares of that time and of
    the KV blocks. Latencies in milliseconds; those of nobody are left out."""
    work, done = ledger.workload, ~np.isnan(ledger.ttft)
    ledger.gaps.flush()
    output, prompt = int(ledger.tokens.sum()), int(work.prompt[done].sum())
    per_second = 1 / seconds if seconds > 0 else 0.0
    out: dict[str, Any] = {
        "completed": int(done.sum()),
        "refused": int(ledger.refused.sum()),
        "duration": seconds,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": int(done.sum()) * per_second,
        "output_throughput": output * per_second,
        "total_token_throughput": (output + prompt) * per_second,
        "preemptions": preemptions,
        "device_utilization": device_busy,
        "kv_utilization": kv_used,
    }
    for name, values in (("ttft", ledger.ttft[done]), ("e2el", ledger.e2el[done])):
        if len(values):
            out[f"mean_{name}_ms"] = float(values.mean()) * 1e3
            for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
                out[f"p{percent}_{name}_ms"] = float(value) * 1e3
    if ledger.gaps.counts.sum():
        out["mean_itl_ms"] = ledger.gaps.mean() * 1e3
        out |= {f"p{percent}_itl_ms": ledger.gaps.percentile(percent) * 1e3 for percent in PERCENTILES}
    limited = np.isfinite(work.deadline)
    if limited.any():
        out["deadlines"] = int(limited.sum())
        out["deadlines_met"] = int((ledger.ttft[limited] <= work.deadline[limited]).sum())
    shares = ledger.shares
    if shares is not None:
        out["jain_index"] = jain_index(shares.contended)
        out["largest_service_gap"] = shares.largest_gap
        out["service"] = shares.service.tolist()
        by_client = [ledger.ttft[done & (work.client == client)] for client in range(work.clients)]
        out["client_mean_ttft_ms"] = [float(ttft.mean()) * 1e3 if len(ttft) else None for ttft in by_client]
        out["urgent_mean_ttft_ms"] = out["client_mean_ttft_ms"][-1]
    return out
