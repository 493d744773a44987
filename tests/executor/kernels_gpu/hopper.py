"""Compiles what launchers launch for Hopper on any machine: Triton's compiler needs no device, only to be told of one.

For a process of its own, without TRITON_INTERPRET: `from hopper import compiled` before the launchers, which may then
be called on CPU tensors, and compute nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 227 << 10  # bytes that one program can have

compiled: dict[str, list[Any]] = {}  # kernel's name -> what it was compiled to, each variant once


class _Hopper:
    """As much of a driver as the compiler asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def _compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
    kernel = _run(self, *arguments, grid=grid, warmup=True, **named)
    variants = compiled.setdefault(self.__name__, [])
    if kernel not in variants:
        variants.append(kernel)
    return kernel


driver.set_active(_Hopper())
_run = JITFunction.run
JITFunction.run = _compile_only
