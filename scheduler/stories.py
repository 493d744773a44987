"""The stories of requests as they are told to others: those under way, and those of the last that have ended.

Owns the memory of ended requests, and how marks become spans; what a mark means is known by `timeline.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from ..protocol.messages import SequenceTimeline, TimelineSpan
from .batch import Batch
from .request import REASONS, Request
from .timeline import OUT, Kind, Mark

REMEMBERED = 1024  # requests that have ended: some hundred bytes each, and they are in every snapshot


class Story(NamedTuple):
    """What is kept of a request. `end`: when it ended, or up to when it is told."""

    number: int
    request_id: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    preemptions: int
    first_token: float
    end: float
    marks: list[Mark]


class Stories:
    """`tell` gives the stories of some requests. `followed`: names whose stories are kept however many others end."""

    def __init__(self) -> None:
        self.followed: frozenset[str] = frozenset()
        self._followed: list[Story] = []
        self._ended: deque[Story] = deque(maxlen=REMEMBERED)

    def ended(self, request: Request, known: int, now: float) -> None:
        """`request` has come to its end with `known` tokens."""
        story = _story(request, known, now)
        self._ended.append(story)
        if self.followed and _is_one_of(request.request_id, self.followed):
            self._followed.append(story)

    def tell(
        self, names: frozenset[str], living: Iterable[Request], batch: Batch | None, now: float
    ) -> tuple[SequenceTimeline, ...]:
        """The sequences with one of `names`, or one of `names` and "-0", "-1" and so on: those that have ended, and
        those of the `living`, up to `now`; in the order of their coming."""
        stories = {story.number: story for story in (*self._followed, *self._ended)}
        for request in living:
            seated = batch is not None and request.slot >= 0
            known = int(batch.table.length[request.slot]) if batch and seated else len(request.tokens)
            stories[request.number] = _story(request, known, now)
        chosen = [story for story in stories.values() if _is_one_of(story.request_id, names)]
        return tuple(_told(story) for story in sorted(chosen))


def _is_one_of(name: str, names: frozenset[str]) -> bool:
    if name in names:
        return True
    stem, _, index = name.rpartition("-")
    return index.isdecimal() and stem in names


def _story(request: Request, known: int, end: float) -> Story:
    return Story(
        request.number,
        request.request_id,
        REASONS.get(request.state, ""),
        request.num_prompt,
        known - request.num_prompt,
        request.cached_tokens,
        request.preemptions,
        request.first_token,
        end,
        request.marks,
    )


def _told(story: Story) -> SequenceTimeline:
    marks = story.marks
    end = max(story.end, marks[-1].at) if marks else story.end  # the clock was set back
    return SequenceTimeline(
        number=story.number,
        request_id=story.request_id,
        reason=story.reason,
        prompt_tokens=story.prompt_tokens,
        completion_tokens=story.completion_tokens,
        cached_tokens=story.cached_tokens,
        preemptions=story.preemptions,
        arrival=marks[0].at if marks else end,
        first_token=story.first_token,
        finished=end,
        spans=tuple(_spans(marks, end)),
    )


def _spans(marks: list[Mark], end: float) -> list[TimelineSpan]:
    closing = Mark(end, Kind.DECODE)
    return [
        TimelineSpan(
            kind=mark.kind.value,
            start=mark.at,
            end=following.at,
            other=mark.other,
            tokens=mark.tokens,
            wanted=mark.wanted,
            there=mark.there,
            passed=mark.passed,
            causes=mark.causes or {},
        )
        for mark, following in pairwise([*marks, closing])
        if following.at > mark.at or mark.kind in OUT
    ]
