"""Where each microsecond of a step goes: its kernels on the device, and what the host needs to launch it.

    python benchmarks/step_profile.py [--model llama-8b] [--rows 1 256] [--context 512] [--spread 0.6] [--prompts 128]

Owns the made-up steps, which go to an executor's runner in this process, two under way at a time as in the engine, but
without sockets or scheduler; and the table of their kernels. Random weights. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fast_inference.executor.runner import Runner
from fast_inference.executor.startup import start
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import Admit, Step, StepResult
from fast_inference.protocol.sampling import SamplingParams
from gpu_cells import ENGINE, MODELS, shape_folder
from report import console, machine, write_json
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

STEPS = 96  # of each kind; the device's times are medians of them
PROFILED = 8  # of further ones
RUN_AHEAD = 2
BATCHED_TOKENS = 8192
SHOWN = 14  # kernels of a table
NAME_WIDTH = 60


@dataclass(slots=True)
class Timed:
    """What some steps of one kind took, in seconds."""

    device: list[float]
    launch: list[float]  # of the host, to have it under way
    gaps: list[float]  # of the device, before it
    wall: float  # from one to the next


class Driver:
    """Sends steps to a runner as a scheduler would, its requests side by side in the cache."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._number = 0
        self._held: dict[int, int] = {}  # blocks of each slot
        self._known: dict[int, int] = {}  # tokens of each slot

    def run(self, steps: Iterator[Step]) -> Timed:
        """All of `steps`. Raises `RuntimeError` where a request fails."""
        pending: deque[Any] = deque()
        results: list[StepResult] = []
        launch = []
        began = time.perf_counter()
        for step in steps:
            if len(pending) == RUN_AHEAD:
                results.append(pending.popleft().finish())
            before = time.perf_counter()
            pending.append(self._runner.launch(step))
            launch.append(time.perf_counter() - before)
        results += [step.finish() for step in pending]
        wall = (time.perf_counter() - began) / len(results)
        if failed := [row.message for result in results for row in result.failed]:
            raise RuntimeError(failed[0])
        gaps = [result.gap_seconds for result in results if result.gap_seconds is not None]
        return Timed([result.seconds for result in results], launch, gaps, wall)

    def admit(self, lengths: Sequence[int], params: SamplingParams, cached: bool = False) -> Step:
        """A step in which the first slots, which were others' before, get prompts of so many tokens. With `cached` all
        but the last token of each is taken to be in the cache."""
        size, room = self._runner.batch.block_size, self._runner.batch.num_blocks // len(lengths)
        retire = np.array(sorted(self._held), np.int32)
        self._held = {slot: -(-(tokens + 1) // size) for slot, tokens in enumerate(lengths)}
        self._known = {slot: tokens + 1 for slot, tokens in enumerate(lengths)}
        admits = [
            Admit(
                slot=slot,
                token_ids=np.random.default_rng(slot).integers(0, 10_000, tokens, np.int32),
                num_prompt=tokens,
                params=params,
                seed=slot,
                block_ids=np.arange(slot * room, slot * room + self._held[slot], dtype=np.int32),
                cached_len=tokens - 1 if cached else 0,
            )
            for slot, tokens in enumerate(lengths)
        ]
        counts = np.array([1 if cached else tokens for tokens in lengths], np.int32)
        return self._step(retire=retire, admit=tuple(admits), work_counts=counts)

    def decodes(self, count: int) -> Iterator[Step]:
        """So many decode steps of all slots."""
        size = self._runner.batch.block_size
        room = self._runner.batch.num_blocks // len(self._held)
        for _ in range(count):
            grown = [slot for slot, held in self._held.items() if self._known[slot] > held * size]
            blocks = np.array([slot * room + self._held[slot] for slot in grown], np.int32)
            for slot in self._held:
                self._known[slot] += 1
            for slot in grown:
                self._held[slot] += 1
            yield self._step(
                grow_slots=np.array(grown, np.int32),
                grow_blocks=blocks,
                work_counts=np.ones(len(self._held), np.int32),
            )

    def _step(self, **fields: Any) -> Step:
        self._number += 1
        return Step(number=self._number, work_slots=np.array(list(self._held), np.int32), **fields)


def kernels(run: Any, steps: int) -> list[tuple[str, float, float]]:
    """(name, launches a step, microseconds a step) of all that ran on the device in `run`, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    found = [
        (event.key, event.count / steps, event.self_device_time_total / steps)
        for event in seen.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel[2])


def show(title: str, timed: Timed, found: list[tuple[str, float, float]]) -> dict[str, Any]:
    """Print the table of a kind of step, and return what is in it."""
    device, launch = statistics.median(timed.device), statistics.median(timed.launch)
    gap = statistics.fmean(timed.gaps) if timed.gaps else None
    busy = sum(microseconds for _, _, microseconds in found)
    console.print(
        f"{title}: {device * 1e6:.0f} us on the device, {busy:.0f} of them in kernels; {timed.wall * 1e6:.0f} us from "
        f"step to step; {launch * 1e6:.0f} us to launch"
        + ("" if gap is None else f"; gap {gap * 1e6:.1f} us (largest {max(timed.gaps) * 1e6:.1f})")
    )
    table = Table("kernel", "launches", "us a step", "us each")
    for name, count, microseconds in found[:SHOWN]:
        table.add_row(name[:NAME_WIDTH], f"{count:.1f}", f"{microseconds:.1f}", f"{microseconds / count:.2f}")
    console.print(table)
    figures = {"device": device, "launch": launch, "gap": gap, "wall": timed.wall, "busy": busy / 1e6}
    return {"step": title, "seconds": figures, "kernels": found}


def lengths_of(rows: int, args: argparse.Namespace) -> list[int]:
    """Tokens of each of `rows` requests: `args.context` in the mean, evenly spread, in no order."""
    spread = np.linspace(1 - args.spread, 1 + args.spread, rows) if rows > 1 else np.ones(1)
    lengths = np.random.default_rng(0).permutation(args.context * spread)
    return [max(1, int(length)) for length in lengths]


def measure(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kind of step of one model."""
    found = []
    params = SamplingParams(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_tokens=100_000)
    with shape_folder(model) as folder:
        config = EngineConfig(model=folder, max_num_batched_tokens=BATCHED_TOKENS, **ENGINE)
        engine = start(config, lambda phase, done, total: None)
        console.print(f"{model}: {engine.facts}")
        driver, graphs = Driver(engine.runner), engine.runner.graphs
        began = time.perf_counter()
        while graphs is not None and graphs.recordings.missing:
            graphs.recordings.go_on()
        console.print(f"{graphs.recordings.total if graphs else 0} recordings: {time.perf_counter() - began:.1f} s")
        for layer in engine.runner.kv.layers:  # what is cached is made up, but like what models compute
            layer.keys.normal_()
            layer.values.normal_()
        for rows in args.rows:
            driver.run(iter([driver.admit(lengths_of(rows, args), params, cached=True)]))
            driver.run(driver.decodes(4))
            timed = driver.run(driver.decodes(STEPS))
            title = f"{model}, decode, {rows} x {args.context + STEPS // 2} tokens"
            found.append(show(title, timed, kernels(lambda: driver.run(driver.decodes(PROFILED)), PROFILED)))
        for tokens in args.prompts:
            timed = driver.run(driver.admit([tokens], params) for _ in range(7))
            again = [driver.admit([tokens], params) for _ in range(2)]
            found.append(
                show(f"{model}, prompt, {tokens} tokens", timed, kernels(lambda s=again: driver.run(iter(s)), 2))
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32, 256], help="requests of a decode step")
    parser.add_argument("--context", type=int, default=512, help="tokens of each, in the mean")
    parser.add_argument("--spread", type=float, default=0.0, help="share by which the tokens of each differ from that")
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 8190], help="tokens of a prompt step")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        console.print("no CUDA device: this measures steps on a GPU")
        return 1
    with torch.inference_mode():
        found = measure(args.model, args)
    write_json(args.json, {"machine": machine(), "gpu": torch.cuda.get_device_name(), "steps": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
