"""The sampler with the device's kernels against the sampler with torch's operations; and when there are kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fast_inference.executor.logits import FEW
from fast_inference.executor.recorded_sampling import choose
from fast_inference.executor.sampler import Sampler
from fast_inference.executor.sampling_columns import Choice, SamplingColumns
from fast_inference.executor.slot_tensors import SlotTensors
from fast_inference.executor.step_kernels import StepKernels, step_kernels, step_kernels_unchecked
from fast_inference.executor.step_kernels_check import disagreement
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


@pytest.mark.parametrize("choice", (Choice.GREEDY, Choice.DRAW))
def test_a_recorded_choice_by_kernels_is_that_by_torch(
    choice: Choice, kernels: StepKernels, device: torch.device
) -> None:
    slots, results = np.array([4, 0, 1, 3, 2, 5, 5]), []  # with two rows of padding
    for own, where in ((None, torch.device("cpu")), (kernels, device)):
        tensors = SlotTensors(5, 90, np.zeros((6, 1), np.int32), 16, Transfer(where))
        tensors.kernels = own
        tensors.admit(
            np.arange(5),
            [np.zeros(1, np.int32)] * 5,
            [np.zeros(1, np.int32)] * 5,
            np.array([[0, 1, 0.5, 2, 1], [1, 0.9, 1, 0.5, 1], [0, 0, 0.1, 0, 0]], np.float32),
            np.array([[0, 40, 0, FEW, 1], [1, -5, 2**62, 0, 3]]),
        )
        tensors.token_ids.fill_(-1)
        known = torch.tensor([3, 9, 1, 4, 70, 1, 1], device=where)
        logits = torch.cat((normal(5, 3), torch.zeros(2, VOCAB))).to(where)
        packed = choose(choice, logits, torch.from_numpy(slots).to(where), known, tensors)
        assert packed[0, :5].tolist() == tensors.token_ids[slots[:5], known[:5]].tolist()
        results.append([part.tolist() for part in (packed, tensors.token_ids[:5], tensors.lengths)])
    assert results[0] == results[1]


def test_a_cut_of_any_kind_may_be_recorded_where_there_are_kernels() -> None:
    wishes = [SamplingParams(top_p=0.5), SamplingParams(top_k=FEW + 1), SamplingParams(logprobs=1)]
    assert columns(wishes).choice.tolist() == [Choice.LOGITS] * 3
    assert columns(wishes, any_cut=True).choice.tolist() == [Choice.DRAW, Choice.DRAW, Choice.LOGITS]


def test_kernels_that_agree_with_torch_are_taken_and_others_named(kernels: StepKernels, device: torch.device) -> None:
    assert disagreement(kernels, device) is None
    assert disagreement(replace(kernels, choose=_choose_the_last), device) == "tokens are put in the wrong place"
    other_noise = replace(kernels, choose=partial(_choose_as_if_later, kernels))
    assert disagreement(other_noise, device) == "other tokens are drawn"
    assert disagreement(replace(kernels, best_tokens=lambda x: (-x).max(-1)), device) == "the largest logits differ"


def _choose_the_last(logits: Tensor, *_: object) -> Tensor:
    return torch.full((2, len(logits)), VOCAB, dtype=torch.int32, device=logits.device)


def _choose_as_if_later(kernels: StepKernels, *arguments: Any) -> Tensor:
    *others, columns = arguments
    return kernels.choose(*others, columns._replace(seed=columns.seed + 1))


@pytest.mark.gpu
def test_a_gpu_has_those_that_agree(cuda: torch.device) -> None:
    assert disagreement(step_kernels_unchecked(), cuda) is None
    assert step_kernels(cuda) is not None


def test_a_cpu_has_none() -> None:
    assert step_kernels(torch.device("cpu")) is None
