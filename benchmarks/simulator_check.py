"""The simulator held against the engine: the same requests on both, the differences in a table.

    python benchmarks/simulator_check.py --trace ../shared/traces/azure_llm_2023_conv.csv --json FILE
    python benchmarks/simulator_check.py --trace ../shared/traces/azure_llm_2023_conv.csv --step-ms 60
    python benchmarks/simulator_check.py --online 8 16 32 --shape llama-8b --max-num-seqs 256     (on a GPU)

The engine runs twice as many requests of the trace as are compared: in the middle those that are, before and after
them as many others, which calibrate (from the journal: what steps cost and what lies between them; from the clients'
clocks: what lies around a request). The simulation gets the calibration, the same settings, arrivals and lengths, and
nothing of what was measured of the compared part. Other programs on the machine make the parts differ: let it rest.
With `--online` the requests are those of `gpu.py`'s online cells, one compared part for each rate, in between parts
of other requests at the lowest and at the highest rate, which calibrate.
With `--step-ms` the executor is one that computes nothing and takes so long for every step (`fake_executor.py`): what
is held against the engine is then all but the device, which a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fake_executor import VOCAB_SIZE
from fast_inference import AsyncClient, AsyncEngine
from fast_inference.protocol.config import EngineConfig
from fast_inference.scheduler.journal import Reader
from fast_inference.simulator.costs import Calibration
from fast_inference.simulator.measured import observe
from fast_inference.simulator.simulation import Setup, simulate
from fast_inference.simulator.workload import Workload
from gpu_cells import MAX_MODEL_LEN, MODELS, online_requests, shape_folder
from gpu_runs import settle
from load import NativeSender, drive
from models import add_model_options, model_folder, vocabulary_size
from records import Record, serving_figures
from report import console, machine, write_json
from rich.table import Table
from step_overhead import running
from workloads import Request, random_requests, read_trace

COMPARED = ("output_throughput", "mean_ttft_ms", "mean_e2el_ms", "mean_itl_ms")
PROMISED = ("output_throughput", "mean_ttft_ms")  # within `TOLERANCE`
TOLERANCE = 0.15
PAUSE = 0.5  # seconds between the two parts, so that no step belongs to both


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, help="CSV of arrivals and lengths")
    source.add_argument("--online", type=float, nargs="+", metavar="RATE", help="the online cells, requests a second")
    parser.add_argument("--shape", choices=MODELS, help="random weights of this shape, for --online")
    parser.add_argument("--online-seconds", type=float, default=8.0, help="of each part")
    parser.add_argument("--num-prompts", type=int, default=64, help="that are compared; as many more calibrate")
    parser.add_argument("--speed-up", type=float, default=3.0, help="of the trace's clock")
    parser.add_argument("--scale-tokens", type=float, default=0.1, help="shortens the trace's prompts and outputs")
    parser.add_argument("--step-ms", type=float, help="no model: an executor that takes so long for every step")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.online and not args.shape:
        parser.error("--online needs --shape: the cells are defined for those models")
    return args


def parts(args: argparse.Namespace, vocab_size: int) -> dict[str, list[Request]]:
    """The requests that calibrate first, those that are compared, and those that calibrate after them, by what they
    are called; each part's clock starts at 0."""
    if args.online:
        seconds = args.online_seconds
        return {
            "before": online_requests(min(args.online), seconds, seed=1),
            **{f"{rate:g} requests a second": online_requests(rate, seconds) for rate in args.online},
            "after": online_requests(max(args.online), seconds, seed=2),
        }
    count = args.num_prompts
    arrivals, lengths = read_trace(args.trace, 2 * count, args.speed_up)
    words = f"{args.trace.name}, {args.speed_up:g} times as fast, lengths times {args.scale_tokens:g}"
    bounds = {"before": (count, count + count // 2), words: (0, count), "after": (count + count // 2, 2 * count)}
    out = {}
    for seed, (name, (first, stop)) in enumerate(bounds.items()):
        own = [arrival - arrivals[first] for arrival in arrivals[first:stop]]
        out[name] = random_requests(lengths[first:stop], vocab_size, args.seed + seed, args.scale_tokens, own)
    return out


@asynccontextmanager
async def sender_to_engine(args: argparse.Namespace, model: str, journal: Path) -> AsyncIterator[NativeSender]:
    """A way into an engine that is started for it, with a journal."""
    settings = {"port": None, "skip_tokenizer_init": True, "max_num_seqs": args.max_num_seqs, "journal": str(journal)}
    if args.step_ms is None:
        weights = "dummy" if args.shape else args.load_format
        if args.shape:
            settings |= {"max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": False}
        async with AsyncEngine(model, load_format=weights, dtype=args.dtype, **settings) as engine:
            await asyncio.to_thread(settle, engine.endpoint)
            yield NativeSender(engine)
        return
    with running(EngineConfig(model="none", log_level="warning", **settings)) as actors:
        actors.ledger.step_ns = round(args.step_ms * 1e6)
        async with AsyncClient(actors.client_endpoint) as client:
            yield NativeSender(client)


async def measure(
    args: argparse.Namespace, model: str, journal: Path, requests: Sequence[list[Request]]
) -> tuple[list[list[Record]], list[float]]:
    """The records of each part, and the times between them."""
    records, times = [], []
    async with sender_to_engine(args, model, journal) as sender:
        await drive(sender, requests[0][:4], None, lambda: None)  # the first steps are slow: not theirs to tell
        for part in requests:
            times.append(time.time())
            await asyncio.sleep(PAUSE)
            records.append(await drive(sender, part, None, lambda: None))
            await asyncio.sleep(PAUSE)
        times.append(time.time())
    errors = sorted({record.error for part in records for record in part if record.error})
    if errors:
        raise SystemExit(f"requests failed: {'; '.join(errors)}")
    return records, times


def calibrate(journal: Path, times: list[float], records: list[Record]) -> tuple[Calibration, EngineConfig]:
    """The calibration from what was recorded around the compared parts, and the settings that the journal tells.
    `records`: those of the calibrating requests."""
    reader = Reader(journal)
    try:
        seen = observe(reader).outside(0.0, times[0]).outside(times[1], times[-2])
        settings = reader.header.config
    finally:
        reader.close()
    inside = statistics.fmean(end.first_token - end.arrival for end in seen.ends)
    around = statistics.fmean(record.ttft for record in records) - inside
    return seen.calibrated("this machine", request=max(around, 0.0)), settings


def predict(calibration: Calibration, settings: EngineConfig, requests: list[Request]) -> dict[str, Any]:
    """The figures of the same requests in the simulation."""
    count = len(requests)
    workload = Workload(
        arrival=np.array([request.arrival for request in requests]),
        prompt=np.array([len(request.prompt_token_ids) for request in requests], np.int64),
        output=np.array([request.max_tokens for request in requests], np.int64),
        client=np.zeros(count, np.int64),
        deadline=np.full(count, np.inf),
    )
    config = settings.replace(journal=None, num_blocks=calibration.num_blocks)
    return simulate(Setup(config=config, calibration=calibration, max_tokens=None), workload).figures


def compare(title: str, measured: dict[str, Any], predicted: dict[str, Any]) -> dict[str, float]:
    """Print both, and return how far the second is from the first, as shares of it."""
    differences = {name: predicted[name] / measured[name] - 1 for name in COMPARED}
    table = Table(title=title)
    for column in ("figure", "measured", "simulated", "difference"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name in COMPARED:
        good = name not in PROMISED or abs(differences[name]) <= TOLERANCE
        difference = f"[{'green' if good else 'red'}]{differences[name]:+.1%}[/]"
        table.add_row(name, f"{measured[name]:.2f}", f"{predicted[name]:.2f}", difference)
    console.print(table)
    return differences


def main() -> None:
    args = parse_args()
    report: dict[str, Any] = {"benchmark": "simulator_check", "machine": machine(), "parts": {}}
    folder = model_folder(args.model, args.load_format) if args.step_ms is None else nullcontext("")
    with shape_folder(args.shape) if args.shape else folder as model, tempfile.TemporaryDirectory() as scratch:
        journal = Path(scratch, "journal")
        requests = parts(args, vocabulary_size(model) if model else VOCAB_SIZE)
        records, times = asyncio.run(measure(args, model, journal, list(requests.values())))
        calibration, settings = calibrate(journal, times, records[0] + records[-1])
    report["calibration"] = asdict(calibration)
    for (name, compared), seen in list(zip(requests.items(), records, strict=True))[1:-1]:
        measured, predicted = serving_figures(seen, {}), predict(calibration, settings, compared)
        differences = compare(f"{len(compared)} requests, {name}", measured, predicted)
        report["parts"][name] = {"measured": measured, "simulated": predicted, "differences": differences}
    write_json(args.json, report)


if __name__ == "__main__":
    main()
