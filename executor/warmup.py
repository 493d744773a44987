"""First steps before the first request: so that it is not slow, and to see what memory the largest step takes.

Owns the made-up requests; must not know models. It drives a `Runner` as the scheduler does, and leaves it empty.
"""

from __future__ import annotations

import numpy as np
import torch

from ..protocol.config import EngineConfig
from ..protocol.errors import StartupError
from ..protocol.messages import Admit, Step
from ..protocol.sampling import SamplingParams
from .runner import Runner

WARM_TOKENS = 32  # of each warm-up request on a CPU: enough to touch weights and kernels
WARM_ROWS = 2


def warm_up(runner: Runner, config: EngineConfig) -> None:
    """One prefill and one decode step. Raises `StartupError` where the model itself raises: so would every request."""
    rows = min(WARM_ROWS, config.max_num_seqs)
    _run(runner, config, rows, rows * WARM_TOKENS, SamplingParams(temperature=1.0, top_p=0.9))


def profile_peak(runner: Runner, config: EngineConfig) -> int:
    """Bytes that CUDA tensors reach while a step of `max_num_batched_tokens` tokens samples `max_num_seqs` rows."""
    device = runner.batch.tensors.token_ids.device
    torch.cuda.reset_peak_memory_stats(device)
    params = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.1, logprobs=5)
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    _run(runner, config, rows, config.max_num_batched_tokens, params)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _run(runner: Runner, config: EngineConfig, rows: int, tokens: int, params: SamplingParams) -> None:
    """Prefill `tokens` tokens as `rows` requests in one step, then decode one token of each."""
    batch = runner.batch
    rows = max(1, min(rows, batch.num_blocks))
    room = batch.num_blocks // rows  # blocks for each
    count = max(1, min(tokens // rows, batch.max_model_len - 1, room * config.block_size - 1))
    blocks = -(-(count + 1) // config.block_size)
    fits = blocks <= room and count + 1 <= batch.max_model_len
    slots = np.arange(rows, dtype=np.int32)
    admit = tuple(
        Admit(
            slot=slot,
            token_ids=np.zeros(count, np.int32),
            num_prompt=count,
            params=params,
            seed=slot,
            block_ids=np.arange(slot * blocks, (slot + 1) * blocks, dtype=np.int32),
            cached_len=0,
        )
        for slot in range(rows)
    )
    if fits:
        prefill = Step(number=-2, admit=admit, work_slots=slots, work_counts=np.full(rows, count, np.int32))
        decode = Step(number=-1, work_slots=slots, work_counts=np.ones(rows, np.int32))
        for step in (prefill, decode):
            runner.launch(step).finish()
        if batch.failed:
            raise StartupError(f"the model can't run its first step: {next(iter(batch.failed.values()))}")
    batch.clear()
