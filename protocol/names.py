"""The actors' names: who is who in one engine, on every link, in the process list and in the log.

Owns the names and how many of a kind there are; must not know what an actor does. Frontend i has its text made by
detokenizer i: the pair shares a number, and the first detokenizer goes without one.
"""

from __future__ import annotations

SCHEDULER = "scheduler"
EXECUTOR = "executor"
DETOKENIZER = "detokenizer"
FRONTEND = "frontend"

MAX_FRONTENDS = 64


def frontend(index: int) -> str:
    """The name of a frontend."""
    return f"{FRONTEND}-{index}"


def detokenizer(index: int) -> str:
    """The name of the detokenizer that makes the text of frontend `index`."""
    return DETOKENIZER if index == 0 else f"{DETOKENIZER}-{index}"


def actors(frontends: int) -> tuple[str, ...]:
    """The names of all actors of an engine with so many frontends, in the order of their start."""
    pairs = range(frontends)
    return (SCHEDULER, EXECUTOR, *map(detokenizer, pairs), *map(frontend, pairs))


def kind_of(actor: str) -> str:
    """Which of the four kinds an actor is."""
    return actor.partition("-")[0]


def index_of(actor: str) -> int:
    """Which of its kind an actor is: the number in its name, 0 without one."""
    number = actor.partition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else 0
