"""The frontend process: HTTP and native clients on one side, scheduler and detokenizer on the other.

Owns the process's sockets, its event loop and the order of its start and end; what is done with a message is known
by `engine_link.py`, `native.py` and the HTTP rooms.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from ..protocol.actor import Control
from ..protocol.channel import AsyncReader, Wire, ZmqSocket
from ..protocol.config import EngineConfig
from ..protocol.endpoints import Endpoints
from ..protocol.errors import EngineDead
from ..protocol.names import frontend, index_of
from .engine_link import EngineLink
from .metrics import Metrics
from .native import CLIENT_HWM, NativeServer
from .siblings import Siblings
from .tokenizer import Tokenizer, eos_token_ids, hide_torch, load_tokenizer, sampling_defaults

log = logging.getLogger(__name__)

REQUESTS_HWM = 100_000  # messages to the scheduler; its own limit on waiting requests is far below
TEXT_HWM = 10_000
SIBLING_HWM = 16  # questions to another frontend
TICK_SECONDS = 1.0
BACKLOG_SECONDS = 0.05  # how often messages that a slow native client could not take are tried again
CLOSE_SECONDS = 2.0  # for open HTTP responses to end once their streams have


def run(
    config: EngineConfig,
    endpoints: Endpoints,
    wire: Wire,
    control: Control,
    http_socket: socket.socket | None = None,
) -> None:
    """The frontend's life. `http_socket`: bound; None: no HTTP server. Returns after a Shutdown."""
    hide_torch()
    control.progress("tokenizer")
    tokenizer = load_tokenizer(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Frontend(config, endpoints, wire, control, tokenizer).serve(http_socket))


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor says when to stop, on the control link."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Frontend:
    def __init__(
        self, config: EngineConfig, endpoints: Endpoints, wire: Wire, control: Control, tokenizer: Tokenizer | None
    ) -> None:
        self._config = config
        self._endpoints = endpoints
        self._wire = wire
        self._control = control
        self._tokenizer = tokenizer
        self._stopping = asyncio.Event()

    async def serve(self, http_socket: socket.socket | None) -> None:
        config, wire, name = self._config, self._wire, self._control.actor
        index = index_of(name)
        eos = eos_token_ids(config.model, self._tokenizer)
        requests: AsyncReader
        link = EngineLink(name, lambda m: requests.send(m), Metrics(config), eos, generation=int(time.time()))
        requests = AsyncReader(wire.dealer(self._endpoints.requests, name, hwm=REQUESTS_HWM), link.on_scheduler)
        text = AsyncReader(wire.dealer(self._endpoints.text_of(index), name, hwm=TEXT_HWM), link.on_text)
        clients: AsyncReader
        native = NativeServer(link, self._tokenizer, lambda m, to: clients.send(m, to))
        router = wire.bind_router(self._endpoints.client_of(index), hwm=CLIENT_HWM)
        if config.client_endpoint and index == 0:
            wire.also_bind(router, config.client_endpoint)
        clients = AsyncReader(router, native.on_message)
        siblings = Siblings(self._sibling_links(wire, name))

        loop = asyncio.get_running_loop()
        control_fd = self._control.socket.raw.fileno()
        loop.add_reader(control_fd, self._turn)
        ticks = [loop.create_task(self._every(TICK_SECONDS, self._turn, link.tick, native.prune)),
                 loop.create_task(self._every(BACKLOG_SECONDS, native.tick))]  # fmt: skip
        http = None if http_socket is None else await self._start_http(link, siblings, http_socket)
        try:
            if await self._until_ready(link):
                gc.freeze()  # what is loaded stays: a full collection that walked it would hold up every stream
                self._control.ready(port=http_socket.getsockname()[1] if http_socket else 0)
                await self._stopping.wait()
            order = self._control.shutdown
            await link.drain(order.drain_seconds if order else 0.0)
            if http is not None:
                server, serving = http
                server.should_exit = True
                await serving
            native.tick()
        finally:
            for task in ticks:
                task.cancel()
            loop.remove_reader(control_fd)
            siblings.close()
            for reader in (requests, text, clients):
                reader.close()
            if self._tokenizer is not None:
                self._tokenizer.close()

    def _sibling_links(self, wire: Wire, name: str) -> dict[str, ZmqSocket]:
        """A link to each other frontend of the port, as one of that one's clients."""
        others = {frontend(i): self._endpoints.client_of(i) for i in range(self._config.api_server_count)}
        return {
            other: wire.dealer(endpoint, name, hwm=SIBLING_HWM) for other, endpoint in others.items() if other != name
        }

    async def _until_ready(self, link: EngineLink) -> bool:
        """Wait until the engine is known; False if the order to stop came first."""
        link.tick()
        waits = [asyncio.ensure_future(link.ready.wait()), asyncio.ensure_future(self._stopping.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return link.ready.is_set() and not self._stopping.is_set()

    async def _start_http(
        self, link: EngineLink, siblings: Siblings, http_socket: socket.socket
    ) -> tuple[uvicorn.Server, asyncio.Task[None]]:
        from .http_app import make_app

        app = make_app(self._config, link, self._tokenizer, sampling_defaults(self._config.model), siblings)
        server = _HttpServer(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=65,
                timeout_graceful_shutdown=int(CLOSE_SECONDS),
            )
        )
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[http_socket]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if serving.done():
            serving.result()
            raise EngineDead("the HTTP server ended while it started")
        return server, serving

    def _turn(self) -> None:
        if self._control.turn() is not None:
            self._stopping.set()

    @staticmethod
    async def _every(seconds: float, *actions: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(seconds)
            for action in actions:
                action()
