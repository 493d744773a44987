"""One running actor as the supervisor sees it: a process, or (a live model) a thread of this process.

Owns starting, the end of the process, its standard error; must not know the order of starting and stopping.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ..protocol.messages import Fatal, Ready

LAST_LINES = 20
READ_BYTES = 1 << 16
FLOOD_BYTES = 1 << 20  # read at most this much at once, so that no flood of lines holds up the supervisor


class Actor(Protocol):
    """What the supervisor asks of an actor. `status` is None as long as it runs, then an exit status (negative: the
    number of the signal that killed it)."""

    role: str
    pid: int
    status: int | None
    said_hello: bool
    ready: Ready | None
    fatal: Fatal | None
    last_beat: float

    def read_lines(self) -> tuple[list[str], bool]:
        """New whole lines of its standard error, and whether more may come."""

    def last_line(self) -> str:
        """The last line of its standard error that said something."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class ProcessActor:
    """An actor in a process of its own."""

    def __init__(
        self,
        role: str,
        command: Sequence[str],
        on_exit: Callable[[], None],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.role = role
        self.status: int | None = None
        self.said_hello = False
        self.ready: Ready | None = None
        self.fatal: Fatal | None = None
        self.last_beat = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # standard output is the user's: `generate` prints its answer there
            pass_fds=tuple(pass_fds),
            start_new_session=True,  # a Ctrl-C in the terminal is the supervisor's alone to act on
        )
        assert self._process.stdout is not None
        self._stderr = self._process.stdout
        os.set_blocking(self._stderr.fileno(), False)
        self._partial = b""
        self._lines: list[str] = []
        self.pid = self._process.pid
        self._on_exit = on_exit
        threading.Thread(target=self._wait, name=f"wait-{role}", daemon=True).start()

    def fileno(self) -> int:
        """Of its standard error, to wait on."""
        return self._stderr.fileno()

    def _wait(self) -> None:
        self.status = self._process.wait()
        self._on_exit()

    def read_lines(self) -> tuple[list[str], bool]:
        chunk, more = b"", True
        with contextlib.suppress(BlockingIOError):
            while more and len(chunk) < FLOOD_BYTES:
                part = os.read(self._stderr.fileno(), READ_BYTES)
                chunk += part
                more = bool(part)
        *whole, self._partial = (self._partial + chunk).split(b"\n")
        if not more and self._partial:
            whole.append(self._partial)
            self._partial = b""
        lines = [line.decode(errors="replace").rstrip() for line in whole]
        self._lines = [*self._lines, *(line for line in lines if line.strip())][-LAST_LINES:]
        return lines, more

    def last_line(self) -> str:
        return self._lines[-1] if self._lines else ""

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Let go of its standard error."""
        self._stderr.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.status is None:
            self._process.send_signal(number)


class ThreadActor:
    """An actor on a thread of this process: the executor of a live module. A thread can't be killed."""

    def __init__(self, role: str, run: Callable[[], int], on_exit: Callable[[], None]) -> None:
        self.role = role
        self.pid = os.getpid()
        self.status: int | None = None
        self.said_hello = False
        self.ready: Ready | None = None
        self.fatal: Fatal | None = None
        self.last_beat = time.monotonic()
        self._run = run
        self._on_exit = on_exit
        threading.Thread(target=self._body, name=f"fast-inference-{role}", daemon=True).start()

    def _body(self) -> None:
        status = 1
        try:
            status = self._run()
        finally:
            self.status = status
            self._on_exit()

    def read_lines(self) -> tuple[list[str], bool]:
        return [], False

    def last_line(self) -> str:
        return ""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
