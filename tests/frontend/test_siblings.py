"""The frontends of one port: whichever is asked, /metrics and /load tell of all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from fast_inference.frontend.engine_link import EngineLink
from fast_inference.frontend.metrics import Metrics
from fast_inference.frontend.native import NativeServer
from fast_inference.frontend.siblings import Siblings
from fast_inference.protocol.channel import AsyncReader, Wire
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import Distribution, FrontendFigures, Stats, StreamEnd

from .engine_double import EngineDouble
from .http_double import serving

LONG = 20.0  # seconds: the answer comes at once, but the machine may be busy


def ended(reason: str) -> StreamEnd:
    return StreamEnd(key=1, reason=reason, prompt_tokens=3, completion_tokens=4, arrival=1.0, finished=3.0)


class Other:
    """Another frontend, behind its `client` link."""

    def __init__(self, wire: Wire, endpoint: str) -> None:
        self.link = EngineLink("frontend-1", EngineDouble().send, Metrics(EngineConfig()), (1,))
        self.silent = False
        native = NativeServer(self.link, None, lambda message, to: self.silent or self.reader.send(message, to))
        self.reader = AsyncReader(wire.bind_router(endpoint, hwm=100), native.on_message)

    def finish(self, reason: str) -> None:
        self.link.metrics._ended(ended(reason))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Siblings, Other]]:
    wire = Wire()
    endpoint = f"ipc://{tmp_path}/client-1.sock"
    other = Other(wire, endpoint)
    siblings = Siblings({"frontend-1": wire.dealer(endpoint, "frontend-0", hwm=16)})
    yield siblings, other
    siblings.close()
    other.reader.close()
    wire.close()


async def test_metrics_and_load_sum_over_all_frontends(pair: tuple[Siblings, Other]) -> None:
    siblings, other = pair
    other.finish("length")
    other.finish("stop")
    other.link.table.open_local(5, 0.0)
    async with serving(None, siblings=siblings) as server:
        answer = await server.post("/v1/completions", prompt=[5, 6], max_tokens=4)
        assert answer.status_code == 200
        page = (await server.http.get("/metrics")).text
        labels = '{engine="0",model_name="double"}'
        assert f"fast_inference:request_prompt_tokens_count{labels} 3.0" in page
        assert f"fast_inference:request_generation_tokens_sum{labels} 12.0" in page
        assert 'finished_reason="length",model_name="double"} 2.0' in page
        assert 'finished_reason="stop",model_name="double"} 1.0' in page
        assert (await server.http.get("/load")).json() == {"server_load": 5}


async def test_of_one_that_does_not_answer_the_last_figures_count(
    pair: tuple[Siblings, Other], caplog: pytest.LogCaptureFixture
) -> None:
    siblings, other = pair
    other.finish("stop")
    (figures,) = await siblings.figures(LONG)
    assert figures.finished["stop"] == 1
    other.silent = True
    other.finish("stop")
    (figures,) = await siblings.figures(0.01)
    assert figures.finished["stop"] == 1
    assert "frontend-1 gave no figures" in caplog.text


async def test_a_frontend_alone_asks_nobody() -> None:
    assert await asyncio.wait_for(Siblings({}).figures(LONG), 1.0) == []


def test_a_histogram_of_other_buckets_is_not_added() -> None:
    metrics = Metrics(EngineConfig(model="m"))
    metrics._ended(ended("stop"))
    strange = Distribution(counts=np.ones(2, np.int64), sum=9.0)
    page = metrics.page(Stats(), None, [FrontendFigures(histograms={"request_prompt_tokens": strange})]).decode()
    assert 'fast_inference:request_prompt_tokens_sum{engine="0",model_name="m"} 3.0' in page


def test_the_devices_gaps_between_decode_steps_are_a_count_and_a_sum() -> None:
    page = Metrics(EngineConfig(model="m")).page(Stats(gaps=4, gap_seconds=0.5), None).decode()
    assert 'fast_inference:device_gap_seconds_count{engine="0",model_name="m"} 4.0' in page
    assert 'fast_inference:device_gap_seconds_sum{engine="0",model_name="m"} 0.5' in page
