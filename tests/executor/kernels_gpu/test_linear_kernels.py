"""The product kernel and its endings against torch, and the table that says where it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.kernels.gpu.linear import Plan, multiply, multiply_add_norm, multiply_silu_mul
from fast_inference.executor.kernels.gpu.linear_table import (
    MOST_ROWS,
    LinearTable,
    Product,
    bucket,
    buckets,
    candidates,
    fastest,
    load_table,
)
from torch import Tensor

REFERENCE = TorchBackend()
SMALL = Plan(rows=16, outs=16, ins=16, splits=1, stages=2, warps=4)
SPLIT = Plan(rows=16, outs=32, ins=32, splits=3, stages=2, warps=4)
BOUND = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def randn(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is expected.dtype
    torch.testing.assert_close(actual, expected, rtol=BOUND[actual.dtype], atol=BOUND[actual.dtype])


def check(
    rows: int, outs: int, ins: int, plan: Plan, biased: bool, device: torch.device, dtype: torch.dtype = torch.float16
) -> None:
    x = randn(rows, ins, device=device, seed=1, dtype=dtype)
    weight = randn(outs, ins, device=device, seed=2, dtype=dtype) * ins**-0.5
    bias = randn(outs, device=device, seed=3, dtype=dtype) if biased else None
    residual = randn(rows, outs, device=device, seed=4, dtype=dtype)
    norm = randn(outs, device=device, seed=5, dtype=dtype)
    linear = REFERENCE.linear(weight, bias)
    assert_close(multiply(x, weight, bias, None, dtype, plan), linear(x))
    assert_close(multiply(x, weight, bias, residual, dtype, plan), linear(x, residual))
    assert_close(multiply(x, weight, bias, None, torch.float32, plan), linear(x, None, torch.float32))
    mine = multiply_add_norm(x, weight, bias, residual, norm, 1e-5, plan)
    for part, expected in zip(mine, REFERENCE.linear_add_norm(linear, x, residual, norm, 1e-5), strict=True):
        assert_close(part, expected)
    if plan.splits == 1:
        assert_close(multiply_silu_mul(x, weight, bias, plan), REFERENCE.linear_silu_mul(linear, x))


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("plan", (SMALL, SPLIT), ids=("whole", "split"))
@pytest.mark.parametrize(("rows", "outs", "ins"), ((1, 32, 96), (5, 50, 70), (19, 48, 192), (2, 2, 8)))
def test_products_and_their_endings_are_those_of_torch(
    rows: int, outs: int, ins: int, plan: Plan, biased: bool, device: torch.device
) -> None:
    check(rows, outs, ins, plan, biased, device)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (1, 7, 16, 40, 256))
@pytest.mark.parametrize(("outs", "ins"), ((4096, 14336), (6144, 1024)))
def test_every_candidate_is_right_at_real_sizes(rows: int, outs: int, ins: int, cuda: torch.device) -> None:
    for operation in ("linear", "linear_silu_mul"):
        for plan in candidates(Product(operation, bucket(rows), outs, ins, "bfloat16"), 132):
            check(rows, outs, ins, plan, False, cuda, torch.bfloat16)


def test_a_backend_with_a_table_gives_what_one_without_gives(device: torch.device) -> None:
    weight = randn(64, 48, device=device, seed=1) * 48**-0.5
    names = ("linear", "linear_silu_mul", "linear_add_norm")
    table = LinearTable({Product(name, 4, 64, 48, "float16"): SMALL for name in names})
    residual, norm = (randn(*shape, device=device, seed=2) for shape in ((3, 64), (64,)))
    for x in (randn(3, 48, device=device, seed=3), randn(1, 48, device=device, seed=3)):  # one row: not in the table
        results = []
        for backend in (TritonBackend(table), TritonBackend()):
            linear = backend.linear(weight)
            joined = backend.linear_add_norm(linear, x, residual[: len(x)], norm, 1e-5)
            results.append((linear(x), linear(x, residual[: len(x)]), backend.linear_silu_mul(linear, x), *joined))
        for mine, expected in zip(*results, strict=True):
            assert_close(mine, expected)


def test_float32_is_never_the_kernels_even_where_a_table_says_so(device: torch.device) -> None:
    weight = randn(32, 48, device=device, seed=1, dtype=torch.float32)
    x = randn(3, 48, device=device, seed=2, dtype=torch.float32)
    backend = TritonBackend(LinearTable({Product("linear", 4, 32, 48, "float32"): SMALL}))
    assert torch.equal(backend.linear(weight)(x), REFERENCE.linear(weight)(x))


def test_rows_are_rounded_up_to_measured_sizes() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 16, 17, 200, 256)] == [1, 2, 4, 16, 32, 256, 256]
    assert buckets() == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(bucket(rows) in buckets() for rows in range(1, MOST_ROWS + 1))


def test_candidates_are_few_and_fit_on_the_card() -> None:
    for operation in ("linear", "linear_silu_mul", "linear_add_norm"):
        for rows in buckets():
            for outs, ins in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1024, 3072), (151936, 1024)):
                plans = candidates(Product(operation, rows, outs, ins, "bfloat16"), 132)
                assert 1 <= len(plans) <= 24
                assert len(set(plans)) == len(plans)
                halves = 2 if operation == "linear_silu_mul" else 1
                for plan in plans:
                    assert plan.stages * (halves * plan.outs + plan.rows) * plan.ins * 2 <= 160 << 10
                    assert plan.splits == 1 or halves == 1


def test_a_plan_must_be_clearly_faster_than_cublas() -> None:
    assert fastest({None: 10.0, SMALL: 9.9, SPLIT: 11.0}) is None
    assert fastest({None: 10.0, SMALL: 9.0, SPLIT: 8.0}) == SPLIT
    assert fastest({None: 10.0}) is None


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    plans = {
        Product("linear", 1, 4096, 1024, "bfloat16"): SPLIT,
        Product("linear_silu_mul", 8, 4096, 1024, "bfloat16"): None,
    }
    path = tmp_path / "linear" / "card.json"
    LinearTable(plans).save(path)
    table = load_table(path)
    assert table.plans == plans
    assert table.plans_of(4096, 1024, torch.bfloat16) == {("linear", 1): SPLIT}
    assert table.plans_of(4096, 1024, torch.float16) == {}


def test_a_missing_table_is_empty_and_a_broken_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_table(tmp_path / "none.json").plans == {}
    assert not caplog.records
    path = tmp_path / "broken.json"
    for text in ("{", "[1]", json.dumps([{"operation": "linear", "plan": None}])):
        caplog.clear()
        path.write_text(text)
        assert load_table(path).plans == {}
        assert "broken.json can't be used" in caplog.text
