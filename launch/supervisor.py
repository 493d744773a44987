"""The supervisor: starts the actors of one engine, watches them, stops them, leaves nothing behind.

Owns the run directory and the actors' life cycles. One thread of its own does all of it (the kernel ties a child's
death signal to the thread that started it), so it works under a command line, a notebook or another server alike.
Must not know requests, tokens or tensors. An actor that fails ends the engine.
"""

from __future__ import annotations

import logging
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol.config import EngineConfig
from ..protocol.endpoints import Endpoints
from ..protocol.errors import EngineDead, EngineError, StartupError
from ..protocol.names import DETOKENIZER, EXECUTOR, FRONTEND, SCHEDULER, actors, index_of, kind_of
from .actors import Actor, ProcessActor, ThreadActor
from .child import run_actor
from .crew import Bell, Crew, Event, any_alive
from .listener import listen, url_of
from .rundir import RunDir

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Who takes in work stops first, who finishes it last.
STOP_ORDER = (FRONTEND, SCHEDULER, EXECUTOR, DETOKENIZER)

STOP_SECONDS = 5.0  # from the order to stop (and the end of the drain time) to SIGTERM
TERMINATE_SECONDS = 2.0  # from SIGTERM to SIGKILL, and from there until an actor is given up
TURN_SECONDS = 1.0

Command = Callable[[str, Path, int | None], Sequence[str]]


class State(Enum):
    """Where the engine is in its life; it only moves down this list."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"


def child_command(role: str, run_dir: Path, http_fd: int | None) -> Sequence[str]:
    """The command line of an actor's process."""
    command = [sys.executable, "-m", f"{__package__}.child", role, str(run_dir)]
    return command if http_fd is None else [*command, "--http-fd", str(http_fd)]


def print_line(role: str, line: str) -> None:
    """Pass a line of an actor's standard error on to ours."""
    print(line, file=sys.stderr, flush=True)


class Supervisor:
    """One engine's supervisor. Its methods may be called from any thread.

    Args:
        config: the settings; `config.model` is a local folder, "class:NAME" or "live" by now.
        model: a live module, run by an executor on a thread of this process.
        save_tokenizer: writes a live tokenizer into the folder that it is given.
        command: makes an actor's command line (tests put stubs in).
        on_line: is given each line that an actor writes, on the supervisor's thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: torch.nn.Module | None = None,
        save_tokenizer: Callable[[Path], None] | None = None,
        command: Command = child_command,
        on_line: Callable[[str, str], None] = print_line,
    ) -> None:
        self.config = config
        self.state = State.NEW
        self.failure: EngineError | None = None
        self.url: str | None = None
        self.start_seconds = 0.0  # from `start` until all were ready
        self._model = model
        self._save_tokenizer = save_tokenizer
        self._command = command
        self._on_line = on_line
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._end_callbacks: list[Callable[[EngineError | None], None]] = []
        self._stop_asked = False
        self._hurry = False
        self._drain_seconds = 0.0
        self._http: list[socket.socket] = []  # one for each frontend

    def start(self) -> None:
        """Take the port and the run directory and start the actors; returns at once.

        Raises: `StartupError` if the port is taken or no run directory can be made.
        """
        if self.config.port is not None:
            self._http = listen(self.config.host, self.config.port, self.config.api_server_count)
            self.url = url_of(self._http[0], self.config.host)
        try:
            self._run_dir = RunDir(self.config, self.url)
            self._write_config()
        except BaseException:
            self._close_http()
            raise
        self._bell = Bell()
        self._crew = Crew(self._run_dir.endpoints, self._bell, self._events.put, self._on_line)
        self._began = time.monotonic()
        self.state = State.STARTING
        threading.Thread(target=self._main, name="fast-inference-supervisor", daemon=True).start()

    def wait_ready(self, on_event: Callable[[Event], None] | None = None) -> None:
        """Block until every actor is ready, handing each `Progress` and `Ready` to `on_event`.

        Raises: the engine's failure, or `EngineDead` if it was stopped meanwhile; nothing is left running then.
        """
        while (event := self._events.get()) is not None:
            if on_event is not None:
                on_event(event)
        if self.state is not State.READY:
            self._ended.wait()
            raise self.failure or EngineDead("the engine was stopped while it started")

    def follow(self, on_event: Callable[[Event], None]) -> None:
        """Block until the end of a ready engine, handing what actors tell of their progress to `on_event`."""
        while (event := self._events.get()) is not None:
            on_event(event)
        self._ended.wait()

    def request_stop(self, drain_seconds: float = 0.0) -> None:
        """Ask for a stop and return at once; fit for a signal handler. A second call skips all waiting.

        Args:
            drain_seconds: how long running requests may go on.
        """
        self._hurry = self._stop_asked
        self._drain_seconds = drain_seconds
        self._stop_asked = True
        if self.state is not State.NEW:
            self._bell.ring()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop the engine and wait until nothing of it is left."""
        if self.state is State.NEW:
            return
        if not self._stop_asked:
            self.request_stop(drain_seconds)
        self._ended.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the engine's end; False if it still runs after `timeout` seconds."""
        return self._ended.wait(timeout)

    def on_end(self, callback: Callable[[EngineError | None], None]) -> None:
        """Have `callback(failure)` called, on the supervisor's thread, as soon as the engine begins to end."""
        self._end_callbacks.append(callback)
        if self.state in (State.STOPPING, State.STOPPED):  # it may have missed the call; a second one does no harm
            callback(self.failure)

    @property
    def endpoints(self) -> Endpoints:
        """The engine's links."""
        return self._run_dir.endpoints

    @property
    def facts(self) -> dict[str, dict[str, str | int | float]]:
        """What each actor told of itself when it was ready."""
        return {role: dict(a.ready.facts) for role, a in self._crew.actors.items() if a.ready is not None}

    @property
    def pids(self) -> dict[str, int]:
        """The process of each actor."""
        return {role: actor.pid for role, actor in self._crew.actors.items()}

    def _write_config(self) -> None:
        try:
            if self._save_tokenizer is not None:
                folder = self._run_dir.path / "tokenizer"
                self._save_tokenizer(folder)
                self.config = self.config.replace(tokenizer=str(folder))
            self._run_dir.write_config(self.config)
        except BaseException:
            self._run_dir.remove()
            raise

    # ---- on the supervisor's thread ------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._live()
        except EngineError as error:
            self.failure = error
        except Exception as error:  # the thread's outermost frame: the owner must hear of it
            log.exception("the supervisor failed")
            self.failure = EngineError(f"the supervisor failed: {type(error).__name__}: {error}")
        finally:
            self.state = State.STOPPING
            try:
                for callback in self._end_callbacks:
                    callback(self.failure)
            finally:
                self._end()

    def _live(self) -> None:
        for role in actors(self.config.api_server_count):
            self._crew.add(self._launch(role))
        self._close_http()  # the frontends' alone now: when it stops listening, nobody does
        while not self._stop_asked:
            self._crew.turn(TURN_SECONDS)
            kind = StartupError if self.state is State.STARTING else EngineDead
            if (failure := self._crew.failure(kind)) is not None:
                raise failure
            if self.state is State.STARTING:
                self._look_whether_ready()
            self._crew.warn_of_silence()

    def _launch(self, role: str) -> Actor:
        if role == EXECUTOR and self._model is not None:
            model = self._model
            return ThreadActor(role, lambda: run_actor(role, self.config, self.endpoints, model=model), self._bell.ring)
        http = self._http[index_of(role)].fileno() if self._http and kind_of(role) == FRONTEND else None
        command = self._command(role, self._run_dir.path, http)
        return ProcessActor(role, command, self._bell.ring, () if http is None else (http,))

    def _look_whether_ready(self) -> None:
        waiting = [role for role, actor in self._crew.actors.items() if actor.ready is None]
        if not waiting:
            self.start_seconds = time.monotonic() - self._began
            self.state = State.READY
            self._events.put(None)
        elif time.monotonic() > self._began + self.config.start_timeout:
            raise StartupError(
                f"{', '.join(waiting)} not ready within {self.config.start_timeout:g} s: see the log above, "
                "or give it more time with --start-timeout"
            )

    def _end(self) -> None:
        try:
            self._stop_actors()
        finally:
            self._close_http()
            self._crew.close()
            self._bell.close()
            self._run_dir.remove()
            self.state = State.STOPPED
            self._events.put(None)
            self._ended.set()

    def _stop_actors(self) -> None:
        everyone = list(self._crew.actors.values())
        # Who isn't ready has no work to finish, and may be deep in loading, where it hears no order.
        unready = [actor for actor in everyone if actor.ready is None]
        for actor in unready:
            if not isinstance(actor, ProcessActor):
                self._crew.order_stop(actor, 0.0)
            actor.terminate()
        for kind in STOP_ORDER:
            drain = self._drain_seconds if kind == FRONTEND and self.failure is None else 0.0
            group = [a for a in everyone if kind_of(a.role) == kind and a not in unready and a.status is None]
            told = [actor for actor in group if not self._hurry and self._crew.order_stop(actor, drain)]
            self._await_end(told, drain + STOP_SECONDS)
            for actor in group:
                actor.terminate()
        self._await_end(everyone, TERMINATE_SECONDS)
        for actor in everyone:
            actor.kill()
        self._hurry = False
        self._await_end(everyone, TERMINATE_SECONDS)
        for actor in everyone:
            if actor.status is None:
                log.error("%s (process %d) can't be stopped", actor.role, actor.pid)

    def _await_end(self, actors: Sequence[Actor], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any_alive(actors) and not self._hurry and (left := deadline - time.monotonic()) > 0:
            self._crew.turn(min(left, TURN_SECONDS))

    def _close_http(self) -> None:
        for http in self._http:
            http.close()
        self._http = []
