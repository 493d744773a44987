"""The kernels of a step around the model's own: admitting requests, gathering rows, choosing tokens, moving slots on.

Owns which they are and whether they are to be had on a device; must not know how they compute
(`executor/kernels/gpu`), nor the order of things (`sampler.py`, `recorded_sampling.py`, `slot_tensors.py`). On a CPU
there are none; and where the ones for a GPU can't be had, or disagree with torch, torch's operations do it all.
"""

from __future__ import annotations

import functools
import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepKernels:
    """As the functions of these names in `executor/kernels/gpu` say."""

    admit: Callable[..., None]
    gather: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    append: Callable[..., None]
    choose: Callable[..., Tensor]
    best_tokens: Callable[[Tensor], tuple[Tensor, Tensor]]
    draw: Callable[..., None]
    penalize: Callable[..., None]
    add_bias: Callable[..., None]
    chosen_logprobs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@functools.cache
def step_kernels(device: torch.device) -> StepKernels | None:
    """Those for `device`, compiled and tried out once; None, with the reason logged, where torch has to do."""
    if device.type != "cuda":
        return None
    from .step_kernels_check import disagreement

    try:
        from triton.errors import TritonError
    except ImportError as error:
        log.warning("tokens are chosen by torch, which is slower: triton can't be imported: %s", error)
        return None
    try:
        kernels = step_kernels_unchecked()
        problem = disagreement(kernels, device)
    except (TritonError, RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        problem = f"a kernel can't be run: {type(error).__name__}: {error}"
    if problem is not None:
        log.warning("tokens are chosen by torch, which is slower: %s", problem)
        return None
    return kernels


def step_kernels_unchecked() -> StepKernels:
    """All of them, for any device that triton can run on. Raises `ImportError` without triton."""
    from .kernels.gpu import admit, gather, logprobs, penalties, sampling

    return StepKernels(
        admit=admit.admit,
        gather=gather.gather,
        append=gather.append,
        choose=sampling.choose,
        best_tokens=sampling.best_tokens,
        draw=sampling.draw,
        penalize=penalties.penalize,
        add_bias=penalties.add_bias,
        chosen_logprobs=logprobs.chosen_logprobs,
    )
