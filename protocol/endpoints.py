"""Where the links of one engine are: file names inside its run directory, and how that directory is made.

Owns names and permissions; must not open a socket.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import StartupError
from .names import MAX_FRONTENDS

# sun_path holds 108 bytes with its closing zero; ZeroMQ reports a longer one only as "invalid argument".
MAX_IPC_PATH = 107


def home() -> Path:
    """The engine's own folder for caches: `$FAST_INFERENCE_HOME`, else `~/.cache/fast_inference`."""
    return Path(os.environ.get("FAST_INFERENCE_HOME") or Path.home() / ".cache" / "fast_inference")


def runtime_root() -> Path:
    """Where run directories go: under `$FAST_INFERENCE_HOME` if set, else the user's runtime dir, else /tmp."""
    if os.environ.get("FAST_INFERENCE_HOME"):
        return home() / "run"
    if os.environ.get("XDG_RUNTIME_DIR"):
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "fast_inference"
    return Path(tempfile.gettempdir()) / f"fast_inference-{os.getuid()}"


def make_run_dir() -> Path:
    """A new private (mode 0700) directory for one engine's sockets."""
    root = runtime_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StartupError(f"{root} belongs to another user: set FAST_INFERENCE_HOME to a folder of your own")
    root.chmod(0o700)
    path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
    longest = len(os.fsencode(path / f"tokens-{MAX_FRONTENDS - 1}.sock"))
    if longest > MAX_IPC_PATH:
        path.rmdir()
        raise StartupError(
            f"socket paths under {root} would be {longest} bytes long, the limit is {MAX_IPC_PATH}: "
            "set FAST_INFERENCE_HOME to a shorter path"
        )
    return path


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The links of the engine whose run directory is `run_dir`. WIRE.md has the table."""

    run_dir: str

    def _ipc(self, name: str, index: int = 0) -> str:
        return f"ipc://{self.run_dir}/{name}{f'-{index}' if index else ''}.sock"

    @property
    def control(self) -> str:
        """Supervisor binds ROUTER, every actor connects DEALER."""
        return self._ipc("control")

    @property
    def requests(self) -> str:
        """Scheduler binds ROUTER, frontends and detokenizers connect DEALER."""
        return self._ipc("requests")

    @property
    def steps(self) -> str:
        """Executor binds PULL, scheduler connects PUSH."""
        return self._ipc("steps")

    @property
    def results(self) -> str:
        """Scheduler binds PULL, executor connects PUSH."""
        return self._ipc("results")

    def tokens_of(self, index: int) -> str:
        """Detokenizer `index` binds PULL, scheduler connects PUSH."""
        return self._ipc("tokens", index)

    def text_of(self, index: int) -> str:
        """Detokenizer `index` binds ROUTER, the frontend of that number connects DEALER."""
        return self._ipc("text", index)

    def client_of(self, index: int) -> str:
        """Frontend `index` binds ROUTER, native clients and the other frontends connect DEALER."""
        return self._ipc("client", index)

    @property
    def client(self) -> str:
        """Where a native client looks: at the first frontend."""
        return self.client_of(0)

    @property
    def config_file(self) -> Path:
        return Path(self.run_dir) / "config.json"
