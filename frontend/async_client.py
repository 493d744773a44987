"""The client library: `AsyncClient` speaks to a running engine's frontend over ZeroMQ, from any process.

Owns the client's end of the link and its live requests; must not know how the engine works. `blocking_client.py` has
the same without asyncio.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any

from ..protocol.channel import AsyncReader, Wire
from ..protocol.errors import EngineDead, EngineError, Overloaded, ProtocolError, error_from_code
from ..protocol.messages import (
    Accepted,
    Cancel,
    ClientHello,
    EngineInfo,
    Generate,
    GetStats,
    Message,
    Refused,
    ServerHello,
    Stats,
    TextBatch,
)
from ..protocol.sampling import SamplingParams
from .client_requests import CANCELLED, ClientRequest, Prompt, Terms, generate_message
from .logprobs import by_row
from .outputs import RequestOutput

log = logging.getLogger(__name__)

CLIENT_HWM = 10_000  # messages
QUIET_SECONDS = 5.0  # with requests under way: ask for a sign of life after so long without a word
LOST_SECONDS = 30.0  # and give up after so long


class AsyncClient:
    """A connection to a running engine. Use it as an async context manager, or call `close`.

    It belongs to the event loop that first uses it. `endpoint`: `ipc://...` or `tcp://...`, as the server says.
    """

    def __init__(self, endpoint: str, *, connect_timeout: float = 30.0, lost_timeout: float = LOST_SECONDS) -> None:
        self.endpoint = endpoint
        self._connect_timeout = connect_timeout
        self._lost_timeout = lost_timeout
        self._wire: Wire | None = None
        self._reader: AsyncReader | None = None
        self._hello: asyncio.Future[ServerHello] | None = None
        self._server: ServerHello | None = None
        self._live: dict[int, ClientRequest] = {}
        self._asked: dict[int, asyncio.Future[Stats]] = {}
        self._next = 0
        self._heard = 0.0
        self._watcher: asyncio.Task[None] | None = None
        self._dead: EngineError | None = None

    # ---- life --------------------------------------------------------------------------------------------------

    async def connect(self) -> EngineInfo:
        """Connect, if not connected yet, and say hello. Raises `EngineDead` if nobody answers in time, and
        `ProtocolError` if the server speaks another version."""
        if self._dead is not None:
            raise self._dead
        if self._server is not None:
            return self._server.info
        if self._hello is None:
            self._hello = asyncio.get_running_loop().create_future()
            self._wire = Wire()
            socket = self._wire.dealer(self.endpoint, f"client-{uuid.uuid4().hex}", hwm=CLIENT_HWM)
            self._reader = AsyncReader(socket, self._on_message)
            self._reader.send(ClientHello())
        try:
            self._server = await asyncio.wait_for(asyncio.shield(self._hello), self._connect_timeout)
        except (TimeoutError, EngineError) as failure:
            error = failure if isinstance(failure, EngineError) else EngineDead(
                f"nobody answered on {self.endpoint} within {self._connect_timeout:g} s"
            )  # fmt: skip
            await self.close()
            self._dead = error
            raise error from None
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return self._server.info

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close the connection."""
        if self._reader is None or self._wire is None:
            return
        if self._live:
            self._reader.send(Cancel(keys=tuple(self._live)))
        self.fail_all(EngineDead("the client was closed"))
        if self._watcher is not None:
            self._watcher.cancel()
        reader, wire = self._reader, self._wire
        self._reader = self._wire = None
        reader.close()
        await asyncio.get_running_loop().run_in_executor(None, wire.close)

    def fail_all(self, error: EngineError) -> None:
        """The engine is gone: every request under way raises `error`, and so does each call from now on."""
        self._dead = error
        for request in list(self._live.values()):
            request.fail(error)
        for waiting in (*self._asked.values(), self._hello):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # it may be that nobody waits for it
        self._asked.clear()

    @property
    def info(self) -> EngineInfo:
        """What the engine serves. Raises `EngineDead` before the connection stands."""
        if self._server is None:
            raise EngineDead("not connected yet: await connect() first")
        return self._server.info

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return () if self._server is None else self._server.eos_token_ids

    @property
    def has_tokenizer(self) -> bool:
        return self._server is None or self._server.has_tokenizer

    # ---- requests ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        on_accepted: Callable[[], None] | None = None,
        *,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt: a string, token ids, or {"prompt_token_ids": [...]} or {"prompt": "..."}.

        Under the scheduling policies of their names, a higher `priority` goes first, `client` (by default this
        connection) gets its share, and the first token is wanted within `deadline_ms`.

        Yields `RequestOutput`s as `params.output_kind` says, the last of them `finished`. Leaving the iteration
        early cancels the request. `on_accepted` is called once the request is in the engine's queue. Raises the
        engine's error where it refuses or fails the request.
        """
        asked = params or SamplingParams()
        terms = Terms(priority=priority, cache_salt=cache_salt, client=client, deadline_ms=deadline_ms)

        def build(key: int, name: str) -> tuple[Generate, str | None]:
            return generate_message(key, name, prompt, asked, terms)

        return self._run(build, asked, request_id, on_accepted)

    def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        *,
        client: str = "",
        deadline_ms: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `generate`, for a conversation (`[{"role": ..., "content": ...}, ...]`) and the model's chat template."""
        asked = params or SamplingParams()

        def build(key: int, name: str) -> tuple[Generate, str | None]:
            message = Generate(
                key=key,
                request_id=name,
                params=asked,
                chat=messages,
                priority=priority,
                cache_salt=cache_salt,
                client=client,
                deadline_ms=deadline_ms,
            )
            return message, None

        return self._run(build, asked, request_id)

    async def _run(
        self,
        build: Callable[[int, str], tuple[Generate, str | None]],
        params: SamplingParams,
        request_id: str | None,
        on_accepted: Callable[[], None] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        await self.connect()
        key = self._next
        self._next += 1
        name = request_id or f"req-{uuid.uuid4().hex}"
        message, text = build(key, name)
        request = self._live[key] = ClientRequest(key, name, text, params, time.time())
        request.on_accepted = on_accepted
        try:
            if not self._send(message):
                raise Overloaded("the queue to the engine is full", retry_after=1.0)
            while True:
                output = await request.next_output()
                yield output
                if output.finished:  # not request.finished: the end may have come while the caller had `output`
                    break
        finally:
            del self._live[key]
            if not request.finished and self._dead is None:
                self._send(Cancel(keys=(key,)))

    async def abort(self, request_id: str) -> None:
        """End the requests of that name; their iterations get a last output with finish reason `abort`."""
        keys = tuple(key for key, request in self._live.items() if request.request_id == request_id)
        if keys:
            self._send(Cancel(keys=keys))

    async def get_stats(self, timeout: float = 10.0) -> Stats:
        """The scheduler's figures of this moment. Raises `EngineDead` if there is no answer in `timeout` seconds."""
        await self.connect()
        token = self._next
        self._next += 1
        answer = self._asked[token] = asyncio.get_running_loop().create_future()
        try:
            self._send(GetStats(token=token))
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise EngineDead(f"no answer from the engine within {timeout:g} s") from None
        finally:
            self._asked.pop(token, None)

    def _send(self, message: Message) -> bool:
        if self._dead is not None:
            raise self._dead
        assert self._reader is not None
        return self._reader.send(message)

    # ---- what comes --------------------------------------------------------------------------------------------

    def _on_message(self, sender: str, message: Message | ProtocolError) -> None:
        self._heard = time.monotonic()
        if isinstance(message, TextBatch):
            self._on_text(message)
        elif isinstance(message, Accepted):
            request = self._live.get(message.key)
            if request is not None:
                request.accept(message.prompt_token_ids)
        elif isinstance(message, Refused):
            self._on_refused(message)
        elif isinstance(message, Stats):
            waiting = self._asked.get(message.token)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, ServerHello):
            if self._hello is not None and not self._hello.done():
                self._hello.set_result(message)
        else:
            log.error("unexpected from the engine: %r", message)

    def _on_text(self, batch: TextBatch) -> None:
        live = self._live
        for item in batch.prompt_logprobs:
            if (request := live.get(item.key)) is not None:
                request.on_prompt_logprobs(item.top, item.texts)
        token_ids = batch.token_ids.tolist()
        records = None if batch.logprobs is None else by_row(batch.logprobs, batch.logprob_texts)
        woken: list[ClientRequest] = []
        start = 0
        for key, index, text, count in zip(
            batch.keys.tolist(), batch.indexes.tolist(), batch.texts, batch.counts.tolist(), strict=True
        ):
            end = start + count
            request = live.get(key)
            if request is not None:
                sequence = request.sequences[index]
                if text:
                    sequence.texts.append(text)
                sequence.token_ids += token_ids[start:end]
                if records is not None:
                    request.on_logprobs(index, [records[i] for i in range(start, end) if i in records])
                if not request.changed:
                    request.changed = True
                    woken.append(request)
            start = end
        for end_of_stream in batch.ended:
            if (request := live.get(end_of_stream.key)) is not None:
                request.on_end(end_of_stream)
        for request in woken:
            if not request.final_only:
                request.wake()

    def _on_refused(self, refused: Refused) -> None:
        error = error_from_code(refused.code, refused.message, refused.param, refused.retry_after)
        request = self._live.get(refused.key)
        if request is not None:
            if refused.code == CANCELLED:
                request.on_abort()
            else:
                request.fail(error)
        elif refused.key == -1:
            if self._hello is not None and not self._hello.done():
                self._hello.set_exception(error)
            else:
                log.error("the engine could not read a message: %s", refused.message)

    async def _watch(self) -> None:
        """Notice an engine that says nothing any more while requests wait for it."""
        asked = False
        while self._dead is None:
            await asyncio.sleep(QUIET_SECONDS)
            quiet = time.monotonic() - self._heard
            if not self._live or quiet < QUIET_SECONDS:
                asked = False
                continue
            if not asked and self._dead is None:
                self._send(GetStats(token=-1))
                asked = True
            if quiet > self._lost_timeout:
                self.fail_all(EngineDead(f"no word from the engine on {self.endpoint} for {quiet:.0f} s"))
                return
