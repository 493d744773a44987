"""The kernels of a model's first steps, compiled side by side before those: one after another they would be most of
what a first start takes.

Owns which they are, and made-up work for them; must not know what they compute. What fails here is only noted: it will
fail again where it is wanted, and is dealt with there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from .backends.base import Backend
from .models.base import ModelSpec
from .recorded_sampling import choose
from .runner import Runner
from .sampling_columns import Choice
from .side_by_side import side_by_side
from .slot_tensors import SlotTensors

log = logging.getLogger(__name__)

ROWS = 2


def compile_first_steps(runner: Runner, spec: ModelSpec, backend: Backend) -> None:
    """Have compiled what steps of `runner` will need first. It must hold no request."""
    calls = _ends_of_steps(runner.batch.tensors, spec.vocab_size)
    if spec.num_heads and runner.kv.layers:
        calls += backend.compile_calls(spec.num_heads, runner.kv.layers[0])
    if calls:
        side_by_side([partial(_tried, call) for call in calls], runner.batch.tensors.token_ids.device)


def _ends_of_steps(tensors: SlotTensors, vocab_size: int) -> list[Callable[[], object]]:
    """Admitting, gathering, and the ways of choosing a token, for the slot that is nobody's."""
    kernels, device = tensors.kernels, tensors.token_ids.device
    if kernels is None:
        return []
    logits = torch.zeros((ROWS, vocab_size), device=device)
    slots = torch.full((ROWS,), tensors.scratch, device=device)
    zeros, ones = torch.zeros(ROWS, device=device), torch.ones(ROWS, device=device)
    rows, best, tokens = torch.arange(ROWS, device=device), zeros.clone(), slots.clone()
    token, no_block = np.zeros(1, np.int32), np.empty(0, np.int32)
    draws = np.array([[0.0], [1.0], [0.0]], np.float32), np.zeros((2, 1), np.int64)
    return [
        partial(tensors.admit, np.array([tensors.scratch]), [token], [no_block], *draws),
        partial(tensors.gather, slots),
        partial(choose, Choice.GREEDY, logits, slots, torch.ones_like(slots), tensors),
        partial(choose, Choice.DRAW, logits, slots, torch.ones_like(slots), tensors),
        partial(kernels.draw, logits, best, tokens, rows, rows, ones, torch.zeros_like(rows), ones, zeros),
    ]


def _tried(call: Callable[[], object]) -> None:
    from .kernels.gpu.failures import LAUNCH_FAILURES

    try:
        call()
    except LAUNCH_FAILURES as error:
        log.debug("a kernel can't be compiled ahead: %s: %s", type(error).__name__, error)
