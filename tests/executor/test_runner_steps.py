"""A runner driven by steps, against a dense model that knows neither slots nor blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fast_inference.protocol.errors import EngineError
from fast_inference.protocol.messages import Step
from fast_inference.protocol.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from .tiny_model import GREEDY, VOCAB, Driver, TinyModel, alone

SAMPLED = SamplingParams(temperature=0.8, top_k=20)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, length).tolist()


@pytest.fixture(params=DEVICES)
def model(request: pytest.FixtureRequest) -> TinyModel:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return TinyModel(request.param)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_greedy_tokens_are_those_of_a_dense_model_however_the_prompt_is_cut(model: TinyModel, chunk: int) -> None:
    driver = Driver(model)
    prompts = [prompt(n, n) for n in (1, 4, 7, 23)]
    for slot, p in enumerate(prompts):
        driver.admit(slot, p)
    driver.finish_prompts(chunk)
    driver.decode(9)
    for slot, p in enumerate(prompts):
        assert driver.out[slot] == model.generate(p, 10)


def test_prefill_chunks_and_decodes_share_a_step(model: TinyModel) -> None:
    driver = Driver(model)
    first, second = prompt(5, 1), prompt(17, 2)
    driver.admit(0, first)
    driver.step({0: 5})
    driver.admit(1, second)
    driver.step({0: 1, 1: 8})
    result = driver.step({0: 1, 1: 8})
    assert result.slots.tolist() == [0]  # the other's prompt is not through
    result = driver.step({0: 1, 1: 1})
    assert result.slots.tolist() == [0, 1]
    assert result.seconds > 0
    assert driver.out[0] == model.generate(first, 4)
    assert driver.out[1] == model.generate(second, 1)


def test_a_slot_is_taken_over_by_the_next_request_in_the_step_that_retires_the_last(model: TinyModel) -> None:
    driver = Driver(model)
    driver.admit(0, prompt(9, 1))
    driver.admit(1, prompt(4, 2))
    driver.step({0: 9, 1: 4})
    driver.decode(3)
    driver.retire(0)
    driver.admit(0, prompt(6, 3))
    driver.step({0: 6, 1: 1})
    driver.decode(2)
    assert driver.out[0] == model.generate(prompt(6, 3), 3)
    assert driver.out[1] == model.generate(prompt(4, 2), 7)


def test_a_step_can_be_launched_before_the_one_before_is_read(model: TinyModel) -> None:
    driver = Driver(model)
    p = prompt(6, 5)
    driver.admit(0, p)
    under_way = [driver.launch({0: 6}), driver.launch({0: 1}), driver.launch({0: 1})]
    for pending in under_way:
        driver.finish(pending)
    assert driver.out[0] == model.generate(p, 3)


def test_a_shared_prefix_is_not_computed_again(model: TinyModel) -> None:
    driver = Driver(model)
    p = prompt(13, 6)
    driver.admit(0, p)
    driver.step({0: 13})
    driver.admit(1, p, cached=driver.blocks[0][:3])
    driver.step({1: 1})
    assert driver.out[1] == model.generate(p, 1)
    assert model.batches == [[0, 13], [0, 1]]


def test_copied_blocks_hold_what_the_originals_held(model: TinyModel) -> None:
    driver = Driver(model)
    p = prompt(11, 7)
    driver.admit(0, p)
    driver.step({0: 11})
    copies = [(block, driver.free.pop()) for block in driver.blocks[0]]
    driver.admit(1, [*p, driver.out[0][0]], num_prompt=11, cached=[target for _, target in copies])
    result = driver.finish(driver.launch({1: 1}, copies))
    assert result.tokens.tolist() == model.generate(p, 2)[1:]


def test_a_request_may_grow_to_the_full_length(model: TinyModel) -> None:
    driver = Driver(model, max_model_len=12)
    p = prompt(9, 8)
    driver.admit(0, p)
    driver.step({0: 9})
    driver.decode(3)  # the last of them writes the token after the last one that has a place
    assert driver.out[0] == model.generate(p, 4)


def test_several_new_blocks_of_a_slot_come_in_their_order(model: TinyModel) -> None:
    driver = Driver(model, block_size=1)
    first, second = prompt(3, 1), prompt(5, 2)
    driver.admit(0, first)
    driver.admit(1, second)
    blocks = {slot: driver.blocks[slot] for slot in (0, 1)}
    for slot, admit in enumerate(driver.admits):  # as if no block had been there at admission
        driver.admits[slot] = replace(admit, block_ids=admit.block_ids[:0])
    order = [(0, 0), (1, 0), (1, 1), (0, 1), (1, 2), (0, 2), (1, 3), (1, 4)]
    step = Step(
        number=1,
        admit=tuple(driver.admits),
        grow_slots=np.array([slot for slot, _ in order], np.int32),
        grow_blocks=np.array([blocks[slot][i] for slot, i in order], np.int32),
    )
    with torch.inference_mode():
        driver.runner.launch(step).finish()
    assert driver.runner.batch.tensors.block_tables[1, :5].tolist() == blocks[1]
    driver.admits = []
    driver.step({0: 3, 1: 5})
    driver.decode(1)
    assert driver.out == {0: model.generate(first, 2), 1: model.generate(second, 2)}


def test_a_recomputing_model_sees_all_tokens_when_its_work_reaches_the_end() -> None:
    model = TinyModel(recompute=True)
    driver = Driver(model)
    prompts = [prompt(7, 1), prompt(10, 2)]
    for slot, p in enumerate(prompts):
        driver.admit(slot, p)
    assert driver.step({0: 4, 1: 10}).slots.tolist() == [1]
    assert model.batches == [[0, 10]]
    driver.step({0: 3, 1: 1})
    driver.decode(3)
    assert driver.out[0] == model.generate(prompts[0], 4)
    assert driver.out[1] == model.generate(prompts[1], 5)


def test_a_step_without_work_has_an_empty_result(model: TinyModel) -> None:
    result = Driver(model).step({})
    assert len(result.slots) == 0 and not result.failed and model.batches == []


# ---- failures ------------------------------------------------------------------------------------------------------


def test_a_row_that_makes_the_model_raise_fails_alone(model: TinyModel) -> None:
    driver = Driver(model)
    model.poison = 77
    good = [t for t in prompt(6, 1) if t != 77]
    driver.admit(0, good)
    driver.admit(1, [5, 77, 6])
    driver.admit(2, [77])
    result = driver.step({0: len(good), 1: 3, 2: 1})
    assert result.slots.tolist() == [0]
    assert sorted(f.slot for f in result.failed) == [1, 2]
    assert "KeyError" in result.failed[0].message
    # A step that was already on its way names them again; after that their slots are as good as new.
    result = driver.step({0: 1, 1: 1, 2: 1})
    assert result.slots.tolist() == [0] and sorted(f.slot for f in result.failed) == [1, 2]
    model.poison = -1
    driver.retire(1)
    driver.retire(2)
    driver.admit(1, [5, 9, 6])
    driver.step({0: 1, 1: 3})
    assert driver.out[0] == model.generate(good, 3)
    assert driver.out[1] == model.generate([5, 9, 6], 1)


def test_a_row_whose_logits_are_not_finite_fails_and_the_others_keep_their_logprobs(model: TinyModel) -> None:
    driver = Driver(model)
    model.blight = 88
    params = SamplingParams(temperature=0.0, logprobs=2)
    driver.admit(0, [4, 88], params)
    driver.admit(1, [4, 5], params)
    driver.admit(2, [7, 88])
    result = driver.step({0: 2, 1: 2, 2: 2})
    assert result.slots.tolist() == [1]
    assert result.tokens.tolist() == model.generate([4, 5], 1)
    assert [f.slot for f in result.failed] == [0, 2] and "not finite" in result.failed[0].message
    assert result.logprobs is not None
    assert result.logprobs.rows.tolist() == [0]
    assert result.logprobs.token_ids[0] == result.tokens[0]


def test_token_ids_outside_the_vocabulary_fail_their_row_only(model: TinyModel) -> None:
    driver = Driver(model)
    driver.admit(0, [1, VOCAB])
    driver.admit(1, [1, 2], SamplingParams(temperature=0.0, logit_bias={VOCAB + 7: 1.0}))
    driver.admit(2, [1, 2], SamplingParams(temperature=0.0, allowed_token_ids=(3, VOCAB)))
    driver.admit(3, [1, 2])
    result = driver.step({0: 2, 1: 2, 2: 2, 3: 2})
    assert result.slots.tolist() == [3]
    assert [f.message for f in result.failed] == [
        "prompt token id must be in [0, 300), got 300",
        "logit_bias token id must be in [0, 300), got 307",
        "allowed_token_ids entry must be in [0, 300), got 300",
    ]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(number=1, work_slots=np.array([2], np.int32), work_counts=np.array([1], np.int32)), "work"),
        (Step(number=1, work_slots=np.array([0], np.int32), work_counts=np.array([9], np.int32)), "work"),
        (Step(number=1, grow_slots=np.array([0], np.int32), grow_blocks=np.array([96], np.int32)), "block ids"),
        (Step(number=1, grow_slots=np.array([3], np.int32), grow_blocks=np.array([1], np.int32)), "blocks for slots"),
    ],
)
def test_a_step_that_contradicts_the_batch_is_an_error(step: Step, message: str) -> None:
    driver = Driver(TinyModel())
    driver.admit(0, [1, 2, 3])
    driver.step({})
    with pytest.raises(EngineError, match=message):
        driver.runner.launch(step)


# ---- any schedule --------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_each_request_the_tokens_it_would_get_alone(data: st.DataObject) -> None:
    model = TinyModel()
    driver = Driver(model, slots=3, num_blocks=64)
    waiting = [(prompt(data.draw(st.integers(1, 20)), n), GREEDY if n % 2 else SAMPLED, n) for n in range(5)]
    running: dict[int, tuple[list[int], SamplingParams, int]] = {}
    for _ in range(18):
        for slot in [s for s in running if len(driver.out[s]) >= 6]:
            assert driver.out[slot] == alone(model, *running.pop(slot), len(driver.out[slot]))
            driver.retire(slot)
        for slot in range(3):
            if waiting and slot not in running and data.draw(st.booleans()):
                running[slot] = waiting.pop()
                driver.admit(slot, *running[slot])
        work = {slot: data.draw(st.integers(0, driver.length[slot] - driver.computed[slot])) for slot in running}
        driver.step({slot: count for slot, count in work.items() if count})
    for slot, request in running.items():
        assert driver.out[slot] == alone(model, *request, 10)[: len(driver.out[slot])]
