"""Server-sent events, and the watch for a client that goes away.

Owns the ASGI side of a streamed response; must not know what the events say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from json.encoder import encode_basestring
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..protocol.errors import EngineError
from .errors_http import error_object

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
json_string = encode_basestring  # a str as JSON, quotes included, letters of all scripts as they are


class ClientGone(Exception):
    """The HTTP client closed its connection before its answer was done."""


def json_bytes(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any) -> bytes:
    """One event that carries `value` as JSON."""
    return b"data: " + json_bytes(value) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (`ClientGone`) if the client disconnects first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of events from `chunks`, each of one or more whole events.

    An `EngineError` on the way becomes an error event; `[DONE]` ends every stream. `close` is called in every case.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self._chunks = chunks
        self._close = close
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._pump(send))
        except ClientGone:
            scope.setdefault("state", {})["gone"] = True
        finally:
            self._close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except EngineError as error:
            await send({"type": "http.response.body", "body": event(error_object(error)), "more_body": True})
        finally:
            await self._chunks.aclose()
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
