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

REQUESTS, SEQUENCES = 25, 8  # sequences of one request come together: they outgrow the pool however slow the machine is
TOKENS = 40  # 3 blocks with the prompt; 8 sequences start with 1 each
BLOCKS = 16


async def test_two_hundred_sequences_with_preemptions_are_explained_and_replay(
    tiny_folder: str, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    flags = ["--served-model-name", "tiny", "--num-blocks", str(BLOCKS), "--max-num-seqs", "16"]
    with EngineProcess(tiny_folder, *flags, "--journal", str(journal)) as engine:
        engine.wait_ready()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=engine.url, timeout=240, limits=limits) as client:
            measured = await asyncio.gather(*(complete(client, number) for number in range(REQUESTS)))
            preemptions = 0
            for name, begun, ended in measured:
                for story in await timelines(client, name):
                    preemptions += check(story, begun, ended)
            assert preemptions > 0
        engine.process.send_signal(signal.SIGTERM)
        engine.process.wait(60)
    done = run_command("replay", str(journal))
    assert done.returncode == 0 and "every output is the same" in done.stdout, done.stdout + done.stderr


async def complete(client: httpx.AsyncClient, number: int) -> tuple[str, float, float]:
    """One completion; its id, and when it was sent and answered."""
    body = {"model": "tiny", "prompt": f"{number} hello", "max_tokens": TOKENS, "ignore_eos": True, "n": SEQUENCES}
    begun = time.time()
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == TOKENS * SEQUENCES
    return answer.json()["id"], begun, time.time()


async def timelines(client: httpx.AsyncClient, name: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/requests/{name}/timeline")
    assert answer.status_code == 200, answer.text
    sequences: list[dict[str, Any]] = answer.json()["sequences"]
    assert [sequence["id"] for sequence in sequences] == [f"{name}-{index}" for index in range(SEQUENCES)]
    return sequences


def check(story: dict[str, Any], begun: float, ended: float) -> int:
    """The spans are the whole, which lies within what the client has seen; returns the preemptions."""
    whole = sum(span["seconds"] for span in story["spans"])
    assert math.isclose(whole, story["finished"] - story["arrival"], rel_tol=0.01)
    assert begun <= story["arrival"] <= story["finished"] <= ended
    for before, after in zip(story["spans"], story["spans"][1:], strict=False):
        assert before["end"] == after["start"]
    return int(story["preemptions"])
