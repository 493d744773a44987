"""The guesses between which two weights a row is cut: right, and close enough to leave little to search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from fast_inference.executor.kernels.gpu.bracket import kth_peak, likely_cut, sure_mass
from fast_inference.executor.kernels.gpu.groups import GROUP, list_groups

GROUPS = 64
TILE = 32


@triton.jit
def _guess(
    logits, peaks, amounts, order, results, vocab, best, temperature, spare, room, k, low,
    GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number = tl.arange(0, PAD)
    peak = tl.load(peaks + number).to(tl.int32, bitcast=True)
    active = list_groups(peak, 0, order, PAD)
    top = tl.max(peak, 0)
    low, high = likely_cut(logits, order, active, low, top, spare, vocab, best, temperature, room, GROUP, TILE)
    tl.store(results, low)
    tl.store(results + 1, high)
    tl.store(results + 2, sure_mass(peak, tl.load(amounts + number), spare, GROUP))
    tl.store(results + 3, kth_peak(peak, k, low))


def guess(logits: Tensor, share: float, room: int, k: int) -> list[float]:
    """Of a row whose largest logit is 0: the two weights that `share` of the mass likely ends between, the weight that
    surely less lies under, and the one that `k` groups reach."""
    weights = logits.exp()
    by_group = weights.view(GROUPS, GROUP)
    order, results = (torch.empty(n, dtype=torch.int32, device=logits.device) for n in (GROUPS, 4))
    _guess[(1,)](
        logits, by_group.amax(1), by_group.sum(1), order, results, len(logits), 0.0, 1.0,
        float(weights.sum()) * share, room, k, -1, GROUP=GROUP, PAD=GROUPS, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return results.view(torch.float32).tolist()


@pytest.mark.parametrize("spread", (0.1, 1.0, 3.0))
@pytest.mark.parametrize("share", (0.02, 0.1, 0.5))
def test_a_sample_of_the_groups_tells_about_where_the_cut_is(spread: float, share: float, device: torch.device) -> None:
    logits = spread * torch.randn(GROUPS * GROUP, generator=torch.Generator().manual_seed(7))
    logits = (logits - logits.max()).to(device)
    low, high, sure, reached = guess(logits, share, 64, 9)
    weights = logits.exp().sort().values.double()
    cut = weights[int((weights.cumsum(0) <= share * weights.sum()).sum())]
    assert low < cut <= high
    assert ((weights > low) & (weights <= high)).sum() < len(weights) / 4
    assert weights[weights < sure].sum() <= share * weights.sum()
    assert 9 <= (logits.view(GROUPS, GROUP).amax(1).exp() >= reached).sum() <= 17


def test_a_row_that_finds_room_as_it_is_needs_no_sample(device: torch.device) -> None:
    logits = torch.randn(GROUPS * GROUP, generator=torch.Generator().manual_seed(1))
    low, high, *_ = guess((logits - logits.max()).to(device), 0.1, 2 * GROUPS * GROUP, 1)
    assert low != low  # the bits before those of 0
    assert high == 1.0
