"""What each request does with its time: its story, as marks from one of which to the next it waits or runs.

A mark is set only when something happens to a request (it is looked at and can't start, starts, says its first token,
is preempted), so decoding costs nothing. Requests behind the first in the queue are not touched either: `Waits` keeps
one clock of why the first was held, and who leaves the queue reads off what it has waited for. Spans between
marks lie end to end, from arrival to the end of the request: they add up exactly. Pure. Must not know why anything is
decided: the planner and the preemptor say so.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .request import Request

MOST_MARKS = 512  # of one request: the last span of a longer story covers the rest


class Kind(StrEnum):
    """What a request does in a span. A new way of waiting or running needs a name here and a mark where it begins."""

    STARTING = "starting"  # no executor was ready
    EXECUTOR = "executor busy"  # as many steps were in flight as may be: nobody had looked yet
    BEHIND = "behind"  # another was first in the queue
    NO_SLOT = "no slot"  # from here: looked at, and could not start
    NO_BLOCKS = "no blocks"
    BUDGET = "token budget"  # the step was full
    PREFIX = "prefix"  # another's prompt, which begins alike, was being computed: worth to wait a step for
    POLICY = "policy"  # the policy did not let it in yet
    PREEMPTED = "preempted"  # pushed out; in the queue, and not looked at again yet
    SWAPPED = "swapped"  # as PREEMPTED, but what was computed is kept in host memory
    LOST = "lost"  # as PREEMPTED, because the executor restarted or failed where it had read
    PREFILL = "prefill"
    RECOMPUTE = "recompute"  # prefill of what had been computed before a preemption
    SWAP_IN = "swap in"  # blocks come from host memory, and what they don't hold is computed
    DECODE = "decode"


OUT = (Kind.PREEMPTED, Kind.SWAPPED, Kind.LOST)  # moments: worth a line even if they take no time


class Mark(NamedTuple):
    """From `at` (seconds) on, `kind`.

    `other`: the request (its id) that it is behind or was preempted by. `tokens`: to compute (prefill, recompute, swap
    in), or computed so far (preempted, swapped, lost). `wanted` and `there`: blocks. `passed`: how many started while
    it waited. `causes`: what the first in the queue waited for meanwhile, in seconds.
    """

    at: float
    kind: Kind
    other: str = ""
    tokens: int = 0
    wanted: int = 0
    there: int = 0
    passed: int = 0
    causes: dict[str, float] | None = None


class Entry(NamedTuple):
    """How things stood when a request joined the queue."""

    at: float
    causes: dict[str, float]
    started: int
    first: str  # the request that was held then
    mark: int  # the place of the mark that its wait began with


class Waits:
    """Why the first in the queue is held, over time: one clock for all who wait."""

    def __init__(self) -> None:
        self.first: Request | None = None  # who was looked at last and could not start
        self._kind = Kind.EXECUTOR
        self._cause = Kind.EXECUTOR.value  # a plain string: an enum's hash is slow
        self._since: float | None = None
        self._seconds: dict[str, float] = dict.fromkeys((kind.value for kind in Kind), 0.0)
        self._started = 0
        self._previous = ""  # the request that was held before `first`

    def joined(self, request: Request, now: float) -> None:
        """`request` is new in the queue."""
        self._join(request, now, Mark(now, Kind.EXECUTOR))

    def pushed_out(self, request: Request, now: float, *, by: Request | None, computed: int, saved: bool) -> None:
        """`request` is in the queue again; `computed` tokens of it were, and are lost unless `saved`. `by` None: the
        executor's fault."""
        kind = Kind.LOST if by is None else Kind.SWAPPED if saved else Kind.PREEMPTED
        self._join(request, now, Mark(now, kind, "" if by is None else by.request_id, computed))

    def held(self, request: Request, kind: Kind, now: float, *, wanted: int = 0, there: int = 0) -> None:
        """`request`, the first in the queue, can't start because of `kind`."""
        if request is not self.first or kind is not self._kind:
            before = self.first
            self._hold(request, kind, now)
            if before is not None and before is not request and before.waits and before.entry is None:
                self._join(before, now, Mark(now, Kind.BEHIND, request.request_id))
        last = request.marks[-1]
        just_out = last.at == now and last.kind in OUT  # that comes first
        if last.kind is not kind and not just_out:
            self._leave(request, now)
            _mark(request, Mark(now, kind, wanted=wanted, there=there))

    def deferred(self, request: Request, now: float) -> None:
        """`request` waits a step for a prefix that another is computing."""
        if request.marks[-1].kind is not Kind.PREFIX:
            self._leave(request, now)
            _mark(request, Mark(now, Kind.PREFIX))
        if request is self.first:
            self.nobody_held(now)

    def nobody_held(self, now: float) -> None:
        """The queue is empty, or nobody in it has been looked at."""
        if self.first is not None:
            self._hold(None, Kind.EXECUTOR, now)

    def started(self, request: Request, now: float, tokens: int, *, swapped: bool) -> None:
        """`request` got a slot; `tokens` of it are to be computed before it says another. `swapped`: others are copied
        in from host memory."""
        if request.entry is not None:
            self._leave(request, now)
        kind = Kind.PREFILL if not request.preemptions else Kind.SWAP_IN if swapped else Kind.RECOMPUTE
        _mark(request, Mark(now, kind, "", tokens))
        self._started += 1
        if request is self.first:
            self.nobody_held(now)

    def ended(self, request: Request, now: float) -> None:
        """`request` is in a final state."""
        self._leave(request, now)
        if request is self.first:
            self.nobody_held(now)

    def _hold(self, request: Request | None, kind: Kind, now: float) -> None:
        self._settle(now)
        if self.first is not None and self.first is not request:
            self._previous = self.first.request_id
        self.first, self._kind, self._cause = request, kind, kind.value

    def _join(self, request: Request, now: float, mark: Mark) -> None:
        self._settle(now)
        if _mark(request, mark):
            first = "" if self.first is None else self.first.request_id
            request.entry = Entry(now, dict(self._seconds), self._started, first, len(request.marks) - 1)

    def _leave(self, request: Request, now: float) -> None:
        """Say what the wait since `_join` was for, now that it is over or its own reason is known."""
        entry, request.entry = request.entry, None
        if entry is None or now <= entry.at:
            return
        self._settle(now)
        seconds = self._seconds
        causes = {kind: seconds[kind] - before for kind, before in entry.causes.items() if seconds[kind] > before}
        passed = self._started - entry.started
        opened = request.marks[entry.mark]
        if opened.kind is not Kind.EXECUTOR:
            request.marks[entry.mark] = opened._replace(passed=passed, causes=causes)
            return
        busy = entry.at + causes.pop(Kind.EXECUTOR.value, 0.0)
        if causes and busy < now:  # first for the executor, then behind others
            others = self._previous if self.first is None or self.first is request else self.first.request_id
            _mark(request, Mark(busy, Kind.BEHIND, entry.first or others, passed=passed, causes=causes))

    def _settle(self, now: float) -> None:
        if self._since is not None:
            self._seconds[self._cause] += now - self._since
        self._since = now


def first_word(request: Request, now: float) -> None:
    """`request` has said its first token since it took the slot."""
    _mark(request, Mark(now, Kind.DECODE))


def not_started(request: Request, now: float) -> None:
    """`request` came before the executor was ready."""
    _mark(request, Mark(now, Kind.STARTING))


def _mark(request: Request, mark: Mark) -> bool:
    marks = request.marks
    if len(marks) >= MOST_MARKS:
        return False
    if marks and mark.at < marks[-1].at:  # the clock was set back
        mark = mark._replace(at=marks[-1].at)
    marks.append(mark)
    return True
