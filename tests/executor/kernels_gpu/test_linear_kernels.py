"""The product kernel and its endings against torch, and the table that says where it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fast_inference.executor.backends import triton as triton_backend
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.backends.triton_linear import TritonLinear
from fast_inference.executor.backends.triton_tuning import tune
from fast_inference.executor.kernels.gpu import cublaslt
from fast_inference.executor.kernels.gpu.cublaslt import Algorithm
from fast_inference.executor.kernels.gpu.linear import multiply, multiply_add_norm, multiply_silu_mul
from fast_inference.executor.kernels.gpu.linear_plan import Plan
from fast_inference.executor.kernels.gpu.linear_table import (
    BUCKETS,
    LONG,
    LONG_FROM,
    MIDDLES,
    SHARED_BYTES,
    LinearTable,
    Operation,
    Product,
    bucket,
    candidates,
    fastest,
    load_table,
)
from torch import Tensor

REFERENCE = TorchBackend()
SMALL = Plan(rows=16, outs=16, ins=16, splits=1, stages=2, warps=4)
SPLIT = Plan(rows=16, outs=32, ins=32, splits=3, stages=2, warps=4)
OPERATIONS: tuple[Operation, ...] = ("linear", "linear_silu_mul", "linear_add_norm")
BOUND = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def randn(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is expected.dtype
    torch.testing.assert_close(actual, expected, rtol=BOUND[actual.dtype], atol=BOUND[actual.dtype])


def check(product: Product, rows: int, plan: Plan, biased: bool, device: torch.device) -> None:
    """The operation on `rows` rows by `plan`, against torch's."""
    operation, outs, ins, dtype = product.operation, product.outs, product.ins, getattr(torch, product.dtype)
    x = randn(rows, ins, device=device, seed=1, dtype=dtype)
    weight = randn(outs, ins, device=device, seed=2, dtype=dtype) * ins**-0.5
    bias = randn(outs, device=device, seed=3, dtype=dtype) if biased else None
    residual = randn(rows, outs, device=device, seed=4, dtype=dtype)
    norm = randn(outs, device=device, seed=5, dtype=dtype)
    linear = REFERENCE.linear(weight, bias)
    if operation == "linear_silu_mul":
        assert_close(multiply_silu_mul(x, weight, bias, plan), REFERENCE.linear_silu_mul(linear, x))
        return
    if operation == "linear_add_norm":
        mine = multiply_add_norm(x, weight, bias, residual, norm, 1e-5, plan)
        for part, expected in zip(mine, REFERENCE.linear_add_norm(linear, x, residual, norm, 1e-5), strict=True):
            assert_close(part, expected)
        return
    assert_close(multiply(x, weight, bias, None, dtype, plan), linear(x))
    assert_close(multiply(x, weight, bias, residual, dtype, plan), linear(x, residual))
    assert_close(multiply(x, weight, bias, None, torch.float32, plan), linear(x, None, torch.float32))


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("plan", (SMALL, SPLIT), ids=("whole", "split"))
@pytest.mark.parametrize(("rows", "outs", "ins"), ((1, 32, 96), (5, 50, 70), (19, 48, 192), (2, 2, 8)))
def test_products_and_their_endings_are_those_of_torch(
    rows: int, outs: int, ins: int, plan: Plan, biased: bool, device: torch.device
) -> None:
    for operation in OPERATIONS:
        if plan.splits == 1 or operation != "linear_silu_mul":
            check(Product(operation, rows, outs, ins, "float16"), rows, plan, biased, device)


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", (False, True), ids=("pointers", "copy engine"))
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rows", (1, 7, 16, 40, 100, 256))
@pytest.mark.parametrize(("outs", "ins", "dtype"), ((4096, 4096, "bfloat16"), (1000, 2056, "float16")))
def test_every_candidate_is_right_at_real_sizes(
    rows: int, outs: int, ins: int, dtype: str, operation: Operation, hopper: bool, cuda: torch.device
) -> None:
    if hopper and torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("no Hopper GPU")
    product = Product(operation, bucket(rows) or 0, outs, ins, dtype)
    for plan in candidates(product, 132, hopper):
        check(product, rows, plan, rows == 7, cuda)


@pytest.mark.gpu
def test_the_same_rows_give_the_same_result_while_other_kernels_run_in_front(cuda: torch.device) -> None:
    x = randn(64, 2048, device=cuda, seed=1, dtype=torch.bfloat16)
    weight = randn(2048, 2048, device=cuda, seed=2, dtype=torch.bfloat16) * 2048**-0.5
    product = Product("linear", 64, 2048, 2048, "bfloat16")
    for plan in candidates(product, 132, torch.cuda.get_device_capability(cuda)[0] == 9):
        chained = x
        for _ in range(50):  # each waits for the one in front, or reads what is not there yet
            chained = multiply(chained, weight, None, x, torch.bfloat16, plan)
        again = x
        for _ in range(50):
            again = multiply(again, weight, None, x, torch.bfloat16, plan)
            torch.cuda.synchronize()
        assert torch.equal(chained, again), plan


@pytest.mark.gpu
def test_products_of_a_model_are_measured_once_and_then_done_as_the_table_says(
    cuda: torch.device, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    x, norm = randn(3, 1024, device=cuda, seed=3, dtype=torch.bfloat16), torch.ones(1024, device=cuda).bfloat16()
    backend = TritonBackend(load_table(path), path)
    linear = backend.linear(randn(1024, 1024, device=cuda, seed=1, dtype=torch.bfloat16) / 32)
    float32 = backend.linear(randn(1024, 1024, device=cuda, seed=1, dtype=torch.float32))
    before = backend.linear_add_norm(linear, x, x.clone(), norm, 1e-5)
    float32(x.float())
    list(backend.tune(60, 60))
    measured = load_table(path).choices
    assert {(product.operation, product.rows) for product in measured} == {
        ("linear_add_norm", rows) for rows in (1, 16, 32, 64)
    }
    for mine, expected in zip(backend.linear_add_norm(linear, x, x.clone(), norm, 1e-5), before, strict=True):
        assert_close(mine, expected)
    assert not list(tune([linear], load_table(path), 60, 60))


def test_a_backend_with_a_table_gives_what_one_without_gives(device: torch.device) -> None:
    weight = randn(64, 48, device=device, seed=1) * 48**-0.5
    table = LinearTable({Product(operation, 16, 64, 48, "float16"): SMALL for operation in OPERATIONS})
    residual, norm = (randn(*shape, device=device, seed=2) for shape in ((3, 64), (64,)))
    for x in (randn(3, 48, device=device, seed=3), randn(1, 48, device=device, seed=3)):  # one row: not in the table
        results = []
        for backend in (TritonBackend(table), TritonBackend()):
            linear = backend.linear(weight)
            joined = backend.linear_add_norm(linear, x, residual[: len(x)].clone(), norm, 1e-5)
            results.append((linear(x), linear(x, residual[: len(x)]), backend.linear_silu_mul(linear, x), *joined))
        for mine, expected in zip(*results, strict=True):
            assert_close(mine, expected)


def test_cublas_adds_to_the_residual_where_it_is(device: torch.device) -> None:
    backend = TritonBackend()
    x, residual = randn(300, 48, device=device, seed=3), randn(300, 64, device=device, seed=2)
    weight, norm = randn(64, 48, device=device, seed=1) * 48**-0.5, torch.ones(64, device=device).half()
    expected = REFERENCE.linear_add_norm(REFERENCE.linear(weight), x, residual, norm, 1e-5)
    mine = backend.linear_add_norm(backend.linear(weight), x, residual, norm, 1e-5)
    for part, wanted in zip(mine, expected, strict=True):
        assert_close(part, wanted)
    assert mine[1].data_ptr() == residual.data_ptr()


def test_where_measuring_fails_that_is_told_and_products_stay_as_they_were(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(triton_backend, "tune", fail)
    backend = TritonBackend()
    linear = backend.linear(randn(32, 48, device=device, seed=1) * 48**-0.5)
    x = randn(3, 48, device=device, seed=2)
    expected = linear(x)
    list(backend.tune(16, 16))
    assert torch.equal(linear(x), expected)
    assert len(caplog.records) == 1 and "RuntimeError: out of memory" in caplog.text


def test_float32_is_never_the_kernels_even_where_a_table_says_so(device: torch.device) -> None:
    weight = randn(32, 48, device=device, seed=1, dtype=torch.float32)
    x = randn(3, 48, device=device, seed=2, dtype=torch.float32)
    backend = TritonBackend(LinearTable({Product("linear", 16, 32, 48, "float32"): SMALL}))
    assert torch.equal(backend.linear(weight)(x), REFERENCE.linear(weight)(x))


def test_rows_are_rounded_up_to_measured_sizes() -> None:
    assert [bucket(rows) for rows in (1, 2, 16, 17, 130, 200, 256)] == [1, 16, 16, 32, 144, 208, 256]
    assert [bucket(rows) for rows in (257, LONG_FROM - 1)] == [None, None]
    assert [bucket(rows) for rows in (LONG_FROM, 16_384, 100_000)] == [LONG] * 3


@pytest.mark.parametrize("hopper", (False, True))
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("outs", "ins"), ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1024, 3072), (151936, 1024), (64, 64))
)
def test_candidates_are_few_and_fit_on_the_card(operation: Operation, outs: int, ins: int, hopper: bool) -> None:
    for rows in BUCKETS:
        plans = candidates(Product(operation, rows, outs, ins, "bfloat16"), 132, hopper)
        assert (1 if ins > 64 and rows not in MIDDLES else 0) <= len(plans) <= 24
        assert len(set(plans)) == len(plans)
        halves = 2 if operation == "linear_silu_mul" else 1
        for plan in plans:
            assert plan.hopper == hopper
            assert plan.stages * (halves * plan.outs + plan.rows) * plan.ins * 2 <= SHARED_BYTES
            assert plan.splits == 1 or halves == 1
    assert candidates(Product(operation, LONG, outs, ins, "bfloat16"), 132, hopper) == []


def test_layers_know_what_they_were_asked_for_and_take_up_what_was_measured(device: torch.device) -> None:
    table = LinearTable()
    backend = TritonBackend(table)
    linear = backend.linear(randn(64, 48, device=device, seed=1) * 48**-0.5)
    assert isinstance(linear, TritonLinear)
    x = randn(2, 48, device=device, seed=2)
    expected = backend.linear_silu_mul(linear, x)
    assert linear.asked == {"linear_silu_mul"}
    table.choices[Product("linear_silu_mul", 16, 64, 48, "float16")] = SMALL
    linear.consult(table)
    assert_close(backend.linear_silu_mul(linear, x), expected)


def test_a_plan_must_be_clearly_faster_than_cublas() -> None:
    assert fastest({None: 10.0, SMALL: 9.9, SPLIT: 11.0}) is None
    assert fastest({None: 10.0, SMALL: 9.0, SPLIT: 8.0}) == SPLIT
    assert fastest({None: 10.0}) is None


def test_another_algorithm_of_cublas_has_to_be_a_little_faster_than_its_first(device: torch.device) -> None:
    one, other = Algorithm("01"), Algorithm("02")
    assert fastest({None: 10.0, one: 9.95}) is None
    assert fastest({None: 10.0, one: 9.85, other: 9.8}) == other
    assert fastest({None: 10.0, one: 9.8, SMALL: 9.75}) == one
    assert fastest({None: 10.0, one: 9.8, SMALL: 9.0}) == SMALL


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    plans = {
        Product("linear", 1, 4096, 1024, "bfloat16"): SPLIT,
        Product("linear_silu_mul", 8, 4096, 1024, "bfloat16"): None,
        Product("linear", LONG, 4096, 1024, "bfloat16"): Algorithm("00ff"),
    }
    path = tmp_path / "linear" / "card.json"
    LinearTable(plans).save(path)
    table = load_table(path)
    assert table.choices == plans
    assert table.choices_of(4096, 1024, torch.bfloat16) == {("linear", 1): SPLIT, ("linear", LONG): Algorithm("00ff")}
    assert table.choices_of(4096, 1024, torch.float16) == {}


def test_a_missing_table_is_empty_and_a_broken_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_table(tmp_path / "none.json").choices == {}
    assert not caplog.records
    path = tmp_path / "broken.json"
    for text in ("{", "[1]", json.dumps([{"operation": "linear", "plan": None}])):
        caplog.clear()
        path.write_text(text)
        assert load_table(path).choices == {}
        assert "broken.json can't be used" in caplog.text


def test_an_algorithm_of_cublas_serves_a_product_and_what_follows_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Algorithm] = []

    def by_torch(x: Tensor, weight: Tensor, algorithm: Algorithm, residual: Tensor | None = None) -> Tensor:
        done.append(algorithm)
        product = x @ weight.T
        return product if residual is None else residual.add_(product)

    monkeypatch.setattr(cublaslt, "multiply", by_torch)
    chosen = Algorithm("07")
    table = LinearTable({Product(operation, 16, 64, 48, "float16"): chosen for operation in OPERATIONS})
    x, weight = randn(9, 48, device=device, seed=1), randn(64, 48, device=device, seed=2) * 48**-0.5
    residual, norm = randn(9, 64, device=device, seed=3), randn(64, device=device, seed=4)
    backend, reference = TritonBackend(table), REFERENCE.linear(weight)
    linear = backend.linear(weight)
    assert_close(linear(x), reference(x))
    assert_close(backend.linear_silu_mul(linear, x), REFERENCE.linear_silu_mul(reference, x))
    expected = REFERENCE.linear_add_norm(reference, x, residual.clone(), norm, 1e-5)
    for mine, wanted in zip(backend.linear_add_norm(linear, x, residual, norm, 1e-5), expected, strict=True):
        assert_close(mine, wanted)
    assert done == [chosen] * 3
    # What it does not do is torch's: a residual that has to stay, another dtype, a bias.
    assert_close(linear(x, residual), reference(x, residual))
    assert_close(linear(x, None, torch.float32), reference(x, None, torch.float32))
    biased = backend.linear(weight, randn(64, device=device, seed=5))
    assert_close(biased(x), REFERENCE.linear(weight, randn(64, device=device, seed=5))(x))
    assert done == [chosen] * 3


def test_without_a_gpu_cublas_has_no_algorithms() -> None:
    assert cublaslt.algorithms(8, 64, 64, torch.float16, torch.device("cpu"), 5) == []


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (1, 40, 136, 160, 250, 5000))
@pytest.mark.parametrize(("outs", "ins", "dtype"), ((4096, 14336, torch.bfloat16), (1024, 3072, torch.float16)))
def test_every_algorithm_of_cublas_is_right_also_in_a_graph(
    rows: int, outs: int, ins: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    x = randn(rows, ins, device=cuda, seed=1, dtype=dtype)
    weight = randn(outs, ins, device=cuda, seed=2, dtype=dtype) * ins**-0.5
    residual = randn(rows, outs, device=cuda, seed=3, dtype=dtype)
    found = cublaslt.algorithms(rows, outs, ins, dtype, cuda, 8)
    assert found
    for algorithm in found:
        assert_close(cublaslt.multiply(x, weight, algorithm), x @ weight.T)
        total = residual.clone()
        assert cublaslt.multiply(x, weight, algorithm, total) is total
        assert_close(total, torch.addmm(residual, x, weight.T))
    graph, total = torch.cuda.CUDAGraph(), residual.clone()
    with torch.cuda.graph(graph):
        cublaslt.multiply(x, weight, found[0], total)
    for _ in range(2):
        graph.replay()
    assert_close(total, torch.addmm(torch.addmm(residual, x, weight.T), x, weight.T))


@pytest.mark.gpu
def test_an_algorithm_that_does_not_fit_is_refused(cuda: torch.device) -> None:
    x = randn(8, 64, device=cuda, seed=1)
    with pytest.raises(RuntimeError, match="cublasLtMatmul failed with status"):
        cublaslt.multiply(x, randn(64, 64, device=cuda, seed=2), Algorithm("00" * 64))
    with pytest.raises(RuntimeError, match="contiguous"):
        cublaslt.multiply(x.T, randn(64, 8, device=cuda, seed=2), Algorithm("00" * 64))
