"""The kernels' benchmark as far as it goes without a GPU: its cases compute what they count, and the figures add up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(("rows", "query", "before"), ((3, 1, 69), (2, 20, 0), (1, 9, 40)))
def test_a_case_of_attention_gives_what_its_reference_gives(
    rows: int, query: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import device_timing
    import kernels_attention as attention

    monkeypatch.setattr(device_timing, "BEYOND_L2", 1)
    (case,) = attention.make_cases(
        "tiny", attention.Heads(4, 2, 16), attention.Shape(rows, query, before), DEVICE, torch.float32, [None]
    )
    assert device_timing.largest_difference(case) < 1e-5
    length = query + before
    assert case.size == 2 * rows * length * 2 * 16 * 4 + 2 * rows * query * 4 * 16 * 4
    seen = sum(range(before + 1, length + 1))
    assert case.operations == rows * seen * 4 * 4 * 16


def test_cases_of_other_kernels_give_what_their_references_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import device_timing
    import kernels_linear
    import kernels_pointwise
    import kernels_sampling
    from fast_inference.executor.kernels.gpu.linear_plan import Plan
    from fast_inference.executor.kernels.gpu.linear_table import LinearTable, Product

    monkeypatch.setattr(device_timing, "BEYOND_L2", 1)
    sizes = kernels_pointwise.Sizes(hidden=48, inner=40, heads=4, kv_heads=2, head_size=16, normed=True)
    cases = list(kernels_pointwise.make_cases("tiny", sizes, 3, DEVICE, torch.float32))
    assert [case.size for case in cases] == [4 * 3 * 48 * 4, 3 * 3 * 40 * 4, 2 * 3 * 8 * 16 * 4]
    wishes = kernels_sampling.WISHES.values()
    cases += [kernels_sampling.make_case("tiny", 2, 500, wish, DEVICE) for wish in wishes]
    plan = Plan(rows=16, outs=16, ins=16, splits=1, stages=2, warps=4)
    for operation in ("linear", "linear_silu_mul", "linear_add_norm"):
        layer = kernels_linear.Layer(operation, 32, 48)
        table = LinearTable({Product(operation, 16, 32, 48, "float16"): plan})
        cases.append(kernels_linear.make_case("tiny", layer, 3, table, DEVICE, torch.float16))
    for case in cases:
        assert device_timing.largest_difference(case) < 1e-2, case


def test_the_share_is_of_the_ceiling_that_binds() -> None:
    from device_timing import Case, Ceilings, figures

    ceilings = Ceilings(copy=4e12, product=8e14)
    memory = figures(Case("m", [], torch.empty, size=2 * 10**12, operations=10**12), 1.0, ceilings)
    product = figures(Case("p", [], torch.empty, size=10**9, operations=6 * 10**14), 1.0, ceilings)
    assert (memory["bound"], memory["share"]) == ("copy", 0.5)
    assert (product["bound"], product["share"]) == ("product", 0.75)


def test_small_cases_walk_over_buffers_that_outgrow_the_cache() -> None:
    from device_timing import BEYOND_L2, copies_beyond_l2

    assert copies_beyond_l2(BEYOND_L2 * 4) == 1
    assert copies_beyond_l2(1000) * 1000 >= BEYOND_L2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_exits_with_1() -> None:
    command = [sys.executable, str(BENCHMARKS / "kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no CUDA device" in done.stdout, done.stderr
