"""The shell around the core, on real sockets and on their in-memory twin."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fast_inference.protocol.actor import Control
from fast_inference.protocol.channel import Wire, ZmqSocket
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.endpoints import Endpoints
from fast_inference.protocol.memory import MemorySocket, MemoryWire
from fast_inference.protocol.messages import (
    Attach,
    Deliver,
    EngineInfo,
    ExecutorReady,
    GetStats,
    Message,
    Shutdown,
    Stats,
    Step,
    Submit,
)
from fast_inference.protocol.sampling import SamplingParams
from fast_inference.scheduler import process
from fast_inference.scheduler.core import SchedulerCore
from fast_inference.scheduler.process import Shell
from fast_inference.scheduler.replay import assert_replays, replay

from .fake_executor import FakeExecutor, make_info, token_at


def submission(key: int, max_tokens: int = 5) -> Submit:
    return Submit(
        key=key,
        request_id=f"r{key}",
        prompt_token_ids=np.arange(6, dtype=np.int32),
        params=SamplingParams(max_tokens=max_tokens),
        seed=key,
    )


class Peers:
    """The other ends of the scheduler's links, on the in-memory twin."""

    def __init__(self, tokens_hwm: int = 100) -> None:
        wire = MemoryWire()
        requests = wire.bind_router("requests", hwm=100)
        results = wire.bind_pull("results", hwm=100)
        self.steps = wire.bind_pull("steps", hwm=100)
        self.tokens = wire.bind_pull("tokens", hwm=tokens_hwm)
        self.frontend = wire.dealer("requests", "frontend-0", hwm=100)
        self.results = wire.push("results", hwm=100)
        self.shell = Shell(
            SchedulerCore(EngineConfig(model="fake")),
            requests=requests,
            results=results,
            steps=wire.push("steps", hwm=100),
            tokens=[wire.push("tokens", hwm=100)],
            clock=lambda: 1.0,
        )
        self.device = FakeExecutor(make_info())
        self.results.send(ExecutorReady(info=make_info()))

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.shell.turn()
            while (step := take(self.steps)) is not None:
                assert isinstance(step, Step)
                self.results.send(self.device.run(step))


def take(socket: MemorySocket | ZmqSocket) -> Message | None:
    received = socket.receive()
    if received is None:
        return None
    assert not isinstance(received[1], Exception)
    return received[1]


def test_what_the_tokens_link_has_no_room_for_is_merged_into_the_next_delivery() -> None:
    peers = Peers(tokens_hwm=1)
    for key in range(3):
        peers.frontend.send(submission(key))
    peers.turn(30)
    assert peers.shell.held_back
    deliveries = []
    while (message := take(peers.tokens)) is not None:
        assert isinstance(message, Deliver)
        deliveries.append(message)
        peers.turn()
    assert len(deliveries) == 2
    assert not peers.shell.held_back
    tokens: dict[int, list[int]] = {}
    for delivery in deliveries:
        for number, token in zip(delivery.numbers.tolist(), delivery.tokens.tolist(), strict=True):
            tokens.setdefault(number, []).append(token)
    keys = {opened.number: opened.key for delivery in deliveries for opened in delivery.opened}
    assert {keys[n]: t for n, t in tokens.items()} == {
        key: [token_at(key, 6 + i, 100) for i in range(5)] for key in range(3)
    }
    assert sum(len(delivery.ended) for delivery in deliveries) == 3


def test_a_frontend_that_attaches_learns_what_the_engine_is() -> None:
    peers = Peers()
    peers.frontend.send(Attach(frontend="frontend-0"))
    peers.frontend.send(GetStats(token=7))
    peers.turn()
    assert take(peers.frontend) == make_info()
    stats = take(peers.frontend)
    assert isinstance(stats, Stats) and stats.token == 7 and stats.num_blocks == 64


def test_a_frame_that_is_no_message_is_logged_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    peers = Peers()
    peers.frontend.peers["requests"].queue.append(("frontend-0", b"no message"))
    peers.frontend.send(submission(1))
    peers.turn(10)
    assert "can't be read" in caplog.text
    delivery = take(peers.tokens)
    assert isinstance(delivery, Deliver) and delivery.opened[0].key == 1


def test_a_reply_to_a_frontend_that_is_gone_is_dropped_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    peers = Peers()
    peers.frontend.send(GetStats(token=1))
    peers.frontend.close()
    peers.turn()
    assert "frontend-0 is gone" in caplog.text
    assert not peers.shell.held_back


def receive(wire: Wire, socket: ZmqSocket, seconds: float = 10.0) -> Message:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (message := take(socket)) is not None:
            return message
        wire.wait([socket], 0.1)
    raise AssertionError("no message came")


@pytest.fixture
def endpoints(tmp_path: Path) -> Endpoints:
    return Endpoints(str(tmp_path))


def test_the_process_serves_on_real_sockets_keeps_its_journal_and_drains_at_shutdown(
    endpoints: Endpoints, tmp_path: Path
) -> None:
    wire = Wire()
    supervisor = wire.bind_router(endpoints.control, hwm=100)
    steps = wire.bind_pull(endpoints.steps, hwm=100)
    tokens = wire.bind_pull(endpoints.tokens_of(0), hwm=100)

    def life() -> None:
        own = Wire()
        config = EngineConfig(model="fake", journal=str(tmp_path / "journal"))
        process.run(config, endpoints, own, Control(own, endpoints, "scheduler"))
        own.close()

    thread = threading.Thread(target=life)
    thread.start()
    frontend = wire.dealer(endpoints.requests, "frontend-0", hwm=100)
    results = wire.push(endpoints.results, hwm=100)
    device = FakeExecutor(make_info())
    results.send(ExecutorReady(info=make_info()))
    frontend.send(Attach(frontend="frontend-0"))
    assert isinstance(receive(wire, frontend), EngineInfo)
    frontend.send(submission(1, max_tokens=20))
    step = receive(wire, steps)
    supervisor.send(Shutdown(drain_seconds=10.0), "scheduler")
    said: list[int] = []
    ended: list[str] = []
    while not ended:
        assert isinstance(step, Step)
        results.send(device.run(step))
        delivery = receive(wire, tokens)
        assert isinstance(delivery, Deliver)
        said += delivery.tokens.tolist()
        ended += [end.reason for end in delivery.ended]
        if not ended:
            step = receive(wire, steps)
    assert ended == ["length"] and said == [token_at(1, 6 + i, 100) for i in range(20)]
    thread.join(5)
    assert not thread.is_alive()
    wire.close()
    assert replay(tmp_path / "journal").steps == 20
    assert_replays(tmp_path / "journal")
