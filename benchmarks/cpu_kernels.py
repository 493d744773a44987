"""Times the CPU kernels, alone and as a whole decoder step, on the shapes of SmolLM2-135M.

Owns the measurement only; weights are random. Every layer has weights of its own, 270 MB in all, so that a step reads
them from memory as a real model does. The contenders of one line take turns, and the fastest of their repetitions
counts: other processes disturb a mean, not a minimum.

    python benchmarks/cpu_kernels.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fast_inference.executor.backends.base import Backend, KVLayer, Linear, StepBatch
from fast_inference.executor.backends.cpu import CpuBackend
from fast_inference.executor.backends.torch import TorchBackend
from torch import Tensor
from torch.nn import functional

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INTERMEDIATE, VOCABULARY, LAYERS = 576, 9, 3, 64, 1536, 49152, 30
QKV = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
BLOCK_SIZE = 16
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INTERMEDIATE, HIDDEN)}
SHAPES |= {"down": (HIDDEN, INTERMEDIATE), "lm_head": (VOCABULARY, HIDDEN)}
BEYOND_CACHE = 128 << 20  # bytes of weights to walk through so that none is found in a cache

Contender = Callable[[], object]


def fastest(contenders: dict[str, Contender], repetitions: int) -> dict[str, float]:
    """Seconds of the fastest run of each, the contenders taking turns."""
    best = dict.fromkeys(contenders, math.inf)
    for _ in range(repetitions):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def make_batch(lengths: list[tuple[int, int]]) -> StepBatch:
    """A step of rows (query tokens, tokens before them), each with blocks of its own."""
    queries = torch.tensor([query for query, _ in lengths])
    seq_lens = torch.tensor([query + before for query, before in lengths])
    width = int(-(-seq_lens.max() // BLOCK_SIZE))
    tables = torch.randperm(len(lengths) * width).view(len(lengths), width)
    positions = torch.cat([torch.arange(before, before + query) for query, before in lengths])
    row = torch.repeat_interleave(torch.arange(len(lengths)), queries)
    return StepBatch(
        positions=positions,
        slot_mapping=tables[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=tables.int(),
        query_start=torch.cat((torch.zeros(1), queries.cumsum(0))).int(),
        seq_lens=seq_lens.int(),
        num_decodes=int((queries == 1).sum()),
        max_query_len=int(queries.max()),
        max_seq_len=int(seq_lens.max()),
    )


def make_kv(batch: StepBatch, dtype: torch.dtype) -> KVLayer:
    return KVLayer(*torch.randn(2, batch.block_tables.numel(), KV_HEADS, BLOCK_SIZE, HEAD_SIZE).to(dtype))


class MkldnnLinear:
    """A weight packed by oneDNN through torch's private operators: the strongest linear that torch has on a CPU."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


@dataclass(frozen=True, slots=True)
class Layer:
    norms: tuple[Tensor, Tensor]
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    kv: KVLayer


class Decoder:
    """The step of a Llama-like decoder with random weights, one operation of `Backend` at a time."""

    def __init__(self, backend: Backend, batch: StepBatch, dtype: torch.dtype) -> None:
        self.backend, self.batch = backend, batch

        def linear(name: str) -> Linear:
            return backend.linear((torch.randn(SHAPES[name]) * 0.02).to(dtype))

        def norm() -> Tensor:
            return torch.ones(HIDDEN, dtype=dtype)

        self.layers = [
            Layer(
                (norm(), norm()), linear("qkv"), linear("o"), linear("gate_up"), linear("down"), make_kv(batch, dtype)
            )
            for _ in range(LAYERS)
        ]
        self.norm, self.lm_head = norm(), linear("lm_head")
        angles = torch.arange(8192)[:, None] * 10000.0 ** (-torch.arange(HEAD_SIZE // 2) / (HEAD_SIZE / 2))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        self.last = batch.query_start[1:].long() - 1
        self.x = torch.randn(len(batch.positions), HIDDEN).to(dtype)

    def step(self) -> Tensor:
        backend, batch, x = self.backend, self.batch, self.x
        for layer in self.layers:
            qkv = layer.qkv(backend.rms_norm(x, layer.norms[0], 1e-5))
            q = backend.rope_and_cache(qkv, self.cos_sin, layer.kv, batch)
            x = layer.o(backend.attention(q, layer.kv, batch, HEAD_SIZE**-0.5), x)
            gate_up = layer.gate_up(backend.rms_norm(x, layer.norms[1], 1e-5))
            x = layer.down(backend.silu_mul(gate_up), x)
        return self.lm_head(backend.rms_norm(x[self.last], self.norm, 1e-5), None, torch.float32)


def each(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Contender:
    return lambda: [layer(x) for layer in layers]


def linears(report: Report, cpu: Backend, dtype: torch.dtype, quick: bool) -> None:
    for name, (out_features, in_features) in SHAPES.items():
        size = out_features * in_features * dtype.itemsize
        weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(-(-BEYOND_CACHE // size))]
        packed = [cpu.linear(weight) for weight in weights]
        for rows in (1, 64, 512) if quick else (1, 2, 4, 8, 16, 32, 64, 256, 512, 2048):
            if name == "lm_head" and rows > 64:
                continue
            x = torch.randn(rows, in_features).to(dtype)
            count = len(weights) if rows <= 64 else 2
            contenders = {
                "cpu": each(packed[:count], x),
                "mkldnn": each([MkldnnLinear(weight, rows) for weight in weights[:count]], x),
                "F.linear": each([partial(functional.linear, weight=weight) for weight in weights[:count]], x),
            }
            times = {key: took / count for key, took in fastest(contenders, 3 if quick else 8).items()}
            report.add(f"linear {name} {rows} rows", times, size, 2 * rows * out_features * in_features)


def attentions(report: Report, cpu: Backend, dtype: torch.dtype, quick: bool) -> None:
    cases = {
        "1 row, 192 keys": [(1, 191)],
        "1 row, 4096 keys": [(1, 4095)],
        "64 rows, 150 keys": [(1, 149)] * 64,
        "64 rows, 1024 keys": [(1, 1023)] * 64,
        "prompt of 512": [(512, 0)],
        "prompt of 2048": [(2048, 0)],
        "16 tokens behind 512": [(16, 512)] * 8,
    }
    for name, lengths in cases.items():
        batch = make_batch(lengths)
        kv = make_kv(batch, dtype)
        q = torch.randn(len(batch.positions), HEADS, HEAD_SIZE).to(dtype)
        pairs = sum(query * before + query * (query + 1) // 2 for query, before in lengths)
        keys = sum(query + before for query, before in lengths)
        contenders: dict[str, Contender] = {
            "cpu": partial(cpu.attention, q, kv, batch, HEAD_SIZE**-0.5),
            "SDPA": dense_sdpa(lengths, dtype),
        }
        times = fastest(contenders, 10 if quick else 40)
        report.add(f"attention {name}", times, 2 * keys * KV_HEADS * HEAD_SIZE * dtype.itemsize, 4 * pairs * HEADS * 64)


def dense_sdpa(lengths: list[tuple[int, int]], dtype: torch.dtype) -> Contender:
    """torch's attention with keys and values that lie side by side already, as a paged cache does not have them."""
    query, before = lengths[0]
    q = torch.randn(len(lengths), HEADS, query, HEAD_SIZE).to(dtype)
    k, v = torch.randn(2, len(lengths), HEADS, query + before, HEAD_SIZE).to(dtype)
    mask = torch.ones(query, query + before, dtype=torch.bool).tril(before) if query > 1 and before else None
    causal = query > 1 and not before
    return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def small_operations(report: Report, cpu: Backend, dtype: torch.dtype) -> None:
    for rows in (1, 64, 2048):
        x, weight = torch.randn(rows, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
        gate_up = torch.randn(rows, 2 * INTERMEDIATE).to(dtype)
        qkv = torch.randn(rows, QKV).to(dtype)
        batch = make_batch([(1, 100)] * rows if rows < 100 else [(rows, 0)])
        kv, cos_sin = make_kv(batch, dtype), torch.randn(8192, HEAD_SIZE)
        runs: dict[str, Contender] = {
            "rms_norm": partial(cpu.rms_norm, x, weight, 1e-5),
            "silu_mul": partial(cpu.silu_mul, gate_up),
            "rope_and_cache": partial(cpu.rope_and_cache, qkv, cos_sin, kv, batch),
        }
        for name, run in runs.items():
            report.add(f"{name} {rows} rows", fastest({"cpu": run}, 100), 0, 0)


def steps(report: Report, dtype: torch.dtype, quick: bool) -> None:
    cases = {
        "decode 1 row, 192 keys": [(1, 191)],
        "decode 8 rows, 192 keys": [(1, 191)] * 8,
        "decode 64 rows, 150 keys": [(1, 149)] * 64,
        "decode 4 rows, 2064 keys": [(1, 2063)] * 4,
        "prefill 512": [(512, 0)],
        "prefill 2048": [(2048, 0)],
    }
    for name, lengths in cases.items():
        batch = make_batch(lengths)
        backends: list[Backend] = [CpuBackend(), TorchBackend()]
        decoders = {backend.name: Decoder(backend, batch, dtype) for backend in backends}
        contenders = {key: decoder.step for key, decoder in decoders.items()}
        report.add(f"step {name}", fastest(contenders, 3 if quick else 10), 0, 0)


class Report:
    """Prints a line per measurement and keeps it for the file."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []

    def add(self, name: str, times: dict[str, float], size: int, operations: int) -> None:
        """`times` in seconds; `size`: bytes that have to be read; `operations`: floating-point operations."""
        parts = []
        for contender, seconds in times.items():
            line: dict[str, object] = {"name": name, "contender": contender, "microseconds": seconds * 1e6}
            text = f"{contender} {seconds * 1e6:9.1f} us"
            if operations:
                line |= {"GB/s": size / seconds / 1e9, "GFLOP/s": operations / seconds / 1e9}
                text += f" {size / seconds / 1e9:5.1f} GB/s {operations / seconds / 1e9:5.0f} GFLOP/s"
            self.lines.append(line)
            parts.append(text)
        print(f"{name:32} " + " | ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file as well")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", choices=("linear", "attention", "small", "step"), help="one part of it")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    report, cpu = Report(), CpuBackend()
    parts: dict[str, Contender] = {
        "linear": lambda: linears(report, cpu, dtype, arguments.quick),
        "attention": lambda: attentions(report, cpu, dtype, arguments.quick),
        "small": lambda: small_operations(report, cpu, dtype),
        "step": lambda: steps(report, dtype, arguments.quick),
    }
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with torch.inference_mode():
        for name, part in parts.items():
            if arguments.only in (None, name):
                part()
    if arguments.json:
        arguments.json.write_text(json.dumps(report.lines, indent=1))


if __name__ == "__main__":
    main()
