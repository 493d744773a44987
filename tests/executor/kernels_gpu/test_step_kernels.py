"""The sampler with the device's kernels against the sampler with torch's operations; and when there are kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fast_inference.executor import step_kernels as chosen
from fast_inference.executor.logits import FEW
from fast_inference.executor.random import stream_keys_tensor
from fast_inference.executor.recorded_sampling import drawn, greedy
from fast_inference.executor.sampler import Sampler
from fast_inference.executor.sampling_columns import Choice, SamplingColumns
from fast_inference.executor.slot_tensors import DrawColumns
from fast_inference.executor.step_kernels import StepKernels, step_kernels, step_kernels_unchecked
from fast_inference.executor.transfer import Transfer
from fast_inference.protocol.messages import Admit
from fast_inference.protocol.sampling import SamplingParams
from torch import Tensor

VOCAB = 300
WISHES = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.9, logprobs=3),
    SamplingParams(temperature=0.0, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2, logprobs=0),
    SamplingParams(temperature=1.2, top_p=0.7, logit_bias={5: 4.0, 299: -50.0}),
    SamplingParams(temperature=1.0, allowed_token_ids=[7, 100, 250]),
    SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=0.8),
]


@pytest.fixture
def kernels() -> StepKernels:
    return step_kernels_unchecked()


def normal(rows: int, seed: int) -> Tensor:
    return 2 * torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed))


def columns(wishes: list[SamplingParams], any_cut: bool = False) -> SamplingColumns:
    made = SamplingColumns(len(wishes), VOCAB, any_cut)
    token = np.zeros(1, np.int32)
    for slot, params in enumerate(wishes):
        admit = Admit(
            slot=slot, token_ids=token, num_prompt=1, params=params, seed=slot * 77, block_ids=token, cached_len=0
        )
        assert made.set(admit) is None
    return made


def test_whatever_rows_want_kernels_and_torch_choose_the_same(kernels: StepKernels, device: torch.device) -> None:
    count = len(WISHES)
    token_ids = torch.randint(0, VOCAB, (count, 20), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    lengths = np.arange(6, 6 + count)
    wants = columns(WISHES).rows(np.arange(count), lengths, lengths - 3)
    with torch.inference_mode():
        mine = Sampler(Transfer(device), kernels).sample(normal(count, 2).to(device), wants, token_ids.to(device))
        expected = Sampler(Transfer(torch.device("cpu"))).sample(normal(count, 2), wants, token_ids)
    assert mine.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(mine.best.cpu(), expected.best, rtol=1e-6, atol=1e-6)
    assert mine.logprobs is not None
    assert expected.logprobs is not None
    assert mine.logprobs.ranks.tolist() == expected.logprobs.ranks.tolist()
    assert mine.logprobs.ids.tolist() == expected.logprobs.ids.tolist()
    torch.testing.assert_close(mine.logprobs.own.cpu(), expected.logprobs.own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.logprobs.values.cpu(), expected.logprobs.values, rtol=1e-5, atol=1e-5)


def test_a_recorded_draw_by_kernels_is_that_by_torch(kernels: StepKernels, device: torch.device) -> None:
    logits, lengths = normal(5, 3), torch.tensor([3, 9, 1, 4, 70])
    by_torch = DrawColumns(
        temperature=torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0]),
        top_k=torch.tensor([0, 40, 0, FEW, 1]),
        top_p=torch.tensor([1.0, 0.9, 1.0, 0.5, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0]),
        seed=torch.tensor([1, -5, 2**62, 0, 3]),
    )
    expected, best = drawn(logits.clone(), lengths, by_torch, None)
    mine = replace(by_torch, **{name: getattr(by_torch, name).to(device) for name in DrawColumns.__slots__})
    tokens, found = drawn(logits.to(device), lengths.to(device), mine, kernels)
    assert tokens.tolist() == expected.tolist()
    assert found.tolist() == best.tolist()
    assert greedy(logits.to(device), kernels)[0].tolist() == logits.argmax(-1).tolist()


def test_streams_start_with_the_same_numbers(kernels: StepKernels, device: torch.device) -> None:
    seeds = torch.randint(-(2**62), 2**62, (300,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(300)
    mine = kernels.stream_keys(seeds.to(device), positions.to(device))
    assert torch.equal(mine.cpu(), stream_keys_tensor(seeds, positions))


def test_a_cut_of_any_kind_may_be_recorded_where_there_are_kernels() -> None:
    wishes = [SamplingParams(top_p=0.5), SamplingParams(top_k=FEW + 1), SamplingParams(logprobs=1)]
    assert columns(wishes).choice.tolist() == [Choice.LOGITS] * 3
    assert columns(wishes, any_cut=True).choice.tolist() == [Choice.DRAW, Choice.DRAW, Choice.LOGITS]


def test_kernels_that_agree_with_torch_are_taken_and_others_named(kernels: StepKernels, device: torch.device) -> None:
    assert chosen._disagreement(kernels, device) is None
    wrong = replace(kernels, stream_keys=lambda seeds, positions: seeds + positions)
    assert chosen._disagreement(wrong, device) == "the generator's numbers differ"
    assert chosen._disagreement(replace(kernels, draw=_draw_the_last), device) == "a token is drawn beyond its top-k"


def _draw_the_last(logits: Tensor, best: Tensor, tokens: Tensor, *_: Tensor) -> None:
    tokens.copy_(logits.argmin(-1))


def test_a_cpu_has_none() -> None:
    assert step_kernels(torch.device("cpu")) is None
