"""A linear layer on a GPU, done as a measurement says: by a plan of this project's kernels or an algorithm of cuBLAS.

Owns that decision call by call; must not know models or how the table came to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.gpu import cublaslt
from ..kernels.gpu.linear import multiply, multiply_add_norm, multiply_silu_mul
from ..kernels.gpu.linear_plan import Plan
from ..kernels.gpu.linear_table import Choice, LinearTable, Operation, bucket
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
        self._choices: dict[tuple[str, int], Choice] = {}
        self.consult(table)

    def consult(self, table: LinearTable) -> None:
        """From now on do as `table` says."""
        if self.weight.dtype in HALVES and self.weight.data_ptr() % ALIGNMENT == 0:
            self._choices = table.choices_of(self.out_features, self.in_features, self.weight.dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        return self.multiply(self._choice("linear", x), x, residual, out_dtype)

    def silu_mul(self, x: Tensor) -> Tensor:
        """`silu_mul` of the product."""
        return self.multiply_silu_mul(self._choice("linear_silu_mul", x), x)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm, sum) as of `Backend.linear_add_norm`, the sum in the residual's memory where cuBLAS makes it."""
        return self.multiply_add_norm(self._choice("linear_add_norm", x), x, residual, norm, eps)

    # ---- the same by a given choice; None is cuBLAS as torch calls it, with the kernel of what follows -------------

    def multiply(
        self, choice: Choice | None, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        if isinstance(choice, Plan):
            return multiply(x, self.weight, self.bias, residual, out_dtype or x.dtype, choice)
        if choice is None or residual is not None or self.bias is not None or out_dtype not in (None, x.dtype):
            return self._torch(x, residual, out_dtype)
        return cublaslt.multiply(x, self.weight, choice)

    def multiply_silu_mul(self, choice: Choice | None, x: Tensor) -> Tensor:
        if isinstance(choice, Plan):
            return multiply_silu_mul(x, self.weight, self.bias, choice)
        return silu_mul(self.multiply(choice, x))

    def multiply_add_norm(
        self, choice: Choice | None, x: Tensor, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if isinstance(choice, Plan):
            return multiply_add_norm(x, self.weight, self.bias, residual, norm, eps, choice)
        if self.bias is not None:
            return add_rms_norm(self._torch(x), residual, norm, eps)
        # The residual is added to where it is, so the product itself is neither written nor read.
        if choice is None:
            total = residual.addmm_(x, self.weight.t())
        else:
            total = cublaslt.multiply(x, self.weight, choice, residual)
        return rms_norm(total, norm, eps), total

    def _choice(self, operation: Operation, x: Tensor) -> Choice | None:
        self.asked.add(operation)
        rows = x.shape[0]
        return self._choices.get((operation, bucket(rows) or 0)) if self._choices and rows else None
