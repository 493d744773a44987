"""A request's timeline as JSON: `GET /v1/requests/{id}/timeline`, and what `fast-inference explain` draws.

Pure. Owns under which names the scheduler may know a request, and the shape of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..protocol.errors import NotFound
from ..protocol.messages import SequenceTimeline, TimelineSpan


def names_of(request_id: str) -> tuple[str, ...]:
    """What the scheduler may call the request that its client calls `request_id`: the id of an answer, or that of the
    X-Request-Id header, or a native client's own."""
    return (request_id, f"cmpl-{request_id}", f"chatcmpl-{request_id}")


def timeline_object(request_id: str, sequences: Sequence[SequenceTimeline]) -> dict[str, Any]:
    """The timeline of one request. Raises `NotFound` if there are no `sequences`."""
    if not sequences:
        raise NotFound(
            f"no request `{request_id:.200}` is under way or among the last that have ended", param="request_id"
        )
    return {"object": "request.timeline", "id": request_id, "sequences": [_sequence(story) for story in sequences]}


def _sequence(story: SequenceTimeline) -> dict[str, Any]:
    parts: dict[str, float] = {}
    for span in story.spans:
        parts[span.kind] = parts.get(span.kind, 0.0) + span.end - span.start
    return {
        "id": story.request_id,
        "finish_reason": story.reason or None,
        "prompt_tokens": story.prompt_tokens,
        "completion_tokens": story.completion_tokens,
        "cached_tokens": story.cached_tokens,
        "preemptions": story.preemptions,
        "arrival": story.arrival,
        "first_token": story.first_token or None,
        "finished": story.finished if story.reason else None,
        "end_to_end_seconds": story.finished - story.arrival,
        "seconds_by_kind": parts,
        "spans": [_span(span) for span in story.spans],
    }


def _span(span: TimelineSpan) -> dict[str, Any]:
    facts = {
        "other": span.other,
        "tokens": span.tokens,
        "blocks_wanted": span.wanted,
        "blocks_there": span.there if span.wanted else 0,
        "passed": span.passed,
        "causes": span.causes,
    }
    known = {name: value for name, value in facts.items() if value}
    return {"kind": span.kind, "start": span.start, "end": span.end, "seconds": span.end - span.start, **known}
