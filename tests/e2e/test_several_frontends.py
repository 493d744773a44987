"""Two frontends on one port: which one a connection reaches makes no difference."""

from __future__ import annotations

import re
import time

import httpx

from .engine_process import EngineProcess

REQUESTS = 16


def test_any_frontend_answers_and_each_tells_of_all(tiny_folder: str) -> None:
    with EngineProcess(tiny_folder, "--api-server-count", "2", "--num-blocks", "512") as engine:
        engine.wait_ready()
        actors = engine.actors()
        pairs = {"frontend-0", "frontend-1", "detokenizer", "detokenizer-1"}
        assert set(actors) == {"scheduler", "executor"} | pairs
        body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        texts = set()
        for _ in range(REQUESTS):  # a connection each, so that the kernel draws anew
            answer = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            texts.add(answer.json()["choices"][0]["text"])
        assert len(texts) == 1
        for _ in range(8):
            wait_for_total(engine, REQUESTS)
        engine.stop()
        engine.assert_nothing_left(actors)


def wait_for_total(engine: EngineProcess, expected: int) -> None:
    """Scrape until all requests are told of: a frontend that was too busy to be asked is told of the next time."""
    deadline = time.monotonic() + 60
    while True:
        page = httpx.get(f"{engine.url}/metrics", timeout=60).text
        total = re.search(r'^fast_inference:request_success_total{.*"length".*} (\S+)$', page, re.MULTILINE)
        assert total is not None and float(total[1]) <= expected
        if float(total[1]) == expected:
            return
        assert time.monotonic() < deadline, f"{total[1]} of {expected} requests are told of"
