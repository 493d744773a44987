"""The actors of one engine and what they say: control link, standard error, exits.

Owns the control link's ROUTER and the wait for everything that can happen; used by one thread, the supervisor's.
Must not know when to start or stop.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from ..protocol.actor import CONTROL_HWM
from ..protocol.channel import PeerGone, Wire
from ..protocol.endpoints import Endpoints
from ..protocol.errors import ClientError, EngineError, ProtocolError, StartupError, error_from_code
from ..protocol.messages import PROTOCOL_VERSION, Fatal, Heartbeat, Hello, Message, Progress, Ready, Shutdown
from .actors import Actor, ProcessActor, how_it_ended

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.5  # a Fatal may still be under way when its sender is already gone
SILENCE_SECONDS = 60.0  # without a heartbeat: worth a line in the log

Event = Progress | Ready


class Bell:
    """Wakes the supervisor's thread from any other, and from a signal handler."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def ring(self) -> None:
        with suppress(BlockingIOError, OSError):  # full: it rings already; closed: nobody is left to wake
            self._writer.send(b"!")

    def silence(self) -> None:
        with suppress(BlockingIOError):
            while self.reader.recv(64):
                pass

    def close(self) -> None:
        self.reader.close()
        self._writer.close()


class Crew:
    """The running actors.

    Args:
        endpoints: whose control link to bind.
        bell: rung when an actor ends or the owner wants something.
        on_event: is given what actors tell of their start.
        on_line: is given each line of an actor's standard error.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        bell: Bell,
        on_event: Callable[[Event], None],
        on_line: Callable[[str, str], None],
    ) -> None:
        self.actors: dict[str, Actor] = {}
        self._wire = Wire()
        self._control = self._wire.bind_router(endpoints.control, hwm=CONTROL_HWM)
        self._bell = bell
        self._on_event = on_event
        self._on_line = on_line
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell.reader, selectors.EVENT_READ)
        self._selector.register(self._control.raw.fileno(), selectors.EVENT_READ)

    def add(self, actor: Actor) -> None:
        """Watch an actor that has just been started."""
        self.actors[actor.role] = actor
        if isinstance(actor, ProcessActor):
            self._selector.register(actor.fileno(), selectors.EVENT_READ)

    def turn(self, timeout: float) -> None:
        """Take in what has happened; wait up to `timeout` seconds for something to happen."""
        # ZeroMQ's descriptor tells of a change, not of a state: empty the socket before waiting on it.
        self._read_control()
        self._selector.select(timeout)
        self._bell.silence()
        self._read_control()
        for actor in self.actors.values():
            self._read_lines(actor)

    def order_stop(self, actor: Actor, drain_seconds: float) -> bool:
        """Tell an actor to stop; False if it can't be told."""
        try:
            return self._control.send(Shutdown(drain_seconds=drain_seconds), actor.role)
        except PeerGone:
            return False

    def failure(self, kind: type[EngineError]) -> EngineError | None:
        """The engine's failure, as a `kind`, if an actor has failed. Waits a moment for the last words of one that is
        gone."""
        for actor in self.actors.values():
            if actor.fatal is not None or actor.status is not None:
                deadline = time.monotonic() + LAST_WORDS_SECONDS
                while actor.fatal is None and (left := deadline - time.monotonic()) > 0:
                    self.turn(min(left, 0.05))
                return _failure_of(actor, kind)
        return None

    def warn_of_silence(self) -> None:
        """Log, once for each silence, an actor that is there but says nothing."""
        now = time.monotonic()
        for actor in self.actors.values():
            if actor.ready is not None and now - actor.last_beat > SILENCE_SECONDS:
                log.warning("%s has been busy with one thing for %.0f s", actor.role, now - actor.last_beat)
                actor.last_beat = now

    def close(self) -> None:
        """Let go of sockets and pipes; the actors have ended by now."""
        for actor in self.actors.values():
            self._read_lines(actor)
            actor.close()
        self._selector.close()
        self._wire.close()

    def _read_control(self) -> None:
        while (received := self._control.receive()) is not None:
            sender, message = received
            actor = self.actors.get(sender)
            if isinstance(message, ProtocolError):
                log.warning("unreadable message on the control link from %s: %s", sender, message)
            elif actor is None:
                log.warning("message on the control link from an unknown actor %r", sender)
            else:
                self._handle(actor, message)

    def _handle(self, actor: Actor, message: Message) -> None:
        actor.last_beat = time.monotonic()
        if isinstance(message, Hello):
            actor.said_hello = True
            if message.version_major != PROTOCOL_VERSION[0]:
                actor.fatal = Fatal(
                    actor=actor.role,
                    code=StartupError.code,
                    message=f"{actor.role} speaks version {message.version_major} of the wire, this is version "
                    f"{PROTOCOL_VERSION[0]}: reinstall fast-inference",
                )
        elif isinstance(message, Progress):
            self._on_event(message)
        elif isinstance(message, Ready):
            actor.ready = message
            self._on_event(message)
        elif isinstance(message, Fatal):
            actor.fatal = message
        elif not isinstance(message, Heartbeat):
            log.warning("%s has no place on the control link (from %s)", type(message).__name__, actor.role)

    def _read_lines(self, actor: Actor) -> None:
        lines, open_ = actor.read_lines()
        for line in lines:
            self._on_line(actor.role, line)
        if not open_ and isinstance(actor, ProcessActor) and actor.fileno() in self._selector.get_map():
            self._selector.unregister(actor.fileno())


def _failure_of(actor: Actor, kind: type[EngineError]) -> EngineError:
    if actor.fatal is not None:
        error = error_from_code(actor.fatal.code, actor.fatal.message)
        if isinstance(error, ClientError | StartupError):  # says what to do; who found it is of no interest
            return kind(error.message)
        return kind(f"{actor.role} failed: {error.message}")
    text = f"{actor.role} {how_it_ended(actor.status or 0)}"
    if actor.last_line():
        text += f"; its last words: {actor.last_line()}"
    elif actor.status == -9:
        text += " (often the system was out of memory)"
    return kind(text)


def any_alive(actors: Iterable[Actor]) -> bool:
    """Whether one of the actors has not ended."""
    return any(actor.status is None for actor in actors)
