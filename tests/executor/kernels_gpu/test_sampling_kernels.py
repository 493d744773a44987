"""The sampler's kernels against `executor/{sampler,logits,logprobs}.py`: the same tokens for the same keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fast_inference.executor import logits as edits
from fast_inference.executor.kernels.gpu import sampling
from fast_inference.executor.kernels.gpu.logprobs import chosen_logprobs
from fast_inference.executor.kernels.gpu.penalties import add_bias, penalize
from fast_inference.executor.logprobs import top_logprobs
from fast_inference.executor.random import stream_keys
from fast_inference.executor.sampler import Sampler, best_tokens
from fast_inference.executor.sampling_columns import RandomRows
from fast_inference.executor.transfer import Transfer
from torch import Tensor

VOCAB = 600  # three groups, the last of them not full


@dataclass(frozen=True)
class Wish:
    """How one row is drawn."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def columns(wishes: list[Wish], first_seed: int) -> RandomRows:
    numbers = np.arange(len(wishes))
    return RandomRows(
        rows=numbers,
        keys=stream_keys(numbers + first_seed, numbers),
        temperature=np.array([w.temperature for w in wishes], np.float32),
        top_k=np.array([w.top_k for w in wishes], np.int64),
        top_p=np.array([w.top_p for w in wishes], np.float32),
        min_p=np.array([w.min_p for w in wishes], np.float32),
    )


def by_kernels(logits: Tensor, rows: RandomRows) -> list[int]:
    best, tokens = sampling.best_tokens(logits)
    arrays = (rows.rows, rows.keys, rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    sampling.draw(logits, best, tokens, *(torch.from_numpy(a).to(logits.device) for a in arrays))
    return tokens.tolist()


def by_torch(logits: Tensor, rows: RandomRows) -> list[int]:
    """The sampler's own choice, on the CPU."""
    logits = logits.cpu()
    best, tokens = best_tokens(logits)
    drawn = np.flatnonzero(rows.temperature > 0)
    if not len(drawn):
        return tokens.tolist()
    some = RandomRows(*(a[drawn] for a in (rows.rows, rows.keys, rows.temperature, rows.top_k, rows.top_p, rows.min_p)))
    return Sampler(Transfer(torch.device("cpu")))._draw(logits, best, tokens, some).tolist()


def normal(rows: int, vocab: int, seed: int) -> Tensor:
    return 3 * torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed))


def check(logits: Tensor, wishes: list[Wish], device: torch.device, first_seed: int = 0) -> None:
    rows = columns(wishes, first_seed)
    assert by_kernels(logits.to(device), rows) == by_torch(logits, rows)


WISHES = [
    Wish(),
    Wish(0.0),
    Wish(0.7, top_k=50, top_p=0.95),
    Wish(1.5, top_k=1),
    Wish(0.3, top_p=0.5),
    Wish(2.0, min_p=0.1),
    Wish(1.0, top_k=3, min_p=1.0),
    Wish(1.0, top_k=VOCAB + 9, top_p=0.9, min_p=0.01),
    Wish(0.01, top_p=0.01),
    Wish(1.0, top_p=0.999999, min_p=0.0),
]


@pytest.mark.parametrize("seed", range(2))
def test_draws_are_those_of_the_sampler(seed: int, device: torch.device) -> None:
    check(normal(len(WISHES), VOCAB, seed), WISHES, device, 100 * seed)


@pytest.mark.parametrize("vocab", (1, 2, 255, 256, 257))
def test_small_vocabularies_are_no_special_case(vocab: int, device: torch.device) -> None:
    wishes = [Wish(top_k=2, top_p=0.8), Wish(), Wish(top_p=0.6)]
    check(normal(3, vocab, vocab), wishes, device)


@pytest.mark.parametrize("step", (0.5, 4.0, math.inf), ids=("some ties", "many ties", "all equal"))
def test_tokens_that_tie_with_the_last_kept_are_kept_too(step: float, device: torch.device) -> None:
    logits = torch.zeros((8, VOCAB)) if math.isinf(step) else (normal(8, VOCAB, 5) / step).round()
    wishes = [
        Wish(top_k=40),
        Wish(top_k=5, top_p=0.5),
        Wish(top_p=0.7),
        Wish(top_k=70, top_p=0.9, min_p=0.2),
        Wish(top_k=599),
        Wish(min_p=0.3),
        Wish(top_p=0.25),
        Wish(top_k=1, top_p=0.1),
    ]
    check(logits, wishes, device)


@pytest.mark.parametrize("spread", (0.1, 3.0, 9.0))
@pytest.mark.parametrize("room", (32, 500))
def test_the_cut_is_the_same_where_it_has_to_be_guessed_and_where_the_guess_is_no_use(
    spread: float, room: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SEARCH_TILE", 4)  # groups of a sample, of the 16 that there are
    monkeypatch.setattr(sampling, "LISTED", room)
    wishes = [
        Wish(top_p=0.9),
        Wish(0.7, top_p=0.3),
        Wish(top_p=0.999),
        Wish(top_p=0.8, min_p=0.01),
        Wish(top_k=700, top_p=0.9),
        Wish(0.3, top_k=9),
    ]
    check(normal(len(wishes), 4000, 8) * (spread / 3), wishes, device, 40)


def test_forbidden_tokens_are_never_drawn(device: torch.device) -> None:
    logits = normal(4, VOCAB, 9)
    alone = torch.full_like(logits, -torch.inf)
    places = torch.tensor([0, 255, 256, 599])
    alone[torch.arange(4), places] = logits[torch.arange(4), places]
    wishes = [Wish(), Wish(top_k=3), Wish(top_p=0.9), Wish(2.0, top_k=500, top_p=0.5, min_p=0.1)]
    assert by_kernels(alone.to(device), columns(wishes, 3)) == places.tolist()
    logits[:, 10:] = -torch.inf
    check(logits, wishes, device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_void_row_disturbs_no_other(device: torch.device) -> None:
    logits = normal(4, VOCAB, 2)
    rows = columns([Wish(top_p=0.5), Wish(top_k=5), Wish(top_k=9), Wish(top_k=9)], 0)
    good = by_torch(logits, rows)[3]
    logits[0, 300] = math.nan
    logits[1] = -math.inf
    logits[2, 7] = math.inf
    best, tokens = sampling.best_tokens(logits.to(device))
    assert best.isfinite().tolist() == [False, False, False, True]
    assert best[0].isnan()
    assert tokens.tolist()[::2] == [300, 7]
    drawn = by_kernels(logits.to(device), rows)
    assert drawn[3] == good
    assert all(0 <= token < VOCAB for token in drawn)


def test_equals_are_chosen_by_the_lowest_index(device: torch.device) -> None:
    logits = torch.zeros((2, 9000))
    logits[1, [8999, 4097, 5000]] = 1.0
    best, tokens = sampling.best_tokens(logits.to(device))
    assert best.tolist() == [0.0, 1.0]
    assert tokens.tolist() == [0, 4097]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", (128_256, 151_936))
def test_draws_agree_at_real_sizes(vocab: int, cuda: torch.device) -> None:
    """A device rounds exp otherwise than the host, so two weights a rounding apart may change places."""
    wishes = [Wish(0.8, 50, 0.95), Wish(), Wish(1.0, 0, 0.9), Wish(0.7, 0, 1.0, 0.05), Wish(0.0)] * 40
    differing = 0
    for seed in range(10):
        logits, rows = normal(len(wishes), vocab, seed) / (1 + 4 * (seed % 2)), columns(wishes, 1000 * seed)
        drawn = by_kernels(logits.to(cuda), rows)
        differing += sum(a != b for a, b in zip(drawn, by_torch(logits, rows), strict=True))
    assert differing <= 2


def test_penalties_are_those_of_the_reference(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = normal(4, VOCAB, 1)
    token_ids = torch.randint(0, 40, (6, 30), generator=generator, dtype=torch.int32)
    token_ids[:, 25:] = 2**31 - 1  # what is not known is anything
    rows, slots = torch.tensor([3, 0, 1]), torch.tensor([5, 2, 0])
    lengths, num_prompt = torch.tensor([25, 7, 1]), torch.tensor([10, 7, 1])
    floats = [torch.tensor(v) for v in ([0.5, -1.0, 0.0], [0.25, 1.0, 2.0], [1.3, 0.8, 2.0])]
    expected = logits.clone()
    edits.penalize(expected, rows, token_ids[slots, :25].long(), lengths, num_prompt, *floats)
    actual = logits.to(device)
    penalize(
        actual,
        rows.to(device),
        token_ids.to(device),
        slots.to(device),
        25,
        lengths.to(device),
        num_prompt.to(device),
        *(part.to(device) for part in floats),
    )
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(actual[2].cpu(), logits[2])


def test_biases_are_added_where_they_belong(device: torch.device) -> None:
    logits = normal(3, VOCAB, 1)
    rows, tokens = torch.tensor([0, 0, 2]), torch.tensor([599, 3, 3])
    values = torch.tensor([1.5, -100.0, 2.0])
    expected, actual = logits.clone(), logits.to(device)
    edits.add_bias(expected, rows, tokens, values)
    add_bias(actual, rows.to(device), tokens.to(device), values.to(device))
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("vocab", (3, 5000))
def test_logprobs_and_ranks_are_those_of_the_reference(vocab: int, device: torch.device) -> None:
    logits = normal(4, vocab, 3)
    logits[1] = logits[1].round()
    logits[2, 1:] = -torch.inf
    tokens = torch.tensor([0, 2, 0, 1])
    expected = top_logprobs(logits.clone(), tokens, 1)
    own, ranks, normalizer = chosen_logprobs(logits.to(device), tokens.to(device))
    torch.testing.assert_close(own.cpu(), expected.own, rtol=1e-5, atol=1e-5)
    assert ranks.tolist() == expected.ranks.tolist()
    torch.testing.assert_close(logits.amax(-1) - normalizer.cpu(), expected.values[:, 0], rtol=1e-5, atol=1e-5)
