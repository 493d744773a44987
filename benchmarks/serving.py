"""Latency and throughput under load: requests arrive on their own clock, at the engine and at transformers alike.

    python benchmarks/serving.py --request-rate 4 --input-len 32-256 --output-len 16-128 --num-prompts 200
    python benchmarks/serving.py --trace ../shared/traces/azure_llm_2023_conv.csv --speed-up 2 --scale-tokens 0.25
    python benchmarks/serving.py --base-url http://127.0.0.1:8000 --request-rate 4 --goodput ttft:500 tpot:50

Without `--base-url` or `--endpoint` an engine is started, measured and stopped; then come the peers, on the very same
arrivals. Figures and their names are those of vLLM's serving benchmark (`records.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fast_inference import AsyncClient, AsyncEngine
from fast_inference.executor.threads import usable_cores
from load import HttpSender, NativeSender, Sender, drive
from models import add_model_options, model_folder, vocabulary_size
from peers import PeerJob, run_peer
from records import METRICS, Record, serving_figures
from report import console, machine, phase_progress, progress_bar, serving_table, write_json
from workloads import Lengths, Request, poisson_arrivals, random_requests, read_trace

OURS = "fast_inference"
WARMUP_SEED = 1_000_000
WARMUP_REQUESTS = 4
WARMUP_TOKENS = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--backend", choices=("http", "native"), default="http", help="HTTP with SSE, or ZeroMQ")
    parser.add_argument("--base-url", help="of a server that runs already (http)")
    parser.add_argument("--endpoint", help="of an engine that runs already, e.g. ipc://... (native)")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--request-rate", type=float, default=float("inf"), help="per second, as a Poisson process")
    parser.add_argument("--max-concurrency", type=int, help="requests in flight at most")
    parser.add_argument("--input-len", type=length_range, default=(128, 128), metavar="N[-M]")
    parser.add_argument("--output-len", type=length_range, default=(128, 128), metavar="N[-M]")
    parser.add_argument("--trace", type=Path, help="CSV of arrivals and lengths, instead of rate and lengths")
    parser.add_argument("--speed-up", type=float, default=1.0, help="of the trace's clock")
    parser.add_argument("--scale-tokens", type=float, default=1.0, help="shortens the trace's prompts and outputs")
    parser.add_argument("--goodput", nargs="+", type=limit, default=[], metavar="METRIC:MS", help="ttft, tpot, e2el")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.base_url and args.endpoint:
        parser.error("--base-url and --endpoint name two different engines")
    if args.base_url or args.endpoint:
        args.backend = "native" if args.endpoint else "http"
    return args


def length_range(text: str) -> tuple[int, int]:
    """`N` or `N-M`."""
    low, _, high = text.partition("-")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"must be N or N-M with 1 <= N <= M, got {text!r}")
    return bounds


def limit(text: str) -> tuple[str, float]:
    """`METRIC:MILLISECONDS`."""
    metric, _, value = text.partition(":")
    if metric not in METRICS or metric == "itl":
        raise argparse.ArgumentTypeError(f"the metric must be ttft, tpot or e2el, got {metric!r}")
    return metric, float(value)


def make_requests(args: argparse.Namespace, vocab_size: int) -> tuple[list[Request], str]:
    """The requests in order of arrival, and a few words about their arrivals."""
    if args.trace:
        arrivals, lengths = read_trace(args.trace, args.num_prompts, args.speed_up)
        words = f"{args.trace.name}, {args.speed_up:g} times as fast, lengths times {args.scale_tokens:g}"
        return random_requests(lengths, vocab_size, args.seed, args.scale_tokens, arrivals), words
    arrivals = poisson_arrivals(args.request_rate, args.num_prompts, args.seed)
    lengths = Lengths(*args.input_len, *args.output_len).draw(random.Random(args.seed), args.num_prompts)
    words = "all at once" if args.request_rate == float("inf") else f"Poisson at {args.request_rate:g} per second"
    return random_requests(lengths, vocab_size, args.seed, arrivals=arrivals), words


@asynccontextmanager
async def sender_to_engine(args: argparse.Namespace, model: str) -> AsyncIterator[Sender]:
    """A way into the engine that the command line names, or into one started for it."""
    if args.endpoint:
        async with AsyncClient(args.endpoint) as client:
            yield NativeSender(client)
    elif args.base_url:
        async with http_sender(args.base_url) as sender:
            yield sender
    else:
        http = args.backend == "http"
        port = 0 if http else None  # one that is free, so that a running engine is left alone
        async with AsyncEngine(
            model, load_format=args.load_format, dtype=args.dtype, skip_tokenizer_init=not http, port=port
        ) as engine:
            if engine.url is None:
                yield NativeSender(engine)
            else:
                async with http_sender(engine.url) as sender:
                    yield sender


@asynccontextmanager
async def http_sender(base_url: str) -> AsyncIterator[HttpSender]:
    """Connections without a limit on their number or on an answer's time; the model is the first one served."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=base_url, timeout=None, limits=limits) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()
        yield HttpSender(client, models["data"][0]["id"])


async def measure_ours(
    args: argparse.Namespace, model: str, warmup: Sequence[Request], requests: Sequence[Request]
) -> list[Record]:
    async with sender_to_engine(args, model) as sender:
        await drive(sender, warmup, None, lambda: None)
        with progress_bar() as bar:
            task = bar.add_task(OURS, total=len(requests))
            return await drive(sender, requests, args.max_concurrency, lambda: bar.advance(task))


def measure_peer(
    args: argparse.Namespace, model: str, peer: str, warmup: list[Request], requests: list[Request]
) -> list[Record]:
    job = PeerJob(
        peer=peer,
        model=model,
        load_format=args.load_format,
        dtype=args.dtype,
        threads=usable_cores(),
        batch=args.peer_batch,
        warmup=warmup,
        runs=[requests],
        max_concurrency=args.max_concurrency,
    )
    with progress_bar() as bar:
        return run_peer(job, phase_progress(bar, peer, len(requests)))[0]


def main() -> None:
    args = parse_args()
    report: dict[str, Any] = {"benchmark": "serving", "machine": machine()}
    with model_folder(args.model, args.load_format) as model:
        vocab_size = vocabulary_size(model)
        requests, arrivals = make_requests(args, vocab_size)
        lengths = [(len(r.prompt_token_ids), min(r.max_tokens, WARMUP_TOKENS)) for r in requests[:WARMUP_REQUESTS]]
        warmup = random_requests(lengths, vocab_size, WARMUP_SEED)
        results = {OURS: asyncio.run(measure_ours(args, model, warmup, requests))}
        for peer in args.peer:
            results[peer] = measure_peer(args, model, peer, warmup, requests)
    goodput = dict(args.goodput)
    report |= {"model": args.model or "default", "dtype": args.dtype, "load_format": args.load_format}
    report |= {"backend": args.backend, "requests": len(requests), "arrivals": arrivals, "goodput_ms": goodput}
    report["engines"] = {name: serving_figures(records, goodput) for name, records in results.items()}
    console.print(serving_table(report))
    for name, records in results.items():
        for error in sorted({record.error for record in records if record.error}):
            console.print(f"[red]{name}: {error}[/]")
    write_json(args.json, report)


if __name__ == "__main__":
    main()
