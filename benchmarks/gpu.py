"""The engine on one GPU, cell by cell beside vLLM's figures for the card and the floors: the table of issue 4.

    python benchmarks/gpu.py [--model both|llama-8b|qwen3-0.6b] [--cells offline,single,...] [--json FILE]

Owns the order of things and the report. Everything goes through the engine's real processes, with random weights: it
needs no download. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fast_inference import LLM
from gpu_cells import (
    ENGINE,
    MODELS,
    ONLINE_INPUT,
    ONLINE_SECONDS,
    RATES,
    first_warm_ups,
    offline_cells,
    online_requests,
    shape_folder,
)
from gpu_floors import (
    CARDS,
    FIGURES,
    HIGHER_IS_BETTER,
    STARTUP_LIMIT,
    VLLM,
    card_of,
    cell_seconds,
    decode_seconds,
    prompt_seconds,
    reached,
    shape_of,
    target,
)
from gpu_runs import run_offline, run_online, seconds_of, settle
from report import console, machine, write_json
from rich.table import Table

ONLINE = "online"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    known = (*offline_cells(), ONLINE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("both", *MODELS), default="both")
    parser.add_argument("--cells", default=",".join(known), help="of them, with commas between")
    parser.add_argument("--repeats", type=int, default=3, help="runs of an offline cell; the median counts")
    parser.add_argument("--online-seconds", type=float, default=ONLINE_SECONDS, help="of arrivals at each rate")
    parser.add_argument("--max-num-batched-tokens", type=int, default=16_384, help="default: vLLM's for such a card")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    args = parser.parse_args(arguments)
    args.models = list(MODELS) if args.model == "both" else [args.model]
    args.cells = args.cells.split(",")
    for cell in args.cells:
        if cell not in known:
            parser.error(f"--cells: there is no cell {cell!r}; there are {', '.join(known)}")
    return args


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start an engine on `model` and run the cells. Figures are in the units of `gpu_floors.FIGURES`."""
    cells: dict[str, Any] = {}
    with shape_folder(model) as folder:
        began = time.perf_counter()
        llm = LLM(
            folder,
            served_model_name=model,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=False,
            **ENGINE,
        )
        with llm:
            started = time.perf_counter() - began
            cells["startup"] = {"figures": {"startup": started}}
            cells["startup"]["recording_seconds"] = settle(llm.endpoint)
            for warm_up in first_warm_ups():
                seconds_of(llm, warm_up)
            for name, cell in offline_cells().items():
                if name in args.cells:
                    console.print(f"{model}: {name}")
                    cells[name] = run_offline(llm, cell, args.repeats)
            if ONLINE in args.cells:
                asyncio.run(run_online(llm.endpoint, online_requests(RATES[-1], 4.0)))
                for rate in RATES:
                    console.print(f"{model}: {rate} requests a second")
                    run = asyncio.run(run_online(llm.endpoint, online_requests(rate, args.online_seconds)))
                    figures = {f"online {rate} {kind}": run[f"{kind}_ms"]["p99"] for kind in ("ttft", "itl")}
                    cells[f"online {rate}"] = {**run, "figures": figures}
    return {"model": model, "cells": cells}


def floors(model: str, card: str | None) -> dict[str, float]:
    """The floor of each figure on a known card, in the figure's unit; nothing for another card."""
    if card is None:
        return {}
    shape, limits = shape_of(MODELS[model]), CARDS[card]
    cells = offline_cells()
    found: dict[str, float] = {}
    for name in ("offline", "batch32", "sampled", "greedy128"):
        found[name] = cells[name].output_tokens / cell_seconds(shape, limits, cells[name].requests)
    found["prefill"] = cells["prefill"].prompt_tokens / cell_seconds(shape, limits, cells["prefill"].requests)
    found["prefill1"] = prompt_seconds(shape, limits, cells["prefill1"].prompt_tokens) * 1e3
    alone = decode_seconds(shape, limits, [cells["single"].prompt_tokens]) * 1e3
    found["single"] = alone
    # A short prompt too reads all weights once.
    found["single ttft"] = max(alone, prompt_seconds(shape, limits, cells["single"].prompt_tokens) * 1e3)
    for rate in RATES:
        found[f"online {rate} ttft"] = max(alone, prompt_seconds(shape, limits, ONLINE_INPUT) * 1e3)
        found[f"online {rate} itl"] = decode_seconds(shape, limits, [ONLINE_INPUT]) * 1e3
    return found


def rows(run: dict[str, Any], card: str | None) -> list[dict[str, Any]]:
    """One row for each figure of a model: ours, vLLM's, their ratio, what it must be, and the floor."""
    model = run["model"]
    peer = VLLM[card][model] if card is not None else {}
    floor = floors(model, card)
    table = []
    for cell in run["cells"].values():
        for name, ours in cell["figures"].items():
            theirs, wanted = peer.get(name), target(model, name)
            ratio = None if theirs is None else ours / theirs
            good = None if ratio is None or wanted is None else reached(name, ratio, wanted)
            if name == "startup":
                good = ours <= STARTUP_LIMIT
            table.append(
                {
                    "figure": name,
                    "unit": FIGURES[name][0],
                    "ours": ours,
                    "vllm": theirs,
                    "ratio": ratio,
                    "target": wanted,
                    "reached": good,
                    "floor": floor.get(name),
                }
            )
    return table


def draw(run: dict[str, Any], card_name: str) -> Table:
    """The table of one model on the terminal."""
    table = Table(title=f"{run['model']} on {card_name}")
    for column in ("figure", "unit", "ours", "vLLM", "ratio", "wanted", "", "floor"):
        table.add_column(column, justify="left" if column in ("figure", "unit") else "right")
    for row in run["rows"]:
        sign = ">=" if row["unit"] in HIGHER_IS_BETTER else "<="
        wanted = f"{sign} {STARTUP_LIMIT:g} s" if row["figure"] == "startup" else ""
        if row["target"] is not None:
            wanted = f"{sign} {row['target']:g}x"
        mark = {None: "", True: "yes", False: "no"}[row["reached"]]
        figures = (number(row["ours"]), number(row["vllm"]), number(row["ratio"]), wanted, mark, number(row["floor"]))
        table.add_row(row["figure"], row["unit"], *figures)
    return table


def number(value: float | None) -> str:
    """Three digits that count, more of a large number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> int:
    args = parse_args()
    if not torch.cuda.is_available():
        console.print("no CUDA device: this measures the engine on a GPU")
        return 1
    name = torch.cuda.get_device_name()
    card = card_of(name)
    if card is None:
        console.print(f"vLLM's figures and the floors are known for {', '.join(CARDS)}, not for {name}")
    report: dict[str, Any] = {"machine": machine(), "gpu": name, "models": []}
    for model in args.models:
        run = measure(model, args)
        run["rows"] = rows(run, card)
        report["models"].append(run)
        write_json(args.json, report)  # what is measured stays, should a later model fail
    for run in report["models"]:
        console.print(draw(run, name))
        gaps = {name: cell["gap_seconds"] for name, cell in run["cells"].items() if cell.get("gap_seconds")}
        told = ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in gaps.items())
        console.print(f"the device stood still between two decode steps, in the mean: {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
