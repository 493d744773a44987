"""What a model's first start on a card measures: everything but the device, whose clock is made up."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fast_inference.executor.backends import triton_linear, triton_tuning
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.kernels.gpu import cublaslt
from fast_inference.executor.kernels.gpu.cublaslt import Algorithm
from fast_inference.executor.kernels.gpu.linear_plan import Plan
from fast_inference.executor.kernels.gpu.linear_table import (
    LONG,
    LONG_FROM,
    MIDDLES,
    LinearTable,
    Operation,
    Product,
    candidates,
    load_table,
)

PROCESSORS = 4  # as the interpreter has it
OUTS, INS = 64, 256


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device of no kind, on which each choice is faster than the one before; returns the launches of each."""
    launched: list[int] = []

    def clock(launches: list[object], least: int) -> float:
        launched.append(len(launches))
        return 1.0 / len(launched)

    monkeypatch.setattr(triton_tuning, "seconds_per_launch", clock)
    monkeypatch.setattr(triton_tuning, "usable_cores", lambda: 1)  # the interpreter is not made for several threads
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return launched


def plans_of(operation: Operation, rows: int) -> list[Plan]:
    return candidates(Product(operation, rows, OUTS, INS, "float16"), PROCESSORS, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which measures itself")
def test_what_layers_were_asked_for_is_measured_on_all_of_them_and_kept(timed: list[int], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    backend = TritonBackend(load_table(path), path)
    layers = [backend.linear(torch.randn(OUTS, INS).half() / 16) for _ in range(3)]
    backend.linear(torch.randn(OUTS, INS).half())  # never asked for anything, like those of the check at start
    wide = backend.linear(torch.randn(OUTS, INS))
    x = torch.randn(2, INS)
    for layer in layers:
        backend.linear_silu_mul(layer, x.half())
    wide(x)
    phases = {piece.phase for piece in backend.tune(1, 1)}
    expected = {Product("linear_silu_mul", 1, OUTS, INS, "float16"): plans_of("linear_silu_mul", 1)[-1]}
    assert load_table(path).choices == expected
    assert timed == [3] * (1 + len(plans_of("linear_silu_mul", 1)))
    assert {"compiling products", "measuring products"} == phases
    assert not list(backend.tune(1, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which measures itself")
def test_plans_that_fail_or_are_wrong_are_left_out(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = plans_of("linear", 1)
    multiply = triton_linear.multiply

    def broken(*arguments: Any) -> torch.Tensor:
        plan = arguments[-1]
        if plan == first:
            raise RuntimeError("no room")
        return multiply(*arguments) + (1 if plan in others else 0)

    monkeypatch.setattr(triton_linear, "multiply", broken)
    table = LinearTable()
    backend = TritonBackend(table)
    layer = backend.linear(torch.randn(OUTS, INS).half() / 16)
    layer(torch.randn(1, INS).half())
    list(backend.tune(1, 1))
    assert list(table.choices.values()) == [second]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which measures itself")
def test_a_lack_of_memory_is_no_fault_of_a_plan(
    timed: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(triton_linear, "multiply", full)
    table = LinearTable()
    backend = TritonBackend(table)
    layer = backend.linear(torch.randn(OUTS, INS).half())
    layer(torch.randn(1, INS).half())
    list(backend.tune(1, 1))
    assert not table.choices and "full" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which measures itself")
def test_algorithms_of_cublas_are_measured_with_the_plans_and_for_long_prompts_at_length(
    timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, wrong, last = (Algorithm(words) for words in ("01", "02", "03"))
    asked: list[int] = []

    def listed(rows: int, outs: int, ins: int, dtype: torch.dtype, device: torch.device, most: int) -> list[Algorithm]:
        asked.append(rows)
        return [first, wrong, last]

    def multiply(x: torch.Tensor, weight: torch.Tensor, algorithm: Algorithm) -> torch.Tensor:
        return x @ weight.T + (1 if algorithm == wrong else 0)

    at_length = {"seconds": 0}

    def clock(launches: list[object], seconds: float) -> float:
        at_length["seconds"] += 1
        return 1.0 / at_length["seconds"]

    monkeypatch.setattr(triton_tuning, "seconds_at_length", clock)
    monkeypatch.setattr(cublaslt, "algorithms", listed)
    monkeypatch.setattr(cublaslt, "multiply", multiply)
    few = [Product("linear", rows, OUTS, INS, "float16") for rows in (16, 32, 64)]
    table = LinearTable(dict.fromkeys(few))
    backend = TritonBackend(table)
    layer = backend.linear(torch.randn(OUTS, INS).half() / 16)
    layer(torch.randn(1, INS).half())
    pieces = list(backend.tune(128, LONG_FROM))
    assert asked == [128, LONG_FROM]  # for one row a plan is faster than any
    chosen = {product.rows: choice for product, choice in table.choices.items() if product not in few}
    assert chosen == {1: plans_of("linear", 1)[-1], 128: last, LONG: last}
    assert at_length["seconds"] == 1 + 3 * 3  # to warm up; in turns cuBLAS as torch calls it and the two that are right
    assert (pieces[-1].done, pieces[-1].total) == (2, 3)
    assert not list(backend.tune(128, LONG_FROM))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which measures itself")
def test_beyond_128_rows_plans_are_measured_at_some_numbers_and_the_best_elsewhere(timed: list[int]) -> None:
    table = LinearTable()
    backend = TritonBackend(table)
    layer = backend.linear(torch.randn(OUTS, INS).half() / 16)
    layer(torch.randn(1, INS).half())
    few = [Product("linear", rows, OUTS, INS, "float16") for rows in (1, 16, 32, 64, 128)]
    table.choices.update(dict.fromkeys(few))
    list(backend.tune(250, 250))
    best = {product.rows: choice for product, choice in table.choices.items() if product not in few}
    assert best == {rows: plans_of("linear", MIDDLES.get(rows, rows))[-1] for rows in range(144, 257, 16)}
    middles = len(plans_of("linear", 160)) + len(plans_of("linear", 224))
    assert len(timed) == 8 + middles + 6  # cuBLAS each time, the plans at two, the best of them at the others
