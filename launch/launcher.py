"""One engine from its settings to ready, and to its end: finds the model, then supervises the actors.

Owns the order of the two; what the command line and the embedding engines share. Must not know requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol.config import EngineConfig
from ..protocol.errors import EngineDead, EngineError
from .crew import Event
from .models import ModelFinder
from .supervisor import Supervisor, print_line

if TYPE_CHECKING:
    import torch


class Launcher:
    """Starts and stops one engine. `start` blocks; the other methods may be called meanwhile from any thread.

    Args:
        config: the settings as the user gave them.
        model: a live module in place of `config.model`.
        save_tokenizer: writes a live tokenizer into the folder that it is given.
        on_line: is given each (actor, line) of the actors' standard error.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: torch.nn.Module | None = None,
        save_tokenizer: Callable[[Path], None] | None = None,
        on_line: Callable[[str, str], None] = print_line,
    ) -> None:
        self.config = config
        self._model = model
        self._save_tokenizer = save_tokenizer
        self._on_line = on_line
        self._finder = ModelFinder()
        self._lock = threading.Lock()  # guards the two below: a stop must not fall between finding and starting
        self._supervisor: Supervisor | None = None
        self._stopped = False

    def start(self, on_event: Callable[[Event], None] | None = None) -> Supervisor:
        """Start everything and wait until it is ready.

        Args:
            on_event: is given each `Progress` and `Ready`, on this thread.

        Raises: `EngineError` with the reason if the engine does not get ready; nothing is left running then.
        """
        self.config = self._finder.find(self.config, on_event or (lambda event: None))
        with self._lock:
            if self._stopped:
                raise EngineDead("the engine was stopped while it started")
            supervisor = Supervisor(
                self.config, model=self._model, save_tokenizer=self._save_tokenizer, on_line=self._on_line
            )
            supervisor.start()
            self._supervisor = supervisor
        supervisor.wait_ready(on_event)
        return supervisor

    @property
    def supervisor(self) -> Supervisor:
        """The supervisor. Raises `EngineDead` before there is one."""
        if self._supervisor is None:
            raise EngineDead("the engine has not been started")
        return self._supervisor

    @property
    def failure(self) -> EngineError | None:
        """What ended the engine, if it ended by itself."""
        return None if self._supervisor is None else self._supervisor.failure

    def request_stop(self, drain_seconds: float = 0.0) -> None:
        """Ask for a stop and return at once, whatever is going on; a second call skips all waiting."""
        # No lock: a signal handler may run in the middle of `start`, on the thread that holds it.
        self._stopped = True
        self._finder.cancel()
        if self._supervisor is not None:
            self._supervisor.request_stop(drain_seconds)

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop the engine and wait until nothing of it is left."""
        if not self._stopped:
            self.request_stop(drain_seconds)
        with self._lock:
            supervisor = self._supervisor
        if supervisor is not None:
            supervisor.stop()
