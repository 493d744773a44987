"""A lean HTTP client of streamed completions, for `streaming.py`: it counts what comes and looks at no text.

    python benchmarks/sse_client.py HOST PORT REQUESTS TOKENS

Opens a connection for each request, says `ready`, waits for a line on standard input, sends them all, and prints one
line of JSON: `tokens`, `chunks` (events with text), `began` and `ended` (`time.monotonic()` seconds). Must cost little:
on a small machine it takes its cores from the server that it measures.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import cast

import uvloop

PROMPT_TOKENS = 16
EVENT_END = b"}\n\n"
USAGE = re.compile(rb'"completion_tokens":(\d+)')


class Reader(asyncio.Protocol):
    """One connection with one request."""

    def __init__(self, request: bytes) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.chunks = 0
        self._request = request
        self._tail = b""  # an event's end may be cut by the end of a read
        self._last = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def send(self) -> None:
        assert self._transport is not None
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        text = self._tail + data
        self.chunks += text.count(EVENT_END)
        self._tail = text[-2:]
        self._last = (self._last + data)[-4096:]
        if b"data: [DONE]" in self._last:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection in mid-stream"))

    @property
    def tokens(self) -> int:
        found = USAGE.findall(self._last)
        if not found:
            raise ConnectionError(f"no usage in {self._last!r}")
        return int(found[-1])


def request_bytes(host: str, tokens: int) -> bytes:
    body = json.dumps(
        {
            "prompt": list(range(1000, 1000 + PROMPT_TOKENS)),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


async def main(host: str, port: int, requests: int, tokens: int) -> None:
    loop = asyncio.get_running_loop()
    request = request_bytes(host, tokens)
    readers = []
    for _ in range(requests):
        _, reader = await loop.create_connection(lambda: Reader(request), host, port)
        readers.append(reader)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    began = time.monotonic()
    for reader in readers:
        reader.send()
    await asyncio.gather(*(reader.done for reader in readers))
    ended = time.monotonic()
    chunks = sum(reader.chunks - 2 for reader in readers)  # the one that names the end and the usage carry no text
    print(json.dumps({"tokens": sum(r.tokens for r in readers), "chunks": chunks, "began": began, "ended": ended}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *map(int, sys.argv[2:])))
