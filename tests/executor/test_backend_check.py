"""The check of a backend at start: what is right passes, and what is wrong is named."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from fast_inference.executor.backends import check
from fast_inference.executor.backends.base import KernelsUnavailable
from fast_inference.executor.backends.check import OPERATIONS, check_backend, triton_backend
from fast_inference.executor.backends.torch import TorchBackend
from torch import Tensor

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", check.TOLERANCE)
def test_the_reference_passes_its_own_check_in_every_dtype(dtype: torch.dtype) -> None:
    check_backend(TorchBackend(), CPU, dtype)


def test_the_triton_kernels_pass_the_check() -> None:
    pytest.importorskip("triton")
    assert triton_backend(DEVICE, torch.float32).name == "triton"


@pytest.mark.parametrize("wrong", (0.01, float("nan")))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_differs_is_named(operation: str, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend()
    right = getattr(backend, operation)

    def differ(*arguments: object, **named: object) -> object:
        result = right(*arguments, **named)
        if operation == "linear":
            return lambda *given: result(*given) + wrong
        if isinstance(result, Tensor):
            return result + wrong
        if operation == "write_kv":
            arguments[2].keys[0] += wrong
            return None
        return tuple(part + wrong for part in result)

    monkeypatch.setattr(backend, operation, differ)
    with pytest.raises(KernelsUnavailable, match=f"{operation} differs from torch by"):
        check_backend(backend, CPU, torch.float32)


def test_a_result_that_is_rounded_the_other_way_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones too: above 8, neighbours in bfloat16 are 1/16 apart."""
    backend = TorchBackend()
    right = backend.rope_and_cache

    def round_away(*arguments: object) -> Tensor:
        q = right(*arguments)
        assert q.abs().max() > 8
        return (q.view(torch.int16) + 1).view(torch.bfloat16)

    monkeypatch.setattr(backend, "rope_and_cache", round_away)
    check_backend(backend, CPU, torch.bfloat16)


def test_another_shape_or_dtype_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend()
    monkeypatch.setattr(backend, "silu_mul", lambda x: x[:, : x.shape[1] // 2].double())
    with pytest.raises(KernelsUnavailable, match=r"silu_mul gives .*float64"):
        check_backend(backend, CPU, torch.float32)


def test_a_kernel_that_does_not_compile_and_a_missing_triton_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.errors import TritonError

    class NoCompiler(TritonError):
        pass

    def fail(*_: object) -> None:
        raise NoCompiler("out of shared memory")

    monkeypatch.setattr(check, "check_backend", fail)
    with pytest.raises(KernelsUnavailable, match="NoCompiler: out of shared memory"):
        triton_backend(DEVICE, torch.float32)
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    with pytest.raises(KernelsUnavailable, match="triton can't be imported"):
        triton_backend(DEVICE, torch.float32)


def test_the_engine_starts_without_triton() -> None:
    code = "import fast_inference.executor.startup, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
