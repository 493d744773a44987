"""The control link: between every actor and the supervisor."""

from __future__ import annotations

from dataclasses import dataclass, field

from .version import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of each actor's life."""

    actor: str
    pid: int
    version_major: int = PROTOCOL_VERSION[0]
    version_minor: int = PROTOCOL_VERSION[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What an actor is doing while it starts: `done` of `total` (0: unknown) in `phase`."""

    actor: str
    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """An actor can take work. `facts`: a few words for the log (seconds by phase, blocks, port)."""

    actor: str
    facts: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Sent about once a second. `tick` counts turns of the actor's loop: alive without progress is visible."""

    actor: str
    tick: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fatal:
    """An actor's last words before it exits. `code` as in `errors.py`; `detail` may hold a traceback."""

    actor: str
    code: str
    message: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """The supervisor's order to stop: first finish what is under way for `drain_seconds`, then leave."""

    drain_seconds: float = 0.0
