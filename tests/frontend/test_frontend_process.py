"""The frontend as a real process: sockets, HTTP, native clients, health under load, the order to stop."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from fast_inference.frontend.client import AsyncClient
from fast_inference.protocol.channel import PeerGone, Wire, ZmqSocket
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.endpoints import Endpoints
from fast_inference.protocol.errors import EngineError
from fast_inference.protocol.messages import Message, Ready, Shutdown
from fast_inference.protocol.sampling import SamplingParams

from .engine_double import EngineDouble
from .made_models import make_model_folder

CHILD = """
import logging, socket, sys
from fast_inference.frontend import server
from fast_inference.protocol.actor import Control
from fast_inference.protocol.channel import Wire
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.endpoints import Endpoints
logging.basicConfig(level=logging.WARNING)
endpoints, wire = Endpoints(sys.argv[1]), Wire()
config = EngineConfig.from_json(endpoints.config_file.read_text())
server.run(config, endpoints, wire, Control(wire, endpoints, "frontend-0"), socket.socket(fileno=int(sys.argv[2])))
wire.close()
assert not [name for name in sys.modules if name.startswith("torch.")]
"""


@dataclass
class Behind:
    """Scheduler, detokenizer and supervisor in one thread, around an `EngineDouble`."""

    run_dir: Path
    engine: EngineDouble = field(default_factory=EngineDouble)
    control: list[Message] = field(default_factory=list)
    order: Shutdown | None = None
    stop: bool = False
    pace: float = 0.002  # seconds between two steps

    def loop(self) -> None:
        wire, endpoints = Wire(), Endpoints(str(self.run_dir))
        control = wire.bind_router(endpoints.control, hwm=1000)
        requests = wire.bind_router(endpoints.requests, hwm=1000)
        text = wire.bind_router(endpoints.text_of(0), hwm=1000)
        next_step = 0.0
        while not self.stop:
            wire.wait([control, requests], 0.002)
            while (received := control.receive()) is not None:
                assert not isinstance(received[1], Exception)
                self.control.append(received[1])
            if self.order is not None:
                tell(control, self.order)
                self.order = None
            while (received := requests.receive()) is not None:
                assert not isinstance(received[1], Exception)
                self.engine.send(received[1])
            while self.engine.replies:
                tell(requests, self.engine.replies.popleft())
            if time.monotonic() < next_step:
                continue
            next_step = time.monotonic() + self.pace
            if (batch := self.engine.step()) is not None:
                tell(text, batch)
        wire.close()


def tell(socket: ZmqSocket, message: Message) -> None:
    with contextlib.suppress(PeerGone):  # the frontend leaves before this thread does
        socket.send(message, "frontend-0")


@dataclass
class Running:
    behind: Behind
    process: subprocess.Popen[bytes]
    port: int
    client_endpoint: str


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    config = EngineConfig(model=make_model_folder(tmp_path / "model"), served_model_name="tiny")
    endpoints = Endpoints(str(tmp_path))
    endpoints.config_file.write_text(config.to_json())
    behind = Behind(tmp_path)
    thread = threading.Thread(target=behind.loop)
    thread.start()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        arguments = [sys.executable, "-c", CHILD, str(tmp_path), str(listener.fileno())]
        process = subprocess.Popen(arguments, pass_fds=[listener.fileno()], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not any(isinstance(message, Ready) for message in behind.control):
            assert process.poll() is None and time.monotonic() < deadline, "the frontend did not get ready"
            time.sleep(0.02)
        yield Running(behind, process, port, endpoints.client)
    finally:
        behind.order = Shutdown()
        try:
            process.wait(20)
        finally:
            process.kill()
            behind.stop = True
            thread.join(10)


def test_the_openai_client_native_clients_and_probes_are_served_at_once(running: Running) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "tiny"
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == " w7 w8 w9"
    chunks = client.completions.create(model="tiny", prompt="hello", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == " w7 w8 w9"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="hello", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="huge", prompt="hello")
    client.close()

    slowest = asyncio.run(_load(running))
    assert slowest < 0.5, f"/health took {slowest:.3f} s"  # a loose bound: test machines are shared


async def _load(running: Running) -> float:
    """64 native requests run; the slowest answer of /health meanwhile, in seconds."""

    async def ask(client: AsyncClient) -> int:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        count = 0
        async for out in client.generate([5], params):
            count = len(out.outputs[0].token_ids)
        return count

    async with AsyncClient(running.client_endpoint) as client:
        work = [asyncio.ensure_future(ask(client)) for _ in range(64)]
        slowest = 0.0
        while not all(task.done() for task in work):
            began = time.monotonic()
            assert await asyncio.to_thread(_health, running.port) == 200
            slowest = max(slowest, time.monotonic() - began)
        assert await asyncio.gather(*work) == [100] * 64
    return slowest


def _health(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/health")
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_connection_closed_in_mid_stream_aborts_the_request(running: Running) -> None:
    body = json.dumps({"prompt": "hello", "max_tokens": 127, "stream": True, "n": 2})
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.request("POST", "/v1/completions", body)
    assert connection.getresponse().read(10)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    deadline = time.monotonic() + 10
    while len(running.behind.engine.aborted) < 2:
        assert time.monotonic() < deadline, "no abort came"
        time.sleep(0.01)


def test_the_order_to_stop_lets_requests_end_and_refuses_new_ones(running: Running) -> None:
    running.behind.pace = 0.02

    async def talk() -> None:
        async with AsyncClient(running.client_endpoint) as client:
            old = client.generate([5], SamplingParams(max_tokens=120))
            await anext(old)
            running.behind.order = Shutdown(drain_seconds=20.0)
            refused = False
            async for last in old:
                out = last
                try:
                    await anext(client.generate([5], SamplingParams(max_tokens=1)))
                except EngineError as error:
                    refused = refused or "shutting down" in error.message
            assert out.finished and out.outputs[0].finish_reason == "length"
            assert refused

    asyncio.run(talk())
    assert running.process.wait(10) == 0
