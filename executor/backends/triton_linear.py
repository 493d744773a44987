"""A linear layer on a GPU that goes to this project's product kernels where a measurement says so, else to cuBLAS.

Owns that decision call by call; must not know models or how the table came to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.gpu.linear import multiply, multiply_add_norm, multiply_silu_mul
from ..kernels.gpu.linear_plan import Plan
from ..kernels.gpu.linear_table import LinearTable, Operation, bucket
from ..kernels.gpu.norm import add_rms_norm, rms_norm
from ..kernels.gpu.silu import silu_mul
from .torch import TorchLinear

ALIGNMENT = 16  # bytes: of what the copy engine reads
HALVES = (torch.bfloat16, torch.float16)  # float32 is always torch's product, with all its bits


class TritonLinear:
    """A `Linear`, and the two operations that a product may be one with. `asked`: the operations it was called for."""

    def __init__(self, weight: Tensor, bias: Tensor | None, table: LinearTable) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight.contiguous(), bias
        self.asked: set[Operation] = set()
        self._torch = TorchLinear(self.weight, bias)
        self._plans: dict[tuple[str, int], Plan] = {}
        self.consult(table)

    def consult(self, table: LinearTable) -> None:
        """From now on do as `table` says."""
        if self.weight.dtype in HALVES and self.weight.data_ptr() % ALIGNMENT == 0:
            self._plans = table.plans_of(self.out_features, self.in_features, self.weight.dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        return self.multiply(self._plan("linear", x), x, residual, out_dtype)

    def silu_mul(self, x: Tensor) -> Tensor:
        """`silu_mul` of the product."""
        return self.multiply_silu_mul(self._plan("linear_silu_mul", x), x)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm, sum) as of `Backend.linear_add_norm`, the sum in the residual's memory where cuBLAS makes it."""
        plan = self._plan("linear_add_norm", x)
        if plan is not None or self.bias is not None:
            return self.multiply_add_norm(plan, x, residual, norm, eps)
        total = residual.addmm_(x, self.weight.t())  # so the product itself is neither written nor read
        return rms_norm(total, norm, eps), total

    # ---- the same by a given plan; None is cuBLAS with the kernel of what follows ---------------------------------

    def multiply(
        self, plan: Plan | None, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        if plan is None:
            return self._torch(x, residual, out_dtype)
        return multiply(x, self.weight, self.bias, residual, out_dtype or x.dtype, plan)

    def multiply_silu_mul(self, plan: Plan | None, x: Tensor) -> Tensor:
        if plan is None:
            return silu_mul(self._torch(x))
        return multiply_silu_mul(x, self.weight, self.bias, plan)

    def multiply_add_norm(
        self, plan: Plan | None, x: Tensor, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if plan is None:
            return add_rms_norm(self._torch(x), residual, norm, eps)
        return multiply_add_norm(x, self.weight, self.bias, residual, norm, eps, plan)

    def _plan(self, operation: Operation, x: Tensor) -> Plan | None:
        self.asked.add(operation)
        rows = x.shape[0]
        return self._plans.get((operation, bucket(rows) or 0)) if self._plans and rows else None
