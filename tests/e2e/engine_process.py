"""A `fast-inference serve` process under test: started, spoken to, and looked at once it has ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
from fast_inference.protocol.endpoints import runtime_root

START_SECONDS = 120.0
COMMAND = [sys.executable, "-m", "fast_inference.launch"]


def run_command(*arguments: str, timeout: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a `fast-inference` command to its end."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


class EngineProcess:
    """`fast-inference serve MODEL --port 0 FLAGS`; a context manager that stops it."""

    def __init__(self, model: str, *flags: str) -> None:
        self.lines: list[str] = []
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*COMMAND, "serve", model, "--port", "0", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, pattern: str, seconds: float = START_SECONDS) -> str:
        """Wait for a line of standard error and return what its first group matched."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                for line in self.lines:
                    if match := re.search(pattern, line):
                        return match[match.lastindex or 0]
                left = deadline - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                if left <= 0 or ended:
                    raise AssertionError(f"no line with {pattern!r} in:\n" + "\n".join(self.lines))
                self._changed.wait(min(left, 0.5))

    def wait_ready(self) -> Self:
        """Wait until it serves."""
        self.url = self.wait_for(r"^serving\s+(http\S+)")
        self.endpoint = self.wait_for(r"^clients\s+(\S+)")
        return self

    def actors(self) -> dict[str, psutil.Process]:
        """Its children by the role in their title."""
        children = psutil.Process(self.process.pid).children()
        titles = {child.pid: " ".join(child.cmdline()) for child in children}
        roles = {pid: re.match(r"fast-inference: (\S+) \(", title) for pid, title in titles.items()}
        return {match[1]: psutil.Process(pid) for pid, match in roles.items() if match}

    def metric(self, name: str) -> float:
        """One figure from /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        match = re.search(rf"^fast_inference:{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert match is not None, f"no {name} in:\n{text}"
        return float(match[1])

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Wait until no request holds a block."""
        deadline = time.monotonic() + seconds
        figures = ("kv_blocks_used", "num_requests_running", "num_requests_waiting")
        while any(values := [self.metric(name) for name in figures]):
            assert time.monotonic() < deadline, f"{dict(zip(figures, values, strict=True))} after {seconds} s"
            time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Send a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 30.0) -> int:
        """Wait for the end; returns the exit status."""
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status

    def assert_nothing_left(self, actors: dict[str, psutil.Process]) -> None:
        """No process, no run directory."""
        _, left = psutil.wait_procs(list(actors.values()), timeout=3)
        assert not left
        assert not run_dirs_of(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()


def run_dirs_of(pid: int) -> list[Path]:
    """Run directories that a supervisor of this process number has left."""
    root = runtime_root()
    return list(root.glob(f"{pid}-*")) if root.is_dir() else []


def run_dirs_here() -> list[Path]:
    """Run directories of engines that this very process supervises."""
    return run_dirs_of(os.getpid())
