"""Which rows go to the attention kernels for Hopper cards.

Owns that choice and the trial before it: the first time that a model's shapes are seen, such a kernel must give what
the kernel for every GPU gives, which was checked at the start. Must not know any model. Importing this needs triton.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.gpu import attention_hopper, attention_hopper_decode
from ..kernels.gpu.attention_decode import decode_attention
from ..kernels.gpu.attention_hopper import hopper_attention
from ..kernels.gpu.attention_hopper_decode import hopper_decode_attention
from ..kernels.gpu.attention_prefill import prefill_attention
from ..kernels.gpu.card import is_hopper
from ..kernels.gpu.failures import LAUNCH_FAILURES
from .base import KVLayer, StepBatch
from .check import TOLERANCE, relative_difference

log = logging.getLogger(__name__)

MOST_COMPARED = 256  # tokens


@dataclass(frozen=True, slots=True)
class HopperKernel:
    """A kernel, the one whose place it takes, what it can do, and where it is the faster one."""

    rows: str  # that it attends, for the log
    attend: Callable[[Tensor, KVLayer, StepBatch, float, Tensor], None]
    usual: Callable[..., None]
    fits: Callable[[Tensor, KVLayer, int | None, float | None], bool]
    pays: Callable[[Tensor, KVLayer, StepBatch], bool]


PROMPTS = HopperKernel("prompts", hopper_attention, prefill_attention, attention_hopper.fits, attention_hopper.pays)
DECODES = HopperKernel(
    "decode rows", hopper_decode_attention, decode_attention, attention_hopper_decode.fits, attention_hopper_decode.pays
)


class HopperAttention:
    """Remembers for which shapes a kernel has been tried, and how that went."""

    def __init__(self) -> None:
        self._agrees: dict[object, bool] = {}

    def takes(
        self,
        kernel: HopperKernel,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> bool:
        """Whether `kernel` can attend its rows of this step as they should be, and does so sooner."""
        if not is_hopper(q.device) or not kernel.fits(q, kv, window, soft_cap):
            return False
        shapes = (kernel, q.dtype, q.shape[1:], kv.keys.shape[1:])
        if shapes not in self._agrees:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():  # where nothing can be compared
                return False
            self._agrees[shapes] = _agrees(kernel, q, kv, batch, scale)
        return self._agrees[shapes] and kernel.pays(q, kv, batch)


def _agrees(kernel: HopperKernel, q: Tensor, kv: KVLayer, batch: StepBatch, scale: float) -> bool:
    """Compile the kernel and compare what it gives; if it can't be used, say why."""
    expected, actual = torch.zeros(2, q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device).unbind()
    kernel.usual(q, kv, batch, scale, expected)
    try:
        kernel.attend(q, kv, batch, scale, actual)
    except LAUNCH_FAILURES as error:
        log.warning("%s are attended by the slower kernel: %s: %s", kernel.rows, type(error).__name__, error)
        return False
    some = slice(None, None, max(1, q.shape[0] // MOST_COMPARED))
    difference = relative_difference(actual[some], expected[some])
    if difference <= TOLERANCE[q.dtype]:
        return True
    log.warning(
        "%s are attended by the slower kernel: the one for Hopper differs from it by %.3g", kernel.rows, difference
    )
    return False
