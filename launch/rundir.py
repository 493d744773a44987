"""The run directory of an engine: made, locked, described, found and removed.

Owns the files beside the sockets: `engine.json` (the card: who runs here) and `lock` (held as long as the supervisor
lives; the kernel lets go of it however the supervisor ends). Must not open a socket.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..protocol.config import EngineConfig
from ..protocol.endpoints import Endpoints, make_run_dir, runtime_root

CARD = "engine.json"
LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Card:
    """What other processes may know about an engine without speaking to it."""

    pid: int  # of the supervisor
    model: str
    url: str | None  # of the HTTP server
    started: float  # time.time()


class RunDir:
    """The directory of an engine that this process supervises."""

    def __init__(self, config: EngineConfig, url: str | None) -> None:
        remove_dead()
        self.path = make_run_dir()
        self.endpoints = Endpoints(str(self.path))
        # Locked before it has its name: a directory with a lock that nobody holds is a dead engine's.
        unnamed = self.path / f"{LOCK}.new"
        self._lock: IO[str] = unnamed.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / LOCK)
        card = Card(pid=os.getpid(), model=config.model_name, url=url, started=time.time())
        (self.path / CARD).write_text(json.dumps(dataclasses.asdict(card)))

    def write_config(self, config: EngineConfig) -> None:
        """Write what the actors read when they start."""
        self.endpoints.config_file.touch(mode=0o600)  # it may hold an API key
        self.endpoints.config_file.write_text(config.to_json())

    def remove(self) -> None:
        """Remove the directory with all in it."""
        shutil.rmtree(self.path)
        self._lock.close()


def read_card(run_dir: Path) -> Card:
    """Who runs in `run_dir`. Raises `OSError` if there is no card."""
    return Card(**json.loads((run_dir / CARD).read_text()))


def living() -> list[tuple[Path, Card]]:
    """The engines of this user that run now, oldest first."""
    found = [(path, read_card(path)) for path in _all() if _held(path) and (path / CARD).exists()]
    return sorted(found, key=lambda item: item[1].started)


def remove_dead() -> None:
    """Remove what killed supervisors have left behind."""
    for path in _all():
        if (path / LOCK).exists() and not _held(path):
            shutil.rmtree(path, ignore_errors=True)  # another engine may be removing it at the same moment


def _all() -> list[Path]:
    root = runtime_root()
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _held(path: Path) -> bool:
    """Whether a living supervisor holds the directory's lock."""
    try:
        with (path / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # being made, or being removed
        return False
    return False
