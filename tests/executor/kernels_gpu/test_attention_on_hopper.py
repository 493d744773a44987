"""The attention kernels as a GPU sees them: compiled for Hopper on any machine, and run at real shapes on a device."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ..random_step import attend, make_step

pytest.importorskip("triton")

from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.kernels.gpu.attention_decode import decode_attention
from fast_inference.executor.kernels.gpu.attention_hopper import _counter, hopper_attention
from fast_inference.executor.kernels.gpu.attention_hopper_decode import _arrivals, hopper_decode_attention
from fast_inference.executor.kernels.gpu.card import is_hopper

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

COMPILE = """
import sys; sys.path.insert(0, {folder!r})
from hopper import SHARED_MEMORY, compiled
import torch
from fast_inference.executor.backends.base import KVLayer, StepBatch
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.kernels.gpu.attention_hopper import hopper_attention
from fast_inference.executor.kernels.gpu.attention_hopper_decode import hopper_decode_attention

ints = lambda *values: torch.tensor(values, dtype=torch.int32)
for head_size, window, soft_cap in ((128, None, None), (64, 100, 30.0)):
    kv = KVLayer(*torch.zeros(2, 64, 2, 16, head_size, dtype=torch.bfloat16).unbind())
    batch = StepBatch(ints(0), ints(0), torch.zeros(2, 32, dtype=torch.int32), ints(0, 1, 6), ints(500, 500), 1, 5, 500)
    q = torch.zeros(6, 8, head_size, dtype=torch.bfloat16)
    TritonBackend().attention(q, kv, batch, 0.1, window, soft_cap)
    if head_size == 128:
        hopper_attention(q, kv, batch, 0.1, q.flatten(1))
        hopper_decode_attention(q, kv, batch, 0.1, q.flatten(1))
        for call in TritonBackend().compile_calls(8, kv):
            call()
for name, variants in compiled.items():
    assert all(kernel.metadata.shared <= SHARED_MEMORY and kernel.asm["cubin"] for kernel in variants), name
    print(name, len(variants))
for name in ("_hopper_decode", "_hopper_prefill"):  # the engine for copies must see the barriers as they were made
    for kernel in compiled[name]:
        made = kernel.asm["ptx"].rsplit("mbarrier.init", 1)[1].split("cp.async.bulk", 1)[0]
        assert "fence.proxy.async" in made, name
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which compiles them itself")
def test_the_kernels_compile_for_hopper_and_fit_into_its_shared_memory() -> None:
    code = COMPILE.format(folder=str(Path(__file__).parent))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) > {"_decode", "_hopper_decode", "_hopper_prefill", "_merge", "_prefill"}
    assert done.stdout.splitlines()[0] == "_decode 5"  # windowed, and with and without an order, whole and in parts


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_size", (64, 80, 96, 128, 256))
@pytest.mark.parametrize(("window", "soft_cap"), ((None, None), (1000, None), (None, 30.0)))
def test_mixed_steps_of_real_lengths_attend_as_the_reference_does(
    cuda: str, dtype: torch.dtype, head_size: int, window: int | None, soft_cap: float | None
) -> None:
    lengths = [(1, 0), (1, 4095), (1, 777), (2, 30), (512, 0), (700, 1300), (2048, 0)]
    step = make_step(lengths, 8, 16, head_size, dtype).to(cuda)
    q = torch.randn(len(step.batch.positions), 32, head_size, device=cuda).to(dtype)
    actual = attend(TritonBackend(), q, step, head_size**-0.5, window, soft_cap)
    expected = attend(TorchBackend(), q, step, head_size**-0.5, window, soft_cap)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (1, 4, 64))
def test_one_captured_graph_serves_all_lengths_and_gives_what_a_call_gives(cuda: str, rows: int) -> None:
    step = make_step([(1, 3999 - 50 * row) for row in range(rows)], 8, 16, 128, torch.bfloat16).to(cuda)
    kv = step.copy_of_kv()
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    q = torch.randn(rows, 32, 128, device=cuda, dtype=torch.bfloat16)
    out = torch.empty(rows, 32 * 128, device=cuda, dtype=torch.bfloat16)
    decode_attention(q, kv, step.batch, 0.1, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(q, kv, step.batch, 0.1, out)
    for length in (1, 64, 100, 800):
        step.batch.seq_lens.fill_(length)
        graph.replay()
        again = torch.empty_like(out)
        decode_attention(q, kv, replace(step.batch, max_seq_len=length), 0.1, again)
        assert torch.equal(out, again)
        expected = TorchBackend().attention(q, kv, replace(step.batch, max_seq_len=length), 0.1)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("group", "kv_heads", "block_size"), ((4, 8, 16), (7, 3, 16), (1, 2, 48), (64, 1, 128)))
def test_the_kernel_for_hopper_gives_what_the_reference_gives(
    cuda: str, dtype: torch.dtype, group: int, kv_heads: int, block_size: int
) -> None:
    if not is_hopper(torch.device(cuda)):
        pytest.skip("no Hopper card")
    lengths = [(1, 0), (1, 140), (2, 30), (5, 0), (45, 60), (128, 128), (129, 777), (300, 0), (640, 1300)]
    step = make_step(lengths, kv_heads, block_size, 128, dtype).to(cuda)
    kv = step.copy_of_kv()
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    q = torch.randn(len(step.batch.positions), group * kv_heads, 128, device=cuda).to(dtype)
    expected = TorchBackend().attention(q, kv, step.batch, 0.1)
    out = torch.full_like(expected, 7.0)
    for _ in range(2):  # the first leaves the counter as the second needs it
        hopper_attention(q, kv, step.batch, 0.1, out)
        assert out[:2].eq(7.0).all()  # the decode rows are another kernel's
        torch.testing.assert_close(out[2:], expected[2:], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        out[2:] = torch.nan
    assert _counter(q.device).eq(0).all()


DECODES = {
    "one tile each": [17] * 200,
    "parts of equal rows": [500] * 17,
    "all lengths": [1 + 37 * row % 1500 for row in range(63)],
    "one row divided among many programs": [*range(1, 60), 8000],
    "rows without tokens": [0, 0, *(70 * (row % 3) for row in range(300)), 0],
    "fewer tiles than programs": [3, 0, 64],
    "nothing": [0, 0],
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("group", "kv_heads", "block_size"), ((4, 8, 16), (7, 3, 16), (1, 2, 48), (16, 1, 128)))
@pytest.mark.parametrize("lengths", DECODES.values(), ids=DECODES)
def test_the_decode_kernel_for_hopper_gives_what_the_reference_gives(
    cuda: str, dtype: torch.dtype, group: int, kv_heads: int, block_size: int, lengths: list[int]
) -> None:
    if not is_hopper(torch.device(cuda)):
        pytest.skip("no Hopper card")
    step = make_step([(1, max(length - 1, 0)) for length in lengths], kv_heads, block_size, 128, dtype).to(cuda)
    kv = step.copy_of_kv()
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    q = torch.randn(len(lengths), group * kv_heads, 128, device=cuda).to(dtype)
    expected = TorchBackend().attention(q, kv, step.batch, 0.1)
    lens = torch.tensor(lengths, dtype=torch.int32, device=cuda)
    expected[lens == 0] = 0.0
    for _ in range(3):  # each leaves the counters as the next needs them
        out = torch.full_like(expected, torch.nan)
        hopper_decode_attention(q, kv, replace(step.batch, seq_lens=lens), 0.1, out)
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert _arrivals(q.device).eq(0).all()


@pytest.mark.gpu
def test_rows_without_tokens_change_no_bit_of_the_others(cuda: str) -> None:
    """So a recorded step, which has some, gives what an eager one gives, to the bit."""
    if not is_hopper(torch.device(cuda)):
        pytest.skip("no Hopper card")
    step = make_step([(1, 99 * row) for row in range(40)], 8, 16, 128, torch.bfloat16).to(cuda)
    kv = step.copy_of_kv()
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    q = torch.randn(64, 32, 128, device=cuda, dtype=torch.bfloat16)
    alone, padded = torch.empty(2, 64, 32 * 128, device=cuda, dtype=torch.bfloat16).unbind()
    hopper_decode_attention(q[:40], kv, step.batch, 0.1, alone[:40])
    tables, lens = step.batch.block_tables, step.batch.seq_lens
    more = replace(
        step.batch,
        block_tables=torch.cat((tables, tables[:24])),
        seq_lens=torch.cat((lens, torch.zeros_like(lens[:24]))),
        num_decodes=64,
    )
    hopper_decode_attention(q, kv, more, 0.1, padded)
    assert torch.equal(alone[:40], padded[:40]) and padded[40:].eq(0).all()


@pytest.mark.gpu
def test_a_graph_of_the_kernel_for_hopper_serves_other_rows(cuda: str) -> None:
    if not is_hopper(torch.device(cuda)):
        pytest.skip("no Hopper card")
    step = make_step([(900, 0), (300, 0)], 8, 16, 128, torch.bfloat16).to(cuda)
    kv = step.copy_of_kv()
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    q = torch.randn(1200, 32, 128, device=cuda, dtype=torch.bfloat16)
    out = torch.empty(1200, 32 * 128, device=cuda, dtype=torch.bfloat16)
    ends = torch.tensor([0, 100, 100], device=cuda, dtype=torch.int32)  # the second row is padding
    batch = replace(step.batch, query_start=ends, seq_lens=ends[1:].clone())
    hopper_attention(q, kv, batch, 0.1, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper_attention(q, kv, batch, 0.1, out)
    batch.query_start.copy_(step.batch.query_start)
    batch.seq_lens.copy_(step.batch.seq_lens)
    expected = TorchBackend().attention(q, kv, step.batch, 0.1)
    for _ in range(2):
        out.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
