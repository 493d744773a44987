"""The HTTP application on top of an `EngineDouble`, on one event loop, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fast_inference.frontend.engine_link import EngineLink
from fast_inference.frontend.http_app import make_app
from fast_inference.frontend.metrics import Metrics
from fast_inference.frontend.siblings import Siblings
from fast_inference.frontend.tokenizer import Tokenizer
from fast_inference.protocol.config import EngineConfig
from starlette.types import ASGIApp

from .engine_double import EngineDouble


@dataclass
class Server:
    app: ASGIApp
    link: EngineLink
    engine: EngineDouble
    http: httpx.AsyncClient

    def turn(self) -> None:
        """One turn of everything behind the frontend."""
        while self.engine.replies:
            self.link.on_scheduler("", self.engine.replies.popleft())
        batch = self.engine.step()
        if batch is not None:
            self.link.on_text("", batch)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def events(self, path: str, **body: Any) -> list[Any]:
        """The streamed answer: JSON of each event; the closing [DONE] is checked and left out."""
        response = await self.http.post(path, json={"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


@asynccontextmanager
async def serving(
    tokenizer: Tokenizer | None,
    *,
    engine: EngineDouble | None = None,
    config: EngineConfig | None = None,
    defaults: dict[str, float | int] | None = None,
    attached: bool = True,
    siblings: Siblings | None = None,
) -> AsyncIterator[Server]:
    """A running server. `attached`: the engine is known."""
    engine = engine or EngineDouble()
    config = config or EngineConfig(model="double")
    link = EngineLink("frontend-0", engine.send, Metrics(config), eos_token_ids=(1,))
    app = make_app(config, link, tokenizer, defaults or {}, siblings or Siblings({}))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        server = Server(app, link, engine, http)
        if attached:
            link.tick()
            server.turn()
        task = asyncio.ensure_future(_drive(server))
        try:
            yield server
        finally:
            task.cancel()


async def _drive(server: Server) -> None:
    while True:
        server.turn()
        await asyncio.sleep(0.0005)
