"""`GET /v1/requests/{id}/timeline`: the scheduler's story of a request as JSON."""

from __future__ import annotations

import pytest
from fast_inference.frontend import http_app
from fast_inference.protocol.messages import SequenceTimeline, TimelineSpan

from .http_double import serving

STORY = SequenceTimeline(
    number=7,
    request_id="cmpl-mine",
    reason="length",
    prompt_tokens=5,
    completion_tokens=3,
    preemptions=1,
    arrival=100.0,
    first_token=102.0,
    finished=104.0,
    spans=(
        TimelineSpan(kind="no blocks", start=100.0, end=101.0, wanted=4, there=1, causes={"no blocks": 1.0}),
        TimelineSpan(kind="prefill", start=101.0, end=102.0, tokens=5),
        TimelineSpan(kind="decode", start=102.0, end=104.0),
    ),
)


@pytest.mark.parametrize("name", ["cmpl-mine", "mine"])
async def test_a_timeline_is_found_by_the_answers_id_and_by_the_headers(name: str) -> None:
    async with serving(None) as server:
        server.engine.timelines.append(STORY)
        answer = await server.http.get(f"/v1/requests/{name}/timeline")
    assert answer.status_code == 200
    body = answer.json()
    (sequence,) = body["sequences"]
    assert (body["object"], body["id"], sequence["id"]) == ("request.timeline", name, "cmpl-mine")
    assert sequence["end_to_end_seconds"] == 4.0
    assert sequence["seconds_by_kind"] == {"no blocks": 1.0, "prefill": 1.0, "decode": 2.0}
    assert sequence["spans"][0] == {
        "kind": "no blocks",
        "start": 100.0,
        "end": 101.0,
        "seconds": 1.0,
        "blocks_wanted": 4,
        "blocks_there": 1,
        "causes": {"no blocks": 1.0},
    }
    assert (sequence["finish_reason"], sequence["finished"]) == ("length", 104.0)


async def test_an_unknown_request_is_404_in_openais_shape() -> None:
    async with serving(None) as server:
        answer = await server.http.get("/v1/requests/nobody/timeline")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["type"] == "NotFoundError" and error["param"] == "request_id" and "nobody" in error["message"]


async def test_a_scheduler_that_does_not_answer_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_app, "TIMELINE_SECONDS", 0.01)
    async with serving(None) as server:
        server.engine.silent = True
        answer = await server.http.get("/v1/requests/mine/timeline")
    assert answer.status_code == 503 and "gave no answer" in answer.json()["error"]["message"]
