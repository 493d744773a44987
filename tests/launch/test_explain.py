"""`fast-inference explain`: from a journal and from a server, as a table and a bar."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fast_inference.frontend.timelines import timeline_object
from fast_inference.launch.cli import app
from fast_inference.launch.explain import LOOKS, bar, why
from fast_inference.protocol.errors import EngineDead, EngineError, NotFound
from fast_inference.protocol.messages import SequenceTimeline, TimelineSpan
from fast_inference.scheduler.timeline import Kind
from typer.testing import CliRunner

from ..scheduler.fake_executor import make_info
from ..scheduler.recorded import Recorded

WIDE = {"COLUMNS": "240"}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Two requests that the pool can't hold both: the second is preempted by the first."""
    harness = Recorded(tmp_path / "j", make_info(num_blocks=8), enable_prefix_caching=False)
    harness.submit(1, [1] * 8, max_tokens=20)
    harness.submit(2, [2] * 8, max_tokens=20)
    harness.drain()
    harness.recorder.close()
    return tmp_path / "j"


def test_every_kind_of_span_has_its_look() -> None:
    assert set(LOOKS) == {kind.value for kind in Kind}


def test_a_journal_explains_a_request(journal: Path) -> None:
    done = CliRunner().invoke(app, ["explain", "r2", "--journal", str(journal)], env=WIDE)
    assert done.exit_code == 0, done.output
    assert "r2: ended by length after" in done.output and "1 preemptions" in done.output
    assert "by r1" in done.output and "computed tokens lost" in done.output
    assert "recompute" in done.output and "end to end" in done.output and "100.0%" in done.output


def test_a_request_that_the_journal_does_not_hold_is_said_so(journal: Path) -> None:
    done = CliRunner().invoke(app, ["explain", "nobody", "--journal", str(journal)])
    assert isinstance(done.exception, NotFound) and "nobody" in str(done.exception)


STORY = SequenceTimeline(
    number=1,
    request_id="cmpl-x",
    prompt_tokens=3,
    arrival=10.0,
    finished=14.0,
    spans=(
        TimelineSpan(
            kind="behind", start=10.0, end=13.0, other="cmpl-w", passed=2, causes={"no slot": 2.5, "no blocks": 0.5}
        ),
        TimelineSpan(kind="no slot", start=13.0, end=14.0),
    ),
)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/v1/requests/cmpl-x/timeline" and self.headers["Authorization"] == "Bearer key"
        body = timeline_object("cmpl-x", [STORY]) if known else {"error": {"message": f"not {self.path}"}}
        if self.path.startswith("/v1/requests/page"):
            body = {"a page": "of another server"}
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_explains_a_request(url: str) -> None:
    done = CliRunner().invoke(app, ["explain", "cmpl-x", "--url", url, "--api-key", "key"], env=WIDE)
    assert done.exit_code == 0, done.output
    assert "cmpl-x: still under way after 4.000 s" in done.output
    assert (
        "cmpl-w was first; 2 started meanwhile; the first waited for: no slot 2.500 s, no blocks 0.500 s" in done.output
    )
    assert "Q" * 54 + "S" * 18 in done.output


def test_what_the_server_refuses_is_told(url: str) -> None:
    with pytest.raises(NotFound, match="not /v1/requests/other%2F1/timeline"):
        CliRunner().invoke(app, ["explain", "other/1", "--url", url], catch_exceptions=False)
    with pytest.raises(EngineError, match="answers 404"):
        CliRunner().invoke(app, ["explain", "page", "--url", url], catch_exceptions=False)


def test_no_server_is_an_error_that_names_the_address() -> None:
    with pytest.raises(EngineDead, match="no engine answers at http"):
        CliRunner().invoke(app, ["explain", "x", "--url", "http://127.0.0.1:1"], catch_exceptions=False)


def test_the_words_of_each_kind() -> None:
    assert why({"kind": "swapped", "other": "r9", "tokens": 12}) == "by r9; 12 computed tokens kept in host memory"
    assert why({"kind": "lost", "tokens": 3}) == "3 computed tokens lost with the executor"
    assert why({"kind": "no blocks", "blocks_wanted": 4, "blocks_there": 1}) == "4 blocks wanted, 1 free"
    assert why({"kind": "decode"}) == ""


def test_a_short_span_still_has_a_letter() -> None:
    spans = [{"kind": "prefill", "seconds": 0.001}, {"kind": "decode", "seconds": 9.999}]
    assert bar({"spans": spans, "end_to_end_seconds": 10.0}).plain == "p" + "d" * 72
