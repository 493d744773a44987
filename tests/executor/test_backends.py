"""The backends against each other: `torch` against a float64 loop that anyone can check by eye, `cpu` against `torch`.

Random steps mix decode rows and prompt chunks with cached prefixes; the cache starts full of NaN, so that a kernel that
looks at a slot it must not see is found out.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from fast_inference.executor.backends.base import KernelsUnavailable
from fast_inference.executor.backends.cpu import CpuBackend
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.kernels.cpu.pack import pack_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .random_step import Step, attend, make_step

# Relative to results of size about 1: bfloat16 keeps 8 bits, and attention rounds its weights to it as well.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.bfloat16)
RANDOM = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
head_sizes = st.sampled_from((8, 16, 40, 64, 80, 96, 128, 256))
block_sizes = st.sampled_from((1, 8, 16, 128))
groups = st.sampled_from(((1, 1), (3, 1), (1, 3), (4, 2), (8, 1), (17, 1)))  # (query heads per kv head, kv heads)
rows = st.lists(  # (query tokens, tokens before them)
    st.tuples(st.one_of(st.just(1), st.integers(1, 70)), st.one_of(st.just(0), st.integers(0, 90))),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def reference() -> TorchBackend:
    return TorchBackend()


@pytest.fixture(scope="module")
def cpu() -> CpuBackend:
    try:
        return CpuBackend()
    except KernelsUnavailable as reason:
        pytest.skip(f"C kernels: {reason}")


def naive_attention(q: Tensor, step: Step, scale: float, window: int | None, soft_cap: float | None) -> Tensor:
    """[T, Hq * D] float64, one token and one head at a time."""
    heads, head_size = q.shape[1:]
    group = heads // step.keys[0].shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    starts = step.batch.query_start.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        for token in range(start, end):
            position = len(step.keys[row]) - (end - token)
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                keys = step.keys[row][first : position + 1, head // group].double()
                scores = keys @ q[token, head].double() * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                values = step.values[row][first : position + 1, head // group].double()
                out[token, head] = torch.softmax(scores, 0) @ values
    return out.view(len(q), heads * head_size)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


attention_cases = given(
    seed=seeds,
    dtype=dtypes,
    lengths=rows,
    heads=groups,
    block_size=block_sizes,
    head_size=head_sizes,
    window=st.one_of(st.none(), st.integers(1, 60)),
    soft_cap=st.one_of(st.none(), st.floats(0.5, 50.0)),
)


@RANDOM
@attention_cases
def test_the_reference_attends_as_a_loop_over_tokens_and_heads_does(
    reference: TorchBackend, seed, dtype, lengths, heads, block_size, head_size, window, soft_cap
) -> None:
    torch.manual_seed(seed)
    lengths = [(min(query, 12), before) for query, before in lengths]
    step = make_step(lengths, heads[1], block_size, head_size, dtype)
    q = torch.randn(len(step.batch.positions), heads[0] * heads[1], head_size).to(dtype)
    actual = attend(reference, q, step, head_size**-0.5, window, soft_cap)
    assert actual.dtype is dtype
    assert_close(actual, naive_attention(q, step, head_size**-0.5, window, soft_cap), dtype)


@RANDOM
@attention_cases
def test_the_c_kernels_attend_as_the_reference_does(
    reference: TorchBackend, cpu: CpuBackend, seed, dtype, lengths, heads, block_size, head_size, window, soft_cap
) -> None:
    torch.manual_seed(seed)
    step = make_step(lengths, heads[1], block_size, head_size, dtype)
    q = torch.randn(len(step.batch.positions), heads[0] * heads[1], head_size).to(dtype)
    expected = attend(reference, q, step, head_size**-0.5, window, soft_cap)
    assert_close(attend(cpu, q, step, head_size**-0.5, window, soft_cap), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", (None, 700))
@pytest.mark.parametrize(
    "lengths",
    ([(1, 2047)], [(1, 511), (1, 512), (1, 1600), (5, 1100)], [(600, 0)], [(300, 900), (1, 0), (130, 1)]),
    ids=("one long decode row", "decode rows around a split", "a long prompt", "a prompt behind a cached prefix"),
)
def test_the_c_kernels_attend_over_many_tiles_of_keys(
    reference: TorchBackend, cpu: CpuBackend, lengths: list[tuple[int, int]], window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    step = make_step(lengths, 3, 16, 64, dtype)
    q = torch.randn(len(step.batch.positions), 9, 64).to(dtype)
    expected = attend(reference, q, step, 0.3, window, None)
    assert_close(attend(cpu, q, step, 0.3, window, None), expected, dtype)


def test_two_rows_may_share_the_blocks_of_a_prefix(reference: TorchBackend, cpu: CpuBackend) -> None:
    torch.manual_seed(0)
    step = make_step([(1, 40), (1, 40)], 3, 16, 64, torch.float32)
    step.batch.block_tables[1, :2] = step.batch.block_tables[0, :2]
    q = torch.randn(2, 9, 64)
    assert_close(attend(cpu, q, step, 0.1, None, None), attend(reference, q, step, 0.1, None, None), torch.float32)


@RANDOM
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=st.integers(1, 300),
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 200),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    wide=st.booleans(),
)
def test_every_linear_layer_multiplies_as_float64_does(
    reference: TorchBackend,
    cpu: CpuBackend,
    seed,
    dtype,
    tokens,
    in_features,
    out_features,
    has_bias,
    has_residual,
    wide,
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    residual = torch.randn(tokens, out_features).to(dtype) if has_residual else None
    x = torch.randn(tokens, in_features).to(dtype)
    expected = x.double() @ weight.double().T
    expected = expected + (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
    for backend in (reference, cpu):
        actual = backend.linear(weight, bias)(x, residual, torch.float32 if wide else None)
        assert actual.dtype is (torch.float32 if wide else dtype)
        assert_close(actual, expected, torch.float32 if wide else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"), ((1, 576, 960), (64, 1536, 576), (300, 576, 3072), (600, 2048, 100))
)
def test_the_c_kernels_multiply_over_many_blocks(
    cpu: CpuBackend, tokens: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    x = torch.randn(tokens, in_features).to(dtype)
    assert_close(cpu.linear(weight)(x, None, torch.float32), x.double() @ weight.double().T, torch.float32)


def test_a_row_gives_the_same_result_alone_and_among_others(cpu: CpuBackend) -> None:
    torch.manual_seed(0)
    layer = cpu.linear(torch.randn(500, 576).bfloat16())
    x = torch.randn(300, 576).bfloat16()
    together = layer(x, None, torch.float32)
    for row in (0, 13, 14, 150, 299):
        assert torch.equal(layer(x[row : row + 1], None, torch.float32)[0], together[row])


def test_a_packed_weight_takes_no_more_memory_than_the_weight() -> None:
    weight = torch.randn(960, 576).bfloat16()
    assert pack_weight(weight).nbytes == weight.nbytes


@RANDOM
@given(seed=seeds, dtype=dtypes, tokens=st.integers(1, 100), size=st.integers(1, 700))
def test_norms_and_activations_agree_with_float64(
    reference: TorchBackend, cpu: CpuBackend, seed, dtype, tokens, size
) -> None:
    torch.manual_seed(seed)
    x, weight = (torch.randn(tokens, size) * 3).to(dtype), torch.randn(size).to(dtype)
    gate_up = (torch.randn(tokens, 2 * size) * 5).to(dtype)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    gate, up = gate_up.double().chunk(2, -1)
    for backend in (reference, cpu):
        assert_close(backend.rms_norm(x, weight, 1e-5), normed, dtype)
        assert_close(backend.silu_mul(gate_up), torch.nn.functional.silu(gate) * up, dtype)


def test_joined_operations_are_their_parts_one_after_another(reference: TorchBackend, cpu: CpuBackend) -> None:
    torch.manual_seed(0)
    x, residual, norm = torch.randn(5, 48), torch.randn(5, 32), torch.randn(32)
    for backend in (reference, cpu):
        linear = backend.linear(torch.randn(32, 48), torch.randn(32))
        assert torch.equal(backend.linear_silu_mul(linear, x), backend.silu_mul(linear(x)))
        normed, total = backend.linear_add_norm(linear, x, residual, norm, 1e-5)
        assert torch.equal(total, linear(x, residual))
        assert torch.equal(normed, backend.rms_norm(total, norm, 1e-5))


def test_silu_has_no_overflow_at_the_ends_of_the_range(cpu: CpuBackend) -> None:
    gate = torch.tensor([-3e38, -1000.0, -100.0, 0.0, 100.0, 3e38])
    out = cpu.silu_mul(torch.cat((gate, torch.ones(6)))[None])
    torch.testing.assert_close(out[0], torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0, 3e38]), atol=1e-6, rtol=1e-6)


@RANDOM
@given(
    seed=seeds,
    dtype=dtypes,
    lengths=rows,
    heads=groups,
    block_size=block_sizes,
    head_size=head_sizes,
    has_norms=st.booleans(),
)
def test_heads_are_rotated_by_halves_and_cached_at_their_slots(
    reference: TorchBackend, cpu: CpuBackend, seed, dtype, lengths, heads, block_size, head_size, has_norms
) -> None:
    torch.manual_seed(seed)
    group, kv_heads = heads
    step = make_step(lengths, kv_heads, block_size, head_size, dtype)
    tokens = len(step.batch.positions)
    qkv = torch.randn(tokens, (group + 2) * kv_heads * head_size).to(dtype)
    angles = torch.arange(step.batch.max_seq_len)[:, None] * 10000.0 ** (-torch.arange(head_size // 2) / head_size)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    norms = [torch.randn(head_size).to(dtype) if has_norms else None for _ in range(2)]

    def rotated(x: Tensor, norm: Tensor | None) -> Tensor:
        wide = x.double()
        if norm is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
        turn = torch.polar(torch.ones_like(angles), angles)[step.batch.positions][:, None]
        turned = torch.complex(*wide.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    q, k, v = qkv.view(tokens, -1, head_size).split((group * kv_heads, kv_heads, kv_heads), 1)
    block, offset = step.batch.slot_mapping // block_size, step.batch.slot_mapping % block_size
    for backend in (reference, cpu):
        kv = step.copy_of_kv()
        actual = backend.rope_and_cache(qkv, cos_sin, kv, step.batch, *norms)
        assert_close(actual, rotated(q, norms[0]), dtype)
        assert_close(kv.keys[block, :, offset], rotated(k, norms[1]), dtype)
        assert torch.equal(kv.values[block, :, offset], v)
        kv.values[block, :, offset] = math.nan
        written = torch.zeros(kv.keys.shape[0], block_size, dtype=torch.bool)
        written[block, offset] = True
        untouched = ~written[:, None, :, None].expand_as(kv.keys)
        before = step.kv.keys[untouched]
        assert torch.equal(kv.keys[untouched].nan_to_num(9.0), before.nan_to_num(9.0))


def test_a_wrong_shape_or_dtype_is_refused_before_it_reaches_memory(cpu: CpuBackend) -> None:
    layer = cpu.linear(torch.randn(32, 64).bfloat16())
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(1, 63).bfloat16())
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(1, 64))
    with pytest.raises(ValueError, match="residual"):
        layer(torch.randn(1, 64).bfloat16(), torch.randn(2, 32).bfloat16())
    with pytest.raises(ValueError, match="float16"):
        cpu.silu_mul(torch.randn(2, 8).half())


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_one_openmp_runtime_is_mapped(cpu: CpuBackend) -> None:
    code = (
        "from fast_inference.executor.backends.cpu import CpuBackend; CpuBackend();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    assert run_python(code) == "1"


def test_without_a_compiler_the_reason_is_told(tmp_path) -> None:
    code = (
        "from fast_inference.executor.backends.base import KernelsUnavailable\n"
        "from fast_inference.executor.kernels.cpu.build import load\n"
        "try: load()\n"
        "except KernelsUnavailable as reason: print(reason)"
    )
    told = run_python(code, PATH=str(tmp_path), CC="", FAST_INFERENCE_HOME=str(tmp_path))
    assert "no C compiler" in told or "OpenMP" in told


def test_processes_that_build_at_once_do_not_disturb_each_other(cpu: CpuBackend, tmp_path) -> None:
    code = "from fast_inference.executor.backends.cpu import CpuBackend; CpuBackend(); print('ready')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAST_INFERENCE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    builders = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [builder.communicate(timeout=240)[0].strip() for builder in builders] == ["ready"] * 3
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]
