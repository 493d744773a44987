"""Streamed tokens/s over HTTP: the real frontends, detokenizers and scheduler around an executor that answers at once.

    python benchmarks/streaming.py --frontends 4 --clients 4 --requests 256 --tokens 500

Owns the measurement; `fake_executor.py` is the executor, `sse_client.py` the clients, several processes of them, since
one can't read as fast as several frontends write. Tokens/s are those of the whole run: from the first request's sending
to the last one's end. A chunk is an event with text: one token, or more where a frontend has fallen behind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from fake_executor import Ledger
from fast_inference.launch.models import ModelFinder
from fast_inference.launch.supervisor import Supervisor, child_command
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.names import EXECUTOR, kind_of
from report import machine, write_json

HERE = Path(__file__).parent


def start(config: EngineConfig, ledger: Path) -> Supervisor:
    """A running engine whose executor is `fake_executor.py`."""
    Ledger(ledger, create=True)

    def command(role: str, run_dir: Path, http_fd: int | None) -> Sequence[str]:
        if role == EXECUTOR:
            return [sys.executable, str(HERE / "fake_executor.py"), str(run_dir), str(ledger)]
        return child_command(role, run_dir, http_fd)

    supervisor = Supervisor(config, command=command)
    supervisor.start()
    supervisor.wait_ready()
    return supervisor


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """CPU time so far by kind of process, those of one kind together."""
    out: dict[str, float] = {}
    for name, pid in pids.items():
        times = psutil.Process(pid).cpu_times()
        out[kind_of(name)] = out.get(kind_of(name), 0.0) + times.user + times.system
    return out


def measure(supervisor: Supervisor, clients: int, requests: int, tokens: int) -> dict[str, object]:
    """One run: `requests` at once, of `tokens` each, parted among so many client processes."""
    address = urlsplit(supervisor.url or "")
    shares = [requests // clients + (i < requests % clients) for i in range(clients)]
    command = [sys.executable, str(HERE / "sse_client.py"), str(address.hostname), str(address.port)]
    processes = [
        subprocess.Popen([*command, str(share), str(tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for share in shares
    ]
    try:
        for process in processes:
            _line(process)  # "ready"
        pids = supervisor.pids | {f"client-{i}": process.pid for i, process in enumerate(processes)}
        before = cpu_seconds(pids)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [json.loads(_line(process)) for process in processes]
        after = cpu_seconds({name: pid for name, pid in pids.items() if psutil.pid_exists(pid)})
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    came = sum(result["tokens"] for result in results)
    if came != requests * tokens:
        raise SystemExit(f"{requests * tokens} tokens were asked for, {came} came")
    seconds = max(result["ended"] for result in results) - min(result["began"] for result in results)
    return {
        "tokens_per_second": round(came / seconds),
        "tokens_per_chunk": round(came / sum(result["chunks"] for result in results), 2),
        "seconds": round(seconds, 2),
        "cpu_us_per_token": {kind: round((after[kind] - before[kind]) / came * 1e6, 1) for kind in after},
    }


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit("a client ended early: see above")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a tokenizer (default: the default model)")
    parser.add_argument(
        "--frontends", type=int, nargs="+", default=[1, 4], help="--api-server-count, one after another"
    )
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--requests", type=int, default=256, help="at once")
    parser.add_argument("--tokens", type=int, default=500, help="generated for each request")
    parser.add_argument("--runs", type=int, default=3, help="the median counts")
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    figures: dict[str, object] = {"benchmark": "streaming", "machine": machine(), "requests": options.requests}
    for frontends in options.frontends:
        config = EngineConfig(
            model=options.model or "",
            port=0,
            api_server_count=frontends,
            max_num_seqs=options.requests,
            max_num_batched_tokens=8192,
            log_level="warning",
        )
        config = ModelFinder().find(config, lambda progress: None)
        with tempfile.TemporaryDirectory() as scratch:
            supervisor = start(config, Path(scratch) / "ledger")
            try:
                Ledger(Path(scratch) / "ledger").step_ns = round(options.step_ms * 1e6)
                measure(supervisor, options.clients, options.requests, 20)  # warm-up
                runs = [
                    measure(supervisor, options.clients, options.requests, options.tokens) for _ in range(options.runs)
                ]
            finally:
                supervisor.stop()
        runs.sort(key=lambda run: int(str(run["tokens_per_second"])))
        figures[f"frontends-{frontends}"] = {"median": runs[len(runs) // 2], "runs": runs}
        print(json.dumps({"frontends": frontends, **runs[len(runs) // 2]}), flush=True)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
