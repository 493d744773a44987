"""`fast-inference explain ID`: where a request's time has gone, as a table and a bar in the terminal.

Owns the drawing, and where a timeline is taken from: a running server, or a journal that is run again.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..frontend.timelines import names_of, timeline_object
from ..protocol.errors import EngineDead, EngineError, NotFound
from ..scheduler.replay import replay
from .replay import progress_bar

ANSWER_SECONDS = 10.0
BAR_WIDTH = 72
# Letter and colour of each kind of span: waits in upper case, what is computed in lower case.
LOOKS = {
    "starting": ("E", "bright_black"),
    "executor busy": ("E", "bright_black"),
    "behind": ("Q", "yellow"),
    "no slot": ("S", "magenta"),
    "no blocks": ("B", "red"),
    "token budget": ("T", "bright_yellow"),
    "prefix": ("X", "bright_blue"),
    "policy": ("P", "bright_magenta"),
    "preempted": ("!", "bright_red"),
    "swapped": ("!", "bright_red"),
    "lost": ("!", "bright_red"),
    "prefill": ("p", "cyan"),
    "recompute": ("r", "bright_cyan"),
    "swap in": ("s", "blue"),
    "decode": ("d", "green"),
}
OTHER = ("?", "white")


def show_request(request_id: str, journal: Path | None, url: str, api_key: str | None) -> None:
    """Print the timeline of the request that its client calls `request_id`. Raises `NotFound` or `EngineDead`."""
    timeline = fetch(request_id, url, api_key) if journal is None else from_journal(request_id, journal)
    console = Console()
    for sequence in timeline["sequences"]:
        console.print(Text(head(sequence), style="bold"))
        if sequence["spans"]:
            console.print(table(sequence))
            console.print(bar(sequence))
            console.print(legend(sequence))


def from_journal(request_id: str, path: Path) -> dict[str, Any]:
    """The timeline by running the journal at `path` again."""
    names = names_of(request_id)
    with progress_bar(f"replaying {path.name}") as advance:
        done = replay(path, advance, followed=names)
    if done.difference is not None:
        warning = "the journal does not replay as it was; shown is what it gives up to there"
        print(f"{warning}\n{done.difference}", file=sys.stderr)
    told = done.core.timelines(names, done.last)
    if not told:
        raise NotFound(f"no request `{request_id:.200}` is in {path}")
    return timeline_object(request_id, told)


def fetch(request_id: str, url: str, api_key: str | None) -> dict[str, Any]:
    """The timeline from the server at `url`."""
    address = f"{url.rstrip('/')}/v1/requests/{quote(request_id, safe='')}/timeline"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=ANSWER_SECONDS) as answer:
            timeline: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise _refused(error, url) from None
    except (OSError, ValueError) as error:
        raise EngineDead(f"no engine answers at {url}: {error}") from error
    return timeline


def _refused(error: urllib.error.HTTPError, url: str) -> EngineError:
    try:
        message = str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):  # not ours: another server's page
        message = f"{url} answers {error.code} {error.reason}"
    return NotFound(message) if error.code == 404 else EngineError(message)


# ---- drawing -----------------------------------------------------------------------------------------------------


def head(sequence: dict[str, Any]) -> str:
    """The first line: what became of it, and how long it took."""
    state = f"ended by {sequence['finish_reason']}" if sequence["finish_reason"] else "still under way"
    first = ""
    if sequence["first_token"] is not None:
        first = f", first token after {sequence['first_token'] - sequence['arrival']:.3f} s"
    return (
        f"{sequence['id']}: {state} after {sequence['end_to_end_seconds']:.3f} s{first}; "
        f"{sequence['prompt_tokens']} prompt tokens ({sequence['cached_tokens']} cached), "
        f"{sequence['completion_tokens']} generated, {sequence['preemptions']} preemptions"
    )


def table(sequence: dict[str, Any]) -> Table:
    """One line for each span, and the sum."""
    whole = sequence["end_to_end_seconds"]
    out = Table(box=None, pad_edge=False, header_style="underline")
    for name in ("at s", "seconds", "share"):
        out.add_column(name, justify="right")
    for name in ("what", "why"):
        out.add_column(name)
    for span in sequence["spans"]:
        share = span["seconds"] / whole if whole else 0.0
        what = Text(span["kind"], style=LOOKS.get(span["kind"], OTHER)[1])
        out.add_row(
            f"{span['start'] - sequence['arrival']:.4f}", f"{span['seconds']:.4f}", f"{share:.1%}", what, why(span)
        )
    total = sum(span["seconds"] for span in sequence["spans"])
    out.add_row("", f"{total:.4f}", f"{total / whole if whole else 1.0:.1%}", Text("end to end", style="bold"), "")
    return out


def why(span: dict[str, Any]) -> str:
    """The facts of a span in words."""
    kind, other = span["kind"], span.get("other")
    words = []
    if kind in ("prefill", "recompute", "swap in"):
        words.append(f"{span.get('tokens', 0)} tokens to compute")
    elif kind == "behind" and other:
        words.append(f"{other} was first")
    elif kind in ("preempted", "swapped"):
        words.append(f"by {other}" if other else "")
        words.append(
            f"{span.get('tokens', 0)} computed tokens {'lost' if kind == 'preempted' else 'kept in host memory'}"
        )
    elif kind == "lost":
        words.append(f"{span.get('tokens', 0)} computed tokens lost with the executor")
    if span.get("blocks_wanted"):
        words.append(f"{span['blocks_wanted']} blocks wanted, {span.get('blocks_there', 0)} free")
    if span.get("passed"):
        words.append(f"{span['passed']} started meanwhile")
    causes = sorted(span.get("causes", {}).items(), key=lambda cause: -cause[1])
    if causes:
        words.append("the first waited for: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in causes))
    return "; ".join(word for word in words if word)


def bar(sequence: dict[str, Any]) -> Text:
    """The spans as one line, each as long as its share; every span that took time has at least one letter."""
    out, whole = Text(), sequence["end_to_end_seconds"]
    for span in sequence["spans"]:
        if span["seconds"] > 0.0:
            letter, colour = LOOKS.get(span["kind"], OTHER)
            out.append(letter * max(1, round(BAR_WIDTH * span["seconds"] / whole)), style=colour)
    return out


def legend(sequence: dict[str, Any]) -> Text:
    """What the letters of the bar stand for, with the seconds of each kind."""
    out = Text()
    for kind, seconds in sequence["seconds_by_kind"].items():
        letter, colour = LOOKS.get(kind, OTHER)
        out.append(f"{letter} ", style=colour)
        out.append(f"{kind} {seconds:.3f} s   ")
    return out
