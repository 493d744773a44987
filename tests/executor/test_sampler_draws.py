"""The sampler's draws: distribution, independence, and that a token is a function of (seed, position) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fast_inference.executor.logits import FEW, MANY, largest
from fast_inference.executor.random import gumbel, stream_keys
from fast_inference.executor.sampler import Sampler
from fast_inference.executor.sampling_columns import SamplingColumns
from fast_inference.executor.transfer import Transfer
from fast_inference.protocol.messages import Admit
from fast_inference.protocol.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

VOCAB = 300


def sample(
    logits: Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int], device: str = "cpu"
) -> list[int]:
    """One token for each row of `logits` [R, V]."""
    columns = SamplingColumns(len(params), logits.shape[1])
    token = np.zeros(1, np.int32)
    for slot, p in enumerate(params):
        admit = Admit(
            slot=slot, token_ids=token, num_prompt=1, params=p, seed=seeds[slot], block_ids=token, cached_len=0
        )
        assert columns.set(admit) is None
    rows = columns.rows(np.arange(len(params)), np.array(positions), np.zeros(len(params), np.int64))
    sampler = Sampler(Transfer(torch.device(device)))
    no_history = torch.zeros((len(params), 1), dtype=torch.int32, device=device)
    with torch.inference_mode():
        return sampler.sample(logits.to(device, copy=True), rows, no_history).tokens.tolist()


def kept_by_sorting(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution [V] that `params` leave of one row, the long way round."""
    probabilities = torch.softmax(logits.double() / params.temperature, -1)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    order = probabilities.argsort(descending=True)
    kept = probabilities[order] / probabilities.sum()
    if params.top_k > 0:
        kept[params.top_k :] = 0
    kept /= kept.sum()
    before = kept.cumsum(-1) - kept
    if params.top_p < 1:
        kept[before >= params.top_p] = 0
    result = torch.zeros_like(probabilities)
    result[order] = kept / kept.sum()
    return result


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The statistic and a bound that it passes once in some million times. Cells below 5 are taken together."""
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    degrees = len(wanted) - 1
    return float(((observed - wanted) ** 2 / wanted).sum()), degrees + 5 * (2 * degrees) ** 0.5 + 10


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=12),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.3, top_k=40, top_p=0.7, min_p=0.02),
    ],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_frequencies_are_those_of_the_softmax(params: SamplingParams, vary: str) -> None:
    n = 6_000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    over, fixed = list(range(1, n + 1)), [7] * n
    seeds, positions = (fixed, over) if vary == "position" else (over, fixed)
    tokens = sample(logits.expand(n, -1), [params] * n, seeds, positions)
    expected = kept_by_sorting(logits, params).numpy() * n
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    statistic, bound = chi_square(counts, expected)
    assert statistic < bound


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_neighbouring_streams_are_independent(vary: str) -> None:
    n, cells = 16_000, 6
    logits = torch.full((VOCAB,), -1e9)
    places = torch.tensor([0, 1, 2, 255, 256, 299])  # inside a group, across groups
    logits[places] = torch.tensor([0.0, 0.3, -0.4, 0.1, 0.5, -0.2])
    over, fixed = list(range(n)), [11] * n
    seeds, positions = (fixed, over) if vary == "position" else (over, fixed)
    tokens = np.array(sample(logits.expand(n, -1), [SamplingParams()] * n, seeds, positions))
    cell = np.searchsorted(places.numpy(), tokens)
    pairs = np.bincount(cell[:-1:2] * cells + cell[1::2], minlength=cells**2)
    p = torch.softmax(logits[places].double(), -1).numpy()
    statistic, bound = chi_square(pairs, np.outer(p, p).ravel() * (n // 2))
    assert statistic < bound


rows = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, 70, VOCAB]),
    st.sampled_from([0.05, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 10_000),
)


@settings(max_examples=40, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=6), number=st.integers(0, 50))
def test_a_row_draws_the_same_token_whoever_shares_its_batch(batch: list[tuple], number: int) -> None:
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(number)) * 3
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m, _, _ in batch]
    seeds, positions = [row[4] for row in batch], [row[5] for row in batch]
    together = sample(logits, params, seeds, positions)
    for i, token in enumerate(together):
        assert sample(logits[i : i + 1], params[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) == [token]
        wanted = kept_by_sorting(logits[i], params[i]) if params[i].temperature else logits[i] == logits[i].max()
        assert wanted[token] > 0


@pytest.mark.parametrize("vocab", [7, 256, 257, 5_000, 40_000, 49_152])
@pytest.mark.parametrize("spread", [0.01, 4.0])
def test_the_search_for_the_likeliest_stops_as_late_as_it_must(vocab: int, spread: float) -> None:
    """Nearly flat logits need the full sort, peaked ones some candidates: the kept set is the same."""
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(2)) * spread
    n = 30
    for params in (SamplingParams(top_p=0.6), SamplingParams(top_k=MANY + 9), SamplingParams(top_k=FEW, top_p=0.5)):
        tokens = sample(logits[:1].expand(n, -1), [params] * n, [3] * n, list(range(n)))
        kept = kept_by_sorting(logits[0], params)
        assert all(kept[token] > 0 for token in tokens)


def test_the_fast_search_finds_the_largest() -> None:
    values = torch.rand(3, 49_152, generator=torch.Generator().manual_seed(4))
    assert torch.equal(largest(values, FEW), values.topk(FEW).values)


def test_tokens_that_tie_at_the_cut_are_all_kept() -> None:
    n = 400
    logits = torch.full((n, VOCAB), -5.0)
    logits[:, [3, 50, 200]] = 1.0
    tokens = sample(logits, [SamplingParams(top_k=2)] * n, [1] * n, list(range(n)))
    assert set(tokens) == {3, 50, 200}


def test_a_temperature_near_zero_is_greedy_and_a_small_one_is_safe() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(5)) * 30
    params = [SamplingParams(temperature=1e-9), SamplingParams(temperature=1e-4, top_p=0.9)]
    assert sample(logits, params, [1, 2], [3, 4]) == logits.argmax(-1).tolist()


# ---- the bits themselves -------------------------------------------------------------------------------------------


def test_the_generator_is_splitmix64() -> None:
    """The first outputs that SplitMix64 gives from the start 1234567, as published with its reference code."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    noise = gumbel(torch.tensor([1234567]), torch.arange(1, 5))
    uniform = np.array([((bits >> 11) + 0.5) * 2.0**-53 for bits in outputs])
    np.testing.assert_allclose(noise.numpy(), -np.log(-np.log(uniform)), rtol=1e-12)


def test_gumbel_noise_has_the_moments_of_its_distribution() -> None:
    keys = torch.from_numpy(stream_keys(np.arange(500), np.full(500, 3)))
    noise = gumbel(keys[:, None], torch.arange(400)).flatten()
    assert bool(torch.isfinite(noise).all())
    assert abs(float(noise.mean()) - 0.577216) < 0.01
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.03


def test_no_two_streams_start_alike() -> None:
    seeds, positions = (a.ravel() for a in np.meshgrid(np.arange(-300, 300), np.arange(300)))
    assert len(np.unique(stream_keys(seeds, positions))) == len(seeds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    keys, counters = torch.from_numpy(stream_keys(np.arange(64), np.arange(64))), torch.arange(-500, 500)
    torch.testing.assert_close(
        gumbel(keys[:, None].cuda(), counters.cuda()).cpu(), gumbel(keys[:, None], counters), rtol=1e-12, atol=1e-12
    )
    n = 500
    logits = torch.randn(n, 49_152, generator=torch.Generator().manual_seed(6)) * 3
    kinds = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=50), SamplingParams(min_p=0.02)]
    params = [kinds[i % 4] for i in range(n)]
    here, there = (sample(logits, params, [9] * n, list(range(n)), device) for device in ("cpu", "cuda"))
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 1  # sums may round another way at a boundary
