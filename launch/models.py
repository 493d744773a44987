"""From what the user calls a model to a folder that an executor can load.

Owns the default model, the order in which places are looked at, and the child process that downloads or converts
(so that nothing here imports torch). Must not know file formats.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..executor.checkpoint import is_path
from ..protocol.config import EngineConfig
from ..protocol.endpoints import home
from ..protocol.errors import EngineDead, EngineError, StartupError, error_from_code
from ..protocol.messages import Progress

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

ACTOR = "model"  # whose progress this is, on the display


class ModelFinder:
    """Finds one model. `cancel` may be called from any thread or a signal handler."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def find(self, config: EngineConfig, on_event: Callable[[Progress], None]) -> EngineConfig:
        """The settings with `model` a local folder ("class:..." and "live" stay) and `served_model_name` set.

        Args:
            config: the settings as the user gave them.
            on_event: is given what is being done, where it takes long.

        Raises: `StartupError` that says what is missing; `EngineDead` after `cancel`.
        """
        if config.model in config.model_classes:
            config = config.replace(model=f"class:{config.model}")
        name = config.served_model_name or config.model.removeprefix("class:") or DEFAULT_MODEL
        return config.replace(model=self._place(config, on_event), served_model_name=name)

    def cancel(self) -> None:
        """Give up."""
        self._cancelled = True
        if self._process is not None:
            self._process.terminate()

    def _place(self, config: EngineConfig, on_event: Callable[[Progress], None]) -> str:
        if config.model == "live" or config.model.startswith("class:"):
            return config.model
        if not config.model:
            return self._default(on_event)
        path = Path(config.model).expanduser()
        if (path / "config.json").is_file():
            return str(path.resolve())
        if not path.exists() and is_path(config.model):
            raise StartupError(f"there is no model at {path}: give a folder, a GGUF file or a Hugging Face model name")
        return self._fetch(str(path) if path.exists() else config.model, config.revision, on_event)

    def _default(self, on_event: Callable[[Progress], None]) -> str:
        converted = home() / "models" / DEFAULT_MODEL
        if (converted / "config.json").is_file():
            return str(converted)
        return self._fetch("", None, on_event)

    def _fetch(self, model: str, revision: str | None, on_event: Callable[[Progress], None]) -> str:
        with self._running(fetch_command(model, revision)) as (process, complaints):
            last: dict[str, object] = {}
            for last in _json_lines(process):
                if "phase" in last:
                    on_event(_progress(last))
            status = process.wait()
        if self._cancelled:
            raise EngineDead("the engine was stopped while it looked for the model")
        if "folder" in last:
            return str(last["folder"])
        if "error" in last:
            raise _startup(error_from_code(str(last["error"]), str(last.get("message", ""))))
        reason = complaints[-1] if complaints else f"status {status}"
        raise StartupError(f"could not prepare the model {model}: {reason}")

    @contextmanager
    def _running(self, command: list[str]) -> Iterator[tuple[subprocess.Popen[str], deque[str]]]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C in the terminal comes through `cancel`
        )
        self._process = process
        complaints: deque[str] = deque(maxlen=20)
        assert process.stderr is not None
        stderr = process.stderr
        reader = threading.Thread(target=lambda: complaints.extend(line.strip() for line in stderr), daemon=True)
        reader.start()
        if self._cancelled:
            process.terminate()
        try:
            yield process, complaints
        finally:
            process.kill()  # does nothing where it has ended
            process.wait()
            reader.join()
            self._process = None
            stderr.close()
            if process.stdout is not None:
                process.stdout.close()


def fetch_command(model: str, revision: str | None) -> list[str]:
    """The command line of the process that downloads or converts."""
    command = [sys.executable, "-m", "fast_inference.executor.checkpoint", model]
    return command if revision is None else [*command, "--revision", revision]


def _json_lines(process: subprocess.Popen[str]) -> Iterator[dict[str, object]]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):  # a library may print there too
            yield json.loads(line)


def _progress(line: dict[str, object]) -> Progress:
    done, total = line.get("done", 0), line.get("total", 0)
    assert isinstance(done, int) and isinstance(total, int)
    return Progress(actor=ACTOR, phase=str(line["phase"]), done=done, total=total)


def _startup(error: EngineError) -> EngineError:
    return error if isinstance(error, StartupError) else StartupError(error.message)
