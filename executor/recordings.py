"""Which steps are recorded, which are still to be, and in what order.

Owns the queue, and what becomes of a recording that fails; must not know what a step computes (`decode_graphs.py`,
`prompt_graphs.py`) or how it is recorded (`graph_recorder.py`). Recording changes nothing that a request could see, so
it may be done between any two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .backends.base import Piece
from .graph_recorder import Recorder, Work
from .sampling_columns import Choice

log = logging.getLogger(__name__)


class Key(NamedTuple):
    """What tells one recording from another."""

    kind: str  # "decode" or "prompt"
    choice: Choice
    size: int  # rows of a decode step, tokens of a prompt step


class Recordings:
    """Recordings by key. `before`: pieces of work that has to be done before the first, since what is recorded depends
    on it. `wanted`: a step has just asked for the one that is next."""

    def __init__(self, recorder: Recorder, before: Iterable[Piece] = ()) -> None:
        self.total = 0
        self.wanted = False
        self._recorder = recorder
        self._before = iter(before)
        self._plans: dict[Key, tuple[Work, Callable[[], None]]] = {}  # still to be made, in their order
        self._made: dict[Key, Work] = {}
        self._reasons: set[str] = set()

    @property
    def missing(self) -> int:
        """How many are still to be made."""
        return len(self._plans)

    def plan(self, key: Key, work: Work, prepare: Callable[[], None]) -> None:
        """Have `work` recorded after all that was planned before; `prepare()` sees to it that running it then is
        nobody's business."""
        self._plans[key] = work, prepare
        self.total += 1

    def ends(self, end: Callable[[list[Key]], Key]) -> list[Key]:
        """The smallest (`end` is `min`) or the largest (`max`) missing one of each kind and choice."""
        groups: dict[tuple[str, Choice], list[Key]] = {}
        for key in self._plans:
            groups.setdefault((key.kind, key.choice), []).append(key)
        return [end(keys) for keys in groups.values()]

    def go_on(self) -> Piece:
        """Do a piece of what comes before all recordings, or make the next one; returns what is done."""
        if (piece := next(self._before, None)) is not None:
            return piece
        self.record(next(iter(self._plans)))
        return Piece("recording steps", self.total - self.missing, self.total)

    def record(self, key: Key) -> None:
        """Make one that is missing. Where that fails it is logged, once for each reason, and such steps are launched
        operation by operation as before."""
        work, prepare = self._plans.pop(key)
        self.wanted = False
        prepare()
        try:
            self._made[key] = self._recorder.record(work)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if reason not in self._reasons:
                self._reasons.add(reason)
                what = "rows" if key.kind == "decode" else "tokens"
                log.warning("no graph for %s steps of %d %s (%s): they run eagerly", key.kind, key.size, what, reason)

    def smallest(self, kind: str, choice: Choice, sizes: list[int], least: int) -> tuple[int, Work] | None:
        """The recording of the smallest of `sizes` (ascending) that is `least` or more, with its size. Where the
        fitting one is missing it is put first, and a larger one serves; None where there is none."""
        enough = [size for size in sizes if size >= least]
        if enough and (first := Key(kind, choice, enough[0])) in self._plans:
            self._plans = {first: self._plans.pop(first), **self._plans}
            self.wanted = True
        for size in enough:
            if (work := self._made.get(Key(kind, choice, size))) is not None:
                return size, work
        return None
