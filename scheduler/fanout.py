"""The way from the scheduler to the detokenizers: each `Deliver` parted by the frontend that its rows are for.

Owns which stream's text is made where, and what a detokenizer had no room for. Must not know requests, only the
streams that a `Deliver` opens and ends. With one detokenizer, everything passes as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..protocol.channel import Socket
from ..protocol.messages import Deliver, Int64
from ..protocol.names import index_of
from ..protocol.ragged import follow_rows
from .delivery import merge


class Fanout:
    """The links to the detokenizers, the one of frontend i at place i."""

    def __init__(self, links: Sequence[Socket]) -> None:
        self._links = links
        self._held: dict[int, Deliver] = {}  # by link: what it had no room for, merged
        self._homes = Homes(len(links))

    @property
    def holds_back(self) -> bool:
        """Whether something waits for room in a queue."""
        return bool(self._held)

    def deliver(self, message: Deliver) -> None:
        """Send each detokenizer its part; what can't be sent now is merged into what is sent to it next."""
        for place, part in self._homes.part(message):
            if place in self._held:
                self._held[place] = merge(self._held[place], part)
            elif not self._links[place].send(part):
                self._held[place] = part

    def flush(self) -> None:
        """Try again to send what was held back."""
        for place in [place for place, message in self._held.items() if self._links[place].send(message)]:
            del self._held[place]


class Homes:
    """Where the text of each open stream is made, as one of `count` places. Pure."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._home: dict[int, int] = {}  # by stream number
        # Running streams stay the same from step to step: the rows of each place in the last column of numbers.
        self._numbers = b""
        self._rows: dict[int, NDArray[np.int64]] = {}

    def part(self, message: Deliver) -> list[tuple[int, Deliver]]:
        """(place, its part) for each place that the message has something for."""
        if self._count == 1:
            return [(0, message)]
        for opened in message.opened:
            index = index_of(opened.frontend)
            self._home[opened.number] = index if index < self._count else 0
        rows = self._rows_of(message.numbers)
        homes = {self._home[opened.number] for opened in message.opened}
        homes.update(rows, (self._home.get(e.key, 0) for e in message.ended))
        homes.update(self._home.get(p.key, 0) for p in message.prompt_logprobs)
        parts = [(place, self._part(message, place, rows.get(place))) for place in sorted(homes)]
        for end in message.ended:
            self._home.pop(end.key, None)
        return parts

    def _rows_of(self, numbers: Int64) -> dict[int, NDArray[np.int64]]:
        same = numbers.tobytes()
        if same != self._numbers:
            homes = np.array([self._home.get(number, 0) for number in numbers.tolist()], np.int64)
            self._numbers = same
            self._rows = {int(place): np.flatnonzero(homes == place) for place in np.unique(homes)}
        return self._rows

    def _part(self, message: Deliver, place: int, rows: NDArray[np.int64] | None) -> Deliver:
        home = self._home
        chosen = np.empty(0, np.int64) if rows is None else rows
        logprobs = message.logprobs
        if logprobs is not None:
            moved = np.full(len(message.numbers), -1, np.int64)
            moved[chosen] = np.arange(len(chosen))
            logprobs = follow_rows(logprobs, moved)
        return Deliver(
            opened=tuple(opened for opened in message.opened if home[opened.number] == place),
            numbers=message.numbers[chosen],
            tokens=message.tokens[chosen],
            logprobs=logprobs,
            prompt_logprobs=tuple(p for p in message.prompt_logprobs if home.get(p.key, 0) == place),
            ended=tuple(end for end in message.ended if home.get(end.key, 0) == place),
        )
