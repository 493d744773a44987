"""What every actor does besides its work: say hello, tell progress, beat, hear the order to stop.

Owns an actor's end of the control link, which is apart from the data links so that a busy inbox never hides a dead
or a dying actor. Must not know any actor's work.
"""

from __future__ import annotations

import os
import time

from .channel import Wire, ZmqSocket
from .endpoints import Endpoints
from .errors import EngineError
from .messages import Fatal, Heartbeat, Hello, Progress, Ready, Shutdown

CONTROL_HWM = 1000
BEAT_SECONDS = 1.0


class Control:
    """One actor's control link. Not thread-safe: it belongs to the actor's loop."""

    def __init__(self, wire: Wire, endpoints: Endpoints, actor: str) -> None:
        self.actor = actor
        self.socket: ZmqSocket = wire.dealer(endpoints.control, actor, hwm=CONTROL_HWM)
        self.shutdown: Shutdown | None = None
        self._tick = 0
        self._next_beat = 0.0
        self.socket.send(Hello(actor=actor, pid=os.getpid()))

    def progress(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Say what the actor is doing while it starts."""
        self.socket.send(Progress(actor=self.actor, phase=phase, done=done, total=total))

    def ready(self, **facts: str | int | float) -> None:
        """Say that the actor can take work."""
        self.socket.send(Ready(actor=self.actor, facts=facts))

    def fatal(self, error: BaseException, detail: str = "") -> None:
        """Last words."""
        code = error.code if isinstance(error, EngineError) else EngineError.code
        message = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        self.socket.send(Fatal(actor=self.actor, code=code, message=message, detail=detail))

    def turn(self) -> Shutdown | None:
        """Once per turn of the actor's loop: beat when it is time, and return the order to stop once it came."""
        self._tick += 1
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_SECONDS
            self.socket.send(Heartbeat(actor=self.actor, tick=self._tick))
        while (received := self.socket.receive()) is not None:
            message = received[1]
            if isinstance(message, Shutdown):
                self.shutdown = message
        return self.shutdown
