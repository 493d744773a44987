"""One log format for every process of an engine, with the actor's name in each line.

Owns the format and where lines go (standard error); must not know what is logged.
"""

from __future__ import annotations

import logging

# Chatty at info, and of no interest to who runs an engine.
QUIET = ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "uvicorn.access", "uvicorn.error")


def configure(actor: str, level: str) -> None:
    """Send this process's log to standard error.

    Args:
        actor: the name that each line carries, e.g. "scheduler".
        level: "debug", "info", "warning" or "error".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)-7s {actor:<11} %(message)s", datefmt="%m-%d %H:%M:%S")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
