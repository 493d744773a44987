"""Which prompts go to the attention kernel for Hopper cards.

Owns that choice and the trial before it: the first time that a model's shapes are seen, the kernel must give what
`attention_prefill` gives, which was checked at the start. Must not know any model. Importing this needs triton.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..kernels.gpu.attention_hopper import fits, hopper_attention, is_hopper, pays
from ..kernels.gpu.attention_prefill import prefill_attention
from ..kernels.gpu.failures import LAUNCH_FAILURES
from .base import KVLayer, StepBatch
from .check import TOLERANCE, relative_difference

log = logging.getLogger(__name__)

MOST_COMPARED = 256  # tokens


class HopperPrompts:
    """Remembers for which shapes the kernel has been tried, and how that went."""

    def __init__(self) -> None:
        self._agrees: dict[object, bool] = {}

    def takes(
        self, q: Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int | None, soft_cap: float | None
    ) -> bool:
        """Whether the kernel can attend this step's prompts as they should be, and does so sooner."""
        if not is_hopper(q.device) or not fits(q, kv, window, soft_cap):
            return False
        shapes = (q.dtype, q.shape[1:], kv.keys.shape[1:])
        if shapes not in self._agrees:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():  # where nothing can be compared
                return False
            self._agrees[shapes] = _agrees(q, kv, batch, scale)
        return self._agrees[shapes] and pays(q, kv, batch)


def _agrees(q: Tensor, kv: KVLayer, batch: StepBatch, scale: float) -> bool:
    """Compile the kernel and compare what it gives; if it can't be used, say why."""
    expected, actual = torch.zeros(2, q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device).unbind()
    prefill_attention(q, kv, batch, scale, expected)
    try:
        hopper_attention(q, kv, batch, scale, actual)
    except LAUNCH_FAILURES as error:
        log.warning("prompts are attended by the slower kernel: %s: %s", type(error).__name__, error)
        return False
    some = slice(batch.num_decodes, None, max(1, q.shape[0] // MOST_COMPARED))
    difference = relative_difference(actual[some], expected[some])
    if difference <= TOLERANCE[q.dtype]:
        return True
    log.warning("prompts are attended by the slower kernel: the one for Hopper differs from it by %.3g", difference)
    return False
