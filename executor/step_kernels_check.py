"""Whether a device's kernels choose what torch chooses, tried out once before they are used.

Owns the trial; must not know what becomes of kernels that fail it (`step_kernels.py`).
"""

from __future__ import annotations

import torch

from .draw_columns import DrawColumns
from .recorded_sampling import drawn
from .step_kernels import StepKernels

ROWS = 16
VOCAB = 1000
BY_ROUNDING = 1  # rows that may differ: kernels round exp in another way


def disagreement(kernels: StepKernels, device: torch.device) -> str | None:
    """What the choice of some tokens shows to be wrong, if anything: the largest, or the noise and the cut."""
    logits = 3 * torch.randn((ROWS, VOCAB), generator=torch.Generator().manual_seed(0)).to(device)
    best, likeliest = kernels.best_tokens(logits)
    if not torch.equal(best, logits.amax(-1)) or not torch.equal(likeliest, logits.argmax(-1)):
        return "the largest logits differ"
    numbers = torch.arange(ROWS, device=device)
    ones = torch.ones(ROWS, device=device)
    columns = DrawColumns(ones * (numbers % 4 > 0), ones * 0.9, ones * 0.01, torch.full_like(numbers, 20), numbers - 5)
    token_ids, lengths = torch.zeros((ROWS, 2), dtype=torch.int32, device=device), torch.ones_like(numbers)
    packed = kernels.choose(logits, numbers, lengths.clone(), token_ids, lengths, ROWS, columns)
    expected = drawn(logits.clone(), best, likeliest, torch.ones_like(numbers), columns)
    if not torch.equal(token_ids[:, 1], packed[0]) or not bool((lengths == 2).all()):
        return "tokens are put in the wrong place"
    return "other tokens are drawn" if int((packed[0] != expected).sum()) > BY_ROUNDING else None
