"""The scheduler process: the loop around `core.py`.

Owns the sockets of the scheduler and what cannot be sent at once; must not know how anything is decided. Speaks to
frontends and detokenizers (`requests`, ROUTER), the executor (`steps`, `results`), the detokenizers (`tokens`) and the
supervisor (control).

What happens at a full queue: `steps` never fills, since no more steps are in flight than it holds; what `tokens`
has no room for is merged into the next `Deliver`; a reply to a frontend is kept and sent later, and dropped with a
log line only if that frontend is gone.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from ..protocol.actor import Control
from ..protocol.channel import PeerGone, Socket, Wire
from ..protocol.config import EngineConfig
from ..protocol.endpoints import Endpoints
from ..protocol.errors import ProtocolError
from ..protocol.messages import Deliver, Message, Step
from .core import DETOKENIZER, EXECUTOR, Effect, Log, SchedulerCore
from .fanout import Fanout
from .recorder import RecordedCore

logger = logging.getLogger(__name__)

REQUESTS_HWM = 10_000
STEPS_HWM = 16  # more than config.run_ahead may ever be
RESULTS_HWM = 16
TOKENS_HWM = 256
PORTION = 64  # messages read from the requests link before results are looked at again
IDLE_SECONDS = 0.5  # how long to sleep when nothing comes; also how late a heartbeat may be
LAST_WORDS_SECONDS = 1.0
RETRY_SECONDS = 0.005  # how soon to try again to send what was kept back
# The core makes no reference cycles, so the collector finds nothing: let it look rarely, and never at what is there
# from the start.
GC_THRESHOLDS = (50_000, 20, 50)


class Shell:
    """Moves messages between the sockets and the core. One `turn` reads, thinks and writes without ever blocking."""

    def __init__(
        self,
        core: SchedulerCore | RecordedCore,
        *,
        requests: Socket,
        results: Socket,
        steps: Socket,
        tokens: Sequence[Socket],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.core = core
        self._requests = requests
        self._results = results
        self._steps = steps
        self._tokens = Fanout(tokens)
        self._clock = clock
        self._replies: deque[tuple[str, Message]] = deque()  # for frontends
        self._unsent: deque[Step] = deque()  # for the executor

    @property
    def held_back(self) -> bool:
        """Whether something waits for room in a queue."""
        return self._tokens.holds_back or bool(self._replies) or bool(self._unsent)

    def turn(self) -> bool:
        """One round: results first, since a device waits behind them and a reader before them; then a portion of
        requests; then the next steps. Returns whether anything was read."""
        if self.held_back:
            self._send_held()
        busy = False
        while (received := self._results.receive()) is not None:
            busy = True
            self._take(received[1], EXECUTOR)
            self._send_steps()
        for _ in range(PORTION):
            received = self._requests.receive()
            if received is None:
                break
            busy = True
            self._take(received[1], received[0])
        self._send_steps()
        return busy

    def perform(self, effects: list[Effect]) -> None:
        """Do what the core asked for."""
        for effect in effects:
            if isinstance(effect, Log):
                logger.log(logging.getLevelNamesMapping()[effect.level.upper()], effect.text)
            elif effect.to == DETOKENIZER and isinstance(effect.message, Deliver):
                self._tokens.deliver(effect.message)
            elif self._replies or not self._reply(effect.to, effect.message):
                self._replies.append((effect.to, effect.message))

    def _take(self, message: Message | ProtocolError, sender: str) -> None:
        if isinstance(message, ProtocolError):
            logger.warning("a message from %r can't be read: %s", sender, message)
            return
        self.perform(self.core.handle(message, self._clock(), sender))

    def _send_steps(self) -> None:
        while not self._unsent and (step := self.core.schedule(self._clock())) is not None:
            if not self._steps.send(step):
                self._unsent.append(step)

    def _reply(self, to: str, message: Message) -> bool:
        try:
            return self._requests.send(message, to)
        except PeerGone:
            logger.info("%s is gone: its %s is dropped", to, type(message).__name__)
            return True

    def _send_held(self) -> None:
        self._tokens.flush()
        while self._unsent and self._steps.send(self._unsent[0]):
            self._unsent.popleft()
        while self._replies and self._reply(*self._replies[0]):
            self._replies.popleft()


def run(config: EngineConfig, endpoints: Endpoints, wire: Wire, control: Control) -> None:
    """The scheduler's life; returns after a `Shutdown`, once what was under way is done or its time is over."""
    core = SchedulerCore(config)
    if config.journal is None:
        _serve(core, config, endpoints, wire, control)
        return
    recorded = RecordedCore(core, config)
    try:
        _serve(recorded, config, endpoints, wire, control)
    finally:  # of a failure, too: the journal is to tell of it
        recorded.close()


def _serve(
    core: SchedulerCore | RecordedCore, config: EngineConfig, endpoints: Endpoints, wire: Wire, control: Control
) -> None:
    requests = wire.bind_router(endpoints.requests, hwm=REQUESTS_HWM)
    results = wire.bind_pull(endpoints.results, hwm=RESULTS_HWM)
    steps = wire.push(endpoints.steps, hwm=STEPS_HWM)
    tokens = [wire.push(endpoints.tokens_of(i), hwm=TOKENS_HWM) for i in range(config.api_server_count)]
    shell = Shell(core, requests=requests, results=results, steps=steps, tokens=tokens)
    sockets = (results, requests, control.socket)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    control.ready()
    deadline = None
    while True:
        busy = shell.turn()  # before the control link: somebody waits for these
        shutdown = control.turn()
        if shutdown is not None and deadline is None:
            deadline = time.monotonic() + shutdown.drain_seconds
            shell.perform(core.handle(shutdown, time.time()))
        if deadline is not None and (core.idle or time.monotonic() >= deadline):
            break
        if busy:
            continue
        pause = RETRY_SECONDS if shell.held_back else IDLE_SECONDS
        if deadline is not None:
            pause = min(pause, max(deadline - time.monotonic(), 0.0))
        wire.wait(sockets, pause)
    shell.perform(core.end_all(time.time()))
    last = time.monotonic() + LAST_WORDS_SECONDS
    while shell.held_back and time.monotonic() < last:
        shell.turn()
        wire.wait((control.socket,), RETRY_SECONDS)
    if shell.held_back:
        logger.error("a detokenizer did not take the last words of the scheduler within %g s", LAST_WORDS_SECONDS)
