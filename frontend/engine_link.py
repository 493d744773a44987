"""The frontend's side of the engine: takes requests in, hands text out, knows how the engine fares.

Joins the request table with the two links (scheduler and detokenizer) that it is given as plain functions; must not
know HTTP or who the native clients are. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..protocol.errors import EngineDead, EngineError, Overloaded, ProtocolError
from ..protocol.messages import (
    Abort,
    Attach,
    EngineInfo,
    GetStats,
    GetTimeline,
    Message,
    SequenceTimeline,
    Stats,
    TextBatch,
    Timeline,
)
from .metrics import Metrics
from .stream import Stream
from .submission import Request, check_request, submits
from .table import Delivery, RequestTable

log = logging.getLogger(__name__)

QUIET_SECONDS = 5.0  # without an answer from the scheduler for so long, the engine is not healthy
STALL_SECONDS = 60.0  # requests run, yet no step has ended for so long


@dataclass(slots=True)
class Pulse:
    """How lately the engine showed life. Times are `time.monotonic()` seconds."""

    answered: float = 0.0
    stepped: float = 0.0
    steps: int = -1
    last: Stats = field(default_factory=Stats)

    def take(self, stats: Stats, now: float) -> None:
        self.answered = now
        if stats.steps != self.steps or stats.running == 0:
            self.stepped = now
        self.steps = stats.steps
        self.last = stats

    def complaint(self, now: float) -> str | None:
        """What is wrong with the engine, or None."""
        if now - self.answered > QUIET_SECONDS:
            return f"the scheduler has not answered for {now - self.answered:.0f} s"
        if now - self.stepped > STALL_SECONDS:
            return f"{self.last.running} requests run, but no step has ended for {now - self.stepped:.0f} s"
        return None


class EngineLink:
    """`send` hands a message to the scheduler: False when its queue is full.

    `outgoing` is set by whoever speaks to the native clients: it gets (owner, batch) for their share of the text.
    """

    def __init__(
        self,
        frontend: str,
        send: Callable[[Message], bool],
        metrics: Metrics,
        eos_token_ids: tuple[int, ...] = (),
        generation: int = 1,
    ) -> None:
        self.frontend = frontend
        self.table = RequestTable(generation)
        self.metrics = metrics
        self.eos_token_ids = eos_token_ids
        self.info: EngineInfo | None = None
        self.ready = asyncio.Event()
        self.closing = False
        self.pulse = Pulse()
        self.outgoing: Callable[[int, TextBatch], None] | None = None
        self._send = send
        self._aborts: list[int] = []
        self._flush_due = False
        self._tokens = 0
        self._asked: dict[int, asyncio.Future[Any]] = {}  # by token: who waits for a `Stats` or a `Timeline`
        self._attached = False

    # ---- requests ----------------------------------------------------------------------------------------------

    def engine(self) -> EngineInfo:
        """What the engine is. Raises `Overloaded` before it is known, and while the server stops."""
        if self.closing:
            raise Overloaded("the server is shutting down", retry_after=5.0)
        if self.info is None:
            raise Overloaded("the engine is still starting", retry_after=1.0)
        return self.info

    def submit(self, request: Request, *, whole: bool = False) -> Stream:
        """Start an HTTP request; its sequences have the indexes 0 to `request.sequences` - 1.

        Raises `InvalidRequest` or `Overloaded`, and then nothing has been started."""
        check_request(request, self.engine())
        stream = self.table.open_local(request.sequences, time.time(), whole=whole)
        self._submit(request, stream.keys)
        return stream

    def submit_native(self, request: Request, owner: int, client_key: int) -> None:
        """Start a native client's request. Raises as `submit`."""
        check_request(request, self.engine())
        keys = self.table.open_native(owner, client_key, request.sequences, time.time())
        self._submit(request, keys)

    def _submit(self, request: Request, keys: list[int]) -> None:
        for sent, submit in enumerate(submits(request, keys, self.eos_token_ids, lambda: secrets.randbits(63))):
            if not self._send(submit):
                self.abort(keys[:sent])
                self.table.forget(keys)
                raise Overloaded("the scheduler's queue is full", retry_after=1.0)
        self.metrics.submitted(request)

    def cancel(self, stream: Stream) -> None:
        """The reader of `stream` is gone: what has not ended is aborted."""
        stream.closed = True
        self.abort(self.table.live_keys(stream.keys))

    def abort(self, keys: list[int]) -> None:
        """End these sequences in the engine. Never lost: what can't be sent now is sent again at the next tick.
        Those of one turn of the loop go as one message."""
        if not keys:
            return
        self._aborts += keys
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush_aborts)

    def _flush_aborts(self) -> None:
        self._flush_due = False
        if self._aborts and self._send(Abort(keys=tuple(self._aborts))):
            self._aborts = []

    # ---- what comes from the engine ----------------------------------------------------------------------------

    def on_text(self, sender: str, message: Message | ProtocolError) -> None:
        """Handler of the link from the detokenizer."""
        if not isinstance(message, TextBatch):
            log.error("unexpected on the text link: %r", message)
            return
        self._share_out(self.table.deliver(message, time.time()))

    def on_scheduler(self, sender: str, message: Message | ProtocolError) -> None:
        """Handler of the link from the scheduler."""
        if isinstance(message, Stats):
            self.pulse.take(message, time.monotonic())
            self._answer(message.token, message)
        elif isinstance(message, Timeline):
            self._answer(message.token, message)
        elif isinstance(message, EngineInfo):
            self.info = message
            self.pulse.answered = self.pulse.stepped = time.monotonic()
            self.ready.set()
        else:
            log.error("unexpected on the requests link: %r", message)

    def _answer(self, token: int, message: Stats | Timeline) -> None:
        waiting = self._asked.pop(token, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def _share_out(self, delivery: Delivery) -> None:
        for stream in delivery.woken:
            stream.wake()
        if self.outgoing is not None:
            for owner, batch in delivery.outgoing:
                self.outgoing(owner, batch)
        self.metrics.delivered(delivery)  # last: somebody waits for the text, nobody for the figures

    # ---- how the engine fares ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """About once a second: say hello until it is heard, ask for a sign of life, send what was left over."""
        if not self._attached:
            self._attached = self._send(Attach(frontend=self.frontend))
        self._flush_aborts()
        if self.info is not None:
            self._send(GetStats(token=0))

    def complaint(self) -> str | None:
        """Why the engine can't serve now, or None if it can."""
        if self.closing:
            return "the server is shutting down"
        if self.info is None:
            return "the engine is still starting"
        return self.pulse.complaint(time.monotonic())

    async def stats(self, timeout: float) -> Stats:
        """The scheduler's figures of this moment, or, after `timeout` seconds, the latest that came."""
        if self.info is None:
            return self.pulse.last
        stats: Stats | None = await self._ask(lambda token: GetStats(token=token), timeout)
        if stats is None:
            log.warning("the scheduler gave no figures within %.1f s: showing the last ones", timeout)
            return self.pulse.last
        return stats

    async def timeline(self, names: tuple[str, ...], timeout: float) -> tuple[SequenceTimeline, ...]:
        """What the sequences with one of `names` have done with their time; none if nobody knows them (any more).

        Raises `Overloaded` if the scheduler does not answer within `timeout` seconds."""
        self.engine()
        answer = await self._ask(lambda token: GetTimeline(token=token, request_ids=names), timeout)
        if answer is None:
            raise Overloaded(f"the scheduler gave no answer within {timeout:.1f} s", retry_after=1.0)
        told: Timeline = answer
        return told.sequences

    async def _ask(self, question: Callable[[int], Message], timeout: float) -> Any:
        """The scheduler's answer to `question` (of a token); None if it could not be asked or is too late."""
        self._tokens += 1
        token = self._tokens
        if not self._send(question(token)):
            return None
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[token] = answer
        try:
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            return None
        finally:
            self._asked.pop(token, None)

    # ---- the end -----------------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Take nothing new; wait up to `seconds` for what runs; then end the rest with an error."""
        self.closing = True
        deadline = time.monotonic() + seconds
        while len(self.table) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.fail_all(EngineDead("the server has shut down before this request was done"))
        self._flush_aborts()  # now: the sockets close next
        self._aborts = []

    def fail_all(self, error: EngineError) -> None:
        """End every live request with `error`, here and in the engine."""
        keys, delivery = self.table.end_all(error.code, error.message, time.time())
        self.abort(keys)
        self._share_out(delivery)
