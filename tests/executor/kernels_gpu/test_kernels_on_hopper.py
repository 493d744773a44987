"""The kernels around attention, compiled for Hopper on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

COMPILE = """
import sys; sys.path.insert(0, {folder!r})
from hopper import SHARED_MEMORY, compiled
import torch
from fast_inference.executor.draw_columns import DrawColumns
from fast_inference.executor.kernels.gpu.linear import multiply, multiply_add_norm, multiply_silu_mul
from fast_inference.executor.kernels.gpu.linear_plan import Plan
from fast_inference.executor.kernels.gpu.norm import add_rms_norm, rms_norm
from fast_inference.executor.kernels.gpu.rope import rope_and_cache, write_kv
from fast_inference.executor.kernels.gpu.silu import silu_mul
from fast_inference.executor.step_kernels import step_kernels_unchecked

half = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
ints = torch.zeros(16, dtype=torch.int64)
x, norm, head_norm, pages = half(16, 512), half(512), half(128), half(9, 2, 16, 128)
rms_norm(x, norm, 1e-5), add_rms_norm(x, x, norm, 1e-5), silu_mul(x)
rope_and_cache(half(16, 6 * 128), torch.zeros(99, 128), pages, pages, ints, ints, head_norm, head_norm, 1e-6)
write_kv(half(16, 2, 128), half(16, 2, 128), pages, pages, ints)
plan, cut = Plan(16, 64, 128, 1, 4, 4), Plan(64, 64, 64, 2, 4, 4)
multiply(x, half(256, 512), None, half(16, 256), torch.bfloat16, plan)
multiply(x, half(256, 512), norm[:256], None, torch.float32, cut)
multiply_silu_mul(x, half(256, 512), None, plan)
multiply_add_norm(x, half(512, 512), None, x, norm, 1e-5, cut)
plan, cut = Plan(16, 64, 128, 1, 4, 4, hopper=True), Plan(128, 128, 64, 2, 4, 8, hopper=True)
multiply(x, half(256, 512), norm[:256], half(16, 256), torch.float32, plan)
multiply_silu_mul(x, half(256, 512), norm, plan)
multiply_add_norm(x, half(512, 512), None, x, norm, 1e-5, cut)

step, slots, floats = step_kernels_unchecked(), torch.zeros(17, 64, dtype=torch.int32), torch.zeros(16)
logits = torch.zeros(16, 1024)
table = torch.zeros(17, dtype=torch.int64)
columns = torch.zeros(3, 17), table.new_zeros(2, 17)
step.admit(slots[0], 2, 9, slots, table, slots, *columns)
step.gather(ints, slots, ints, slots, 16, 16), step.append(ints, ints, ints, slots, ints, 16)
step.best_tokens(logits), step.chosen_logprobs(logits, ints), step.add_bias(logits, ints, ints, floats)
step.draw(logits, floats, ints, ints, ints, floats, ints, floats, floats)
for columns in (None, DrawColumns(floats, floats, floats, ints, ints)):
    step.choose(logits, ints, ints, slots, ints, 16, columns)
step.penalize(logits, ints, slots, ints, 40, ints, ints, floats, floats, floats)
for name, variants in compiled.items():
    assert all(kernel.metadata.shared <= SHARED_MEMORY and kernel.asm["cubin"] for kernel in variants), name
for kernel in compiled["_product_hopper"]:  # its products run on the matrix units, none waiting for the one before
    instructions = kernel.asm["sass"]
    assert instructions.count("HGMMA") >= 4 and instructions.count("WARPGROUP.DEPBAR") == 2, instructions
print(*sorted(compiled))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which compiles them itself")
def test_every_kernel_compiles_and_finds_room_on_the_card() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = COMPILE.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 20, done.stdout
