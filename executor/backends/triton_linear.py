"""A linear layer on a GPU that goes to this project's product kernel where a measurement says so, else to cuBLAS.

Owns that decision call by call; must not know models or how the table came to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.gpu.linear import Plan, multiply, multiply_add_norm, multiply_silu_mul
from ..kernels.gpu.linear_table import LinearTable, Operation, bucket
from .torch import TorchLinear

HALVES = (torch.bfloat16, torch.float16)  # float32 is always torch's product, with all its bits


class TritonLinear:
    """A `Linear`, and the two operations that a product may be one with."""

    def __init__(self, weight: Tensor, bias: Tensor | None, table: LinearTable) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight.contiguous(), bias
        self._torch = TorchLinear(self._weight, bias)
        plans = table.plans_of(self.out_features, self.in_features, weight.dtype)
        self._plans = plans if weight.dtype in HALVES else {}

    def __call__(self, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        if (plan := self._plan("linear", x)) is None:
            return self._torch(x, residual, out_dtype)
        return multiply(x, self._weight, self._bias, residual, out_dtype or x.dtype, plan)

    def silu_mul(self, x: Tensor) -> Tensor | None:
        """`silu_mul` of the product, or None where two operations are faster."""
        plan = self._plan("linear_silu_mul", x)
        return None if plan is None else multiply_silu_mul(x, self._weight, self._bias, plan)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """(norm, sum) as of `Backend.linear_add_norm`, or None where two operations are faster."""
        plan = self._plan("linear_add_norm", x)
        return None if plan is None else multiply_add_norm(x, self._weight, self._bias, residual, norm, eps, plan)

    def _plan(self, operation: Operation, x: Tensor) -> Plan | None:
        return self._plans.get((operation, bucket(len(x)))) if self._plans and len(x) else None
