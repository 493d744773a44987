"""A journal of a live engine: it replays, and it explains where each request's time has gone."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from .engine_process import EngineProcess, run_command

REQUESTS = 200
TOKENS = 24


async def test_two_hundred_requests_with_preemptions_are_explained_and_replay(tiny_folder: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    flags = ["--served-model-name", "tiny", "--num-blocks", "24", "--max-num-seqs", "16", "--journal", str(journal)]
    with EngineProcess(tiny_folder, *flags) as engine:
        engine.wait_ready()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=engine.url, timeout=240, limits=limits) as client:
            measured = await asyncio.gather(*(complete(client, number) for number in range(REQUESTS)))
            preemptions = 0
            for name, begun, ended in measured:
                preemptions += check(await timeline(client, name), begun, ended)
            assert preemptions > 0
        engine.process.send_signal(signal.SIGTERM)
        engine.process.wait(60)
    done = run_command("replay", str(journal))
    assert done.returncode == 0 and "every output is the same" in done.stdout, done.stdout + done.stderr


async def complete(client: httpx.AsyncClient, number: int) -> tuple[str, float, float]:
    """One completion; its id, and when it was sent and answered."""
    body = {"model": "tiny", "prompt": f"{number} hello world", "max_tokens": TOKENS, "ignore_eos": True}
    begun = time.time()
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == TOKENS
    return answer.json()["id"], begun, time.time()


async def timeline(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/requests/{name}/timeline")
    assert answer.status_code == 200, answer.text
    (sequence,) = answer.json()["sequences"]
    told: dict[str, Any] = sequence
    return told


def check(story: dict[str, Any], begun: float, ended: float) -> int:
    """The spans are the whole, which lies within what the client has seen; returns the preemptions."""
    whole = sum(span["seconds"] for span in story["spans"])
    assert math.isclose(whole, story["finished"] - story["arrival"], rel_tol=0.01)
    assert begun <= story["arrival"] <= story["finished"] <= ended
    for before, after in zip(story["spans"], story["spans"][1:], strict=False):
        assert before["end"] == after["start"]
    return int(story["preemptions"])
