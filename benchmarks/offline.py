"""Offline throughput: the engine, through its real processes, and transformers on the same prompts in the same run.

    python benchmarks/offline.py --workload all --peer transformers-cb --peer transformers-generate --json result.json

Owns the order of things: the engine first, then, with the engine gone, each peer in a process of its own; everyone
gets one warm-up on other prompts. Prompts are token ids, decoding is greedy, end-of-sequence is ignored, nothing
is detokenized.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from fast_inference import LLM, RequestOutput
from fast_inference.executor.threads import usable_cores
from load import greedy_params
from models import add_model_options, model_folder, vocabulary_size
from peers import PeerJob, run_peer
from records import Record, run_figures
from report import console, machine, offline_tables, phase_progress, progress_bar, write_json
from workloads import OFFLINE, TARGET_RATIOS, Request, offline_workload

OURS = "fast_inference"
WARMUP_SEED = 1_000_000
WARMUP_TOKENS = 8  # tokens of output: enough to have seen every shape of step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=(*OFFLINE, "all"), default="all")
    add_model_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="measured runs; a peer's that take minutes are cut to 1")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten all lengths, for trying the script out")
    return parser.parse_args()


class Plan:
    """One workload's prompts: other ids in each repeat, the same for everyone."""

    def __init__(self, name: str, vocab_size: int, repeats: int, scale: float) -> None:
        self.name = name
        self.runs = [offline_workload(name, vocab_size, seed, scale) for seed in range(repeats)]
        warmup = offline_workload(name, vocab_size, WARMUP_SEED, scale)
        self.warmup = [Request(r.prompt_token_ids, min(r.max_tokens, WARMUP_TOKENS)) for r in warmup]


def run_ours(llm: LLM, requests: Sequence[Request]) -> list[Record]:
    """One run through the engine. A record ends when the caller has everything."""
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
    params = [greedy_params(request) for request in requests]
    wall, start = time.time(), time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    return [our_record(r, output, wall, seconds) for r, output in zip(requests, outputs, strict=True)]


def our_record(request: Request, output: RequestOutput, start: float, seconds: float) -> Record:
    """`start`: `time.time()` at the start of the run, as the times in the output's metrics."""
    tokens = len(output.outputs[0].token_ids)
    record = Record(len(request.prompt_token_ids), 0.0, tokens, end=seconds)
    if tokens != request.max_tokens or output.metrics is None or output.metrics.first_token_time is None:
        record.error = f"made {tokens} tokens of {request.max_tokens}"
    else:
        record.events = [output.metrics.first_token_time - start]
    return record


def measure_ours(args: argparse.Namespace, model: str, plans: Sequence[Plan]) -> dict[str, list[list[Record]]]:
    """The records of each run, by workload."""
    started = time.perf_counter()
    with LLM(model, load_format=args.load_format, dtype=args.dtype, skip_tokenizer_init=True, port=None) as llm:
        console.print(f"engine ready after {time.perf_counter() - started:.1f} s")
        results = {}
        for plan in plans:
            console.print(f"{OURS}: {plan.name}")
            run_ours(llm, plan.warmup)
            results[plan.name] = [run_ours(llm, run) for run in plan.runs]
    return results


def measure_peer(args: argparse.Namespace, model: str, peer: str, plan: Plan) -> list[list[Record]]:
    """The records of each run of one workload."""
    job = PeerJob(
        peer=peer,
        model=model,
        load_format=args.load_format,
        dtype=args.dtype,
        threads=usable_cores(),
        batch=args.peer_batch,
        warmup=plan.warmup,
        runs=plan.runs,
    )
    with progress_bar() as bar:
        return run_peer(job, phase_progress(bar, f"{peer}, {plan.name}", len(plan.warmup)))


def summary(runs: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """An engine's runs of one workload, and their median."""
    figures = [run_figures(run) for run in runs]
    rates = [run["output_tokens_per_second"] for run in figures]
    return {
        "median": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "mean_ttft_ms": statistics.median(run["mean_ttft_ms"] for run in figures),
        "runs": figures,
    }


def workload_report(plan: Plan, engines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One workload: everybody's figures, and ours over theirs."""
    ratios = {}
    for peer, figures in engines.items():
        if peer != OURS:
            ratio, target = engines[OURS]["median"] / figures["median"], TARGET_RATIOS.get((plan.name, peer))
            ratios[peer] = {"ratio": ratio, "target": target, "reached": target is None or ratio >= target}
    return {
        "name": plan.name,
        "requests": len(plan.runs[0]),
        "prompt_tokens": sum(len(request.prompt_token_ids) for request in plan.runs[0]),
        "output_tokens": sum(request.max_tokens for request in plan.runs[0]),
        "engines": engines,
        "ratios": ratios,
    }


def main() -> None:
    args = parse_args()
    report: dict[str, Any] = {"benchmark": "offline", "machine": machine()}
    with model_folder(args.model, args.load_format) as model:
        names = OFFLINE if args.workload == "all" else (args.workload,)
        plans = [Plan(name, vocabulary_size(model), args.repeats, args.scale) for name in names]
        ours = measure_ours(args, model, plans)
        peers = {peer: {plan.name: measure_peer(args, model, peer, plan) for plan in plans} for peer in args.peer}
    report |= {"model": args.model or "default", "dtype": args.dtype, "load_format": args.load_format}
    report["peer_batch"] = args.peer_batch
    report["workloads"] = [
        workload_report(plan, {name: summary(runs[plan.name]) for name, runs in {OURS: ours, **peers}.items()})
        for plan in plans
    ]
    console.print(f"{report['model']}, {args.dtype}, {report['machine']['cores']} cores, {report['machine']['cpu']}")
    for table in offline_tables(report):
        console.print(table)
    write_json(args.json, report)


if __name__ == "__main__":
    main()
