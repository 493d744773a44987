"""The detokenizer's process: tokens in, text out, for all streams of one frontend.

Owns the loop around `DetokenizerCore`: receive, hand in, send out; keep and merge what can't be sent yet. Must not
know how text is made. Speaks to the scheduler (`tokens` in, `requests` out) and to its frontend (`text` out).
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence

from ..protocol.actor import Control
from ..protocol.channel import Wire, ZmqSocket
from ..protocol.config import EngineConfig
from ..protocol.endpoints import Endpoints
from ..protocol.errors import ProtocolError
from ..protocol.messages import Deliver, StopFound
from ..protocol.names import index_of
from .detokenizer_core import DetokenizerCore, Effect, Send
from .outbox import Outbox
from .vocabulary import Vocabulary, load_vocabulary

__all__ = ["DetokenizerCore", "run"]

log = logging.getLogger(__name__)

TOKENS_HWM = 1000  # steps; beyond, the scheduler keeps and merges
TEXT_HWM = 1000  # batches to one frontend; beyond, they are merged here
REQUESTS_HWM = 1000
DELIVERS_PER_TURN = 16
IDLE_SECONDS = 0.5  # longest sleep: the heart must beat
RETRY_SECONDS = 0.005  # between two tries to send to a frontend that is full


def run(config: EngineConfig, endpoints: Endpoints, wire: Wire, control: Control) -> None:
    """The detokenizer's process: until the supervisor orders it to stop, and then until every stream has ended or
    the drain time is over. Raises `StartupError` if there is no tokenizer to load."""
    index = index_of(control.actor)
    tokens = wire.bind_pull(endpoints.tokens_of(index), hwm=TOKENS_HWM)
    text = wire.bind_router(endpoints.text_of(index), hwm=TEXT_HWM)
    requests = wire.dealer(endpoints.requests, control.actor, hwm=REQUESTS_HWM)
    control.progress("loading the tokenizer")
    started = time.monotonic()
    vocabulary = None if config.skip_tokenizer_init else _load(config)
    gc.freeze()  # what is loaded stays: a full collection that walked it would hold up every stream
    control.ready(seconds=round(time.monotonic() - started, 3))
    _Loop(DetokenizerCore(vocabulary), tokens, text, requests).run(wire, control)


def _load(config: EngineConfig) -> Vocabulary:
    source = config.tokenizer
    if source is None:
        source = "" if config.model == "live" or config.model.startswith("class:") else config.model
    return load_vocabulary(source, config.revision, config.trust_remote_code)


class _Loop:
    """The shell: receive, hand in, send out."""

    def __init__(self, core: DetokenizerCore, tokens: ZmqSocket, text: ZmqSocket, requests: ZmqSocket) -> None:
        self._core = core
        self._tokens = tokens
        self._text = text
        self._requests = requests
        self._outbox = Outbox(text.send)
        self._stops: dict[str, list[int]] = {}  # by reason: numbers to tell the scheduler
        self._drained = False  # the last turn left nothing in the `tokens` queue

    def run(self, wire: Wire, control: Control) -> None:
        watched = (self._tokens, self._text, self._requests, control.socket)
        deadline: float | None = None
        while True:
            timeout = RETRY_SECONDS if self._outbox or self._stops else IDLE_SECONDS
            ready = wire.wait(watched, timeout if self._drained else 0.0)
            for name, socket in (("text", self._text), ("requests", self._requests)):
                if socket in ready and (received := socket.receive()) is not None:
                    _refuse(name, received[1])
            self._turn()
            shutdown = control.turn()
            if shutdown is not None:
                deadline = deadline or time.monotonic() + shutdown.drain_seconds
                idle = not (len(self._core) or self._outbox or self._stops)
                if self._drained and (idle or time.monotonic() >= deadline):
                    return

    def _turn(self) -> None:
        """Take in what has come, in a bounded portion, and send what came of it."""
        self._drained = False
        for _ in range(DELIVERS_PER_TURN):
            if (received := self._tokens.receive()) is None:
                self._drained = True
                break
            message = received[1]
            if not isinstance(message, Deliver):
                _refuse("tokens", message)
                continue
            try:
                self._perform(self._core.handle(message, time.time()))
            except ProtocolError as error:
                _refuse("tokens", error)
        self._send()

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._outbox.add(effect.frontend, effect.batch)
            else:
                self._stops.setdefault(effect.reason, []).extend(effect.numbers)

    def _send(self) -> None:
        if self._outbox:
            for frontend in self._outbox.flush(time.monotonic()):
                log.warning("frontend %s is gone: its streams are ended", frontend)
                self._perform(self._core.drop(frontend))
            for frontend in self._outbox.overfull():
                effects = self._core.fail(frontend, f"frontend {frontend} does not read its text", time.time())
                if effects:
                    log.error("frontend %s does not read its text: its streams are ended", frontend)
                self._perform(effects)
        for reason, numbers in list(self._stops.items()):
            if self._requests.send(StopFound(numbers=tuple(numbers), reason=reason)):
                del self._stops[reason]


def _refuse(link: str, message: object) -> None:
    """Nothing but what WIRE.md says comes by this link; whoever sent something else goes on without an answer."""
    reason = message if isinstance(message, ProtocolError) else f"unexpected {type(message).__name__}"
    log.warning("%s link: %s", link, reason)
