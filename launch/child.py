"""The start of every actor process: `python -m fast_inference.launch.child ROLE RUN_DIR [--http-fd N]`.

Owns what an actor's process needs around its `run`: the environment, the title, logging, death with the parent,
and turning an exception into last words. Must not know any actor's work; speaks to the supervisor through `Control`.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from ..executor.threads import usable_cores
from ..protocol.actor import Control
from ..protocol.channel import Wire
from ..protocol.config import EngineConfig
from ..protocol.endpoints import Endpoints
from ..protocol.errors import EngineError
from ..protocol.names import DETOKENIZER, EXECUTOR, MAX_FRONTENDS, SCHEDULER, actors, kind_of
from . import logs, rundir

if TYPE_CHECKING:
    import torch

# OpenMP's idle threads: how often they look for work before they sleep. A thread that spins long takes a core from the
# other actors (10,000: a token takes five times as long beside one busy process); one that sleeps at once has to be
# woken for each of a step's 240 operations (0: a quarter fewer tokens/s at one request).
GOMP_SPINCOUNT = 1000

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux); leave if that has happened."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit("the supervisor is gone")


def set_environment(role: str, config: EngineConfig) -> None:
    """What libraries read from the environment when they load. What the user has set stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the executor's
    if role == EXECUTOR:
        os.environ.setdefault("OMP_NUM_THREADS", str(config.threads or usable_cores()))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("GOMP_SPINCOUNT", str(GOMP_SPINCOUNT))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def run_actor(
    role: str,
    config: EngineConfig,
    endpoints: Endpoints,
    http_socket: socket.socket | None = None,
    model: torch.nn.Module | None = None,
) -> int:
    """Run one actor to its end, in this thread.

    Args:
        role: one of `names.actors`.
        http_socket: the frontend's listening socket.
        model: the executor's live module, where there is one.

    Returns: the exit status; a failure has been told to the supervisor.
    """
    wire = Wire()
    control = Control(wire, endpoints, role)
    log = logging.getLogger(__name__)
    try:
        _run(role, config, endpoints, wire, control, http_socket, model)
    except EngineError as error:  # says by itself what is wrong
        log.debug("%s", error, exc_info=True)
        control.fatal(error)
        return 1
    except Exception as error:  # the outermost frame: whatever it was, the supervisor must hear of it
        log.exception("%s failed", role)
        control.fatal(error, traceback.format_exc())
        return 1
    finally:
        wire.close()
    return 0


def _run(
    role: str,
    config: EngineConfig,
    endpoints: Endpoints,
    wire: Wire,
    control: Control,
    http_socket: socket.socket | None,
    model: torch.nn.Module | None,
) -> None:
    # Imported here, so that the scheduler's process holds no torch and starts at once.
    if role == SCHEDULER:
        from ..scheduler import process as scheduler

        scheduler.run(config, endpoints, wire, control)
    elif role == EXECUTOR:
        from ..executor import process as executor

        executor.run(config, endpoints, wire, control, model=model)
    elif kind_of(role) == DETOKENIZER:
        from ..frontend import detokenizer

        detokenizer.run(config, endpoints, wire, control)
    else:
        from ..frontend import server

        server.run(config, endpoints, wire, control, http_socket)


def main(arguments: list[str] | None = None) -> int:
    """Be one actor's process."""
    parser = argparse.ArgumentParser(prog="fast_inference.launch.child", description=__doc__)
    parser.add_argument("role", choices=actors(MAX_FRONTENDS), metavar="ROLE")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--http-fd", type=int)
    options = parser.parse_args(arguments)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the supervisor gives the orders
    die_with_parent(rundir.read_card(options.run_dir).pid)
    endpoints = Endpoints(str(options.run_dir))
    config = EngineConfig.from_json(endpoints.config_file.read_text())
    set_environment(options.role, config)
    set_title(options.role, config)
    logs.configure(options.role, config.log_level)
    http_socket = None if options.http_fd is None else socket.socket(fileno=options.http_fd)
    return run_actor(options.role, config, endpoints, http_socket)


def set_title(role: str, config: EngineConfig) -> None:
    """The name in `ps` and `top`."""
    from setproctitle import setproctitle

    setproctitle(f"fast-inference: {role} ({config.model_name})" if config.model_name else f"fast-inference: {role}")


if __name__ == "__main__":
    sys.exit(main())
