"""`fast-inference status`: which engines of this user run, and how they fare.

Owns what is shown of an engine; must not know how it works. Speaks to engines as any client does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import psutil

from ..frontend.client import AsyncClient
from ..protocol.endpoints import Endpoints
from ..protocol.errors import EngineDead
from ..protocol.messages import EngineInfo, Stats
from .rundir import Card, living

ANSWER_SECONDS = 2.0  # an engine that takes longer is shown as busy starting or ending


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine. `info` and `stats` are None while it starts."""

    run_dir: Path
    card: Card
    processes: list[tuple[int, str]]  # (pid, title)
    info: EngineInfo | None
    stats: Stats | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "endpoint": Endpoints(str(self.run_dir)).client,
            **dataclasses.asdict(self.card),
            "processes": [{"pid": pid, "title": title} for pid, title in self.processes],
            "info": None if self.info is None else dataclasses.asdict(self.info),
            "stats": None if self.stats is None else dataclasses.asdict(self.stats),
        }


def show(as_json: bool) -> None:
    """Print every living engine."""
    engines = asyncio.run(look())
    if as_json:
        for engine in engines:
            print(json.dumps(engine.as_dict()))
    elif not engines:
        print("no engine of this user runs on this machine")
    else:
        print("\n\n".join("\n".join(_lines(engine)) for engine in engines))


async def look() -> list[EngineStatus]:
    """Ask every living engine how it fares."""
    return list(await asyncio.gather(*(_look_at(path, card) for path, card in living())))


async def _look_at(run_dir: Path, card: Card) -> EngineStatus:
    client = AsyncClient(Endpoints(str(run_dir)).client, connect_timeout=ANSWER_SECONDS)
    info, stats = None, None
    try:
        info = await client.connect()
        stats = await client.get_stats(ANSWER_SECONDS)
    except EngineDead:  # not there yet, or not any more: the card is all there is to show
        pass
    finally:
        await client.close()
    return EngineStatus(run_dir, card, _processes(card.pid), info, stats)


def _processes(supervisor: int) -> list[tuple[int, str]]:
    try:
        parent = psutil.Process(supervisor)
        return [(p.pid, " ".join(p.cmdline()).strip()) for p in [parent, *parent.children()]]
    except psutil.Error:  # it has just ended
        return []


def _lines(engine: EngineStatus) -> list[str]:
    card, info, stats = engine.card, engine.info, engine.stats
    state = "starting or stopping" if stats is None else f"running {stats.running}, waiting {stats.waiting}"
    lines = [
        f"{card.model}   {card.url or 'no HTTP server'}   up {time.time() - card.started:,.0f} s   {state}",
        f"  endpoint  {Endpoints(str(engine.run_dir)).client}",
    ]
    if info is not None and stats is not None:
        lines.append(
            f"  KV cache  {stats.utilization:.1%} of {stats.num_blocks} blocks of {info.block_size} tokens in use, "
            f"{stats.cached_blocks} cached, {stats.free_blocks} free; fragmentation {stats.fragmentation:.1%}"
        )
        if stats.host_blocks:
            lines.append(
                f"  host KV   {stats.host_used_blocks} of {stats.host_blocks} blocks held, {stats.host_cached_blocks} "
                f"cached; {stats.swapped_out_blocks} copied out, {stats.swapped_in_blocks} in"
            )
        lines.append(
            f"  tokens    {stats.prompt_tokens} in, {stats.generation_tokens} out; {stats.preemptions} preemptions"
        )
    lines += [f"  {pid:>8}  {title[:100]}" for pid, title in engine.processes]
    return lines
