"""What changes logits, against loops over tokens; and log-probabilities against torch's own softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fast_inference.executor.logits import penalize
from fast_inference.executor.logprobs import on_wire, top_logprobs
from fast_inference.protocol.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from .tiny_model import GREEDY, VOCAB, Driver, TinyModel, alone

PROMPT = [4, 9, 9, 30, 7]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest) -> TinyModel:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return TinyModel(request.param)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_penalties_are_those_of_a_loop_over_the_tokens(data: st.DataObject) -> None:
    vocab, rows = 12, data.draw(st.integers(1, 4))
    token, penalty = st.integers(0, vocab - 1), st.floats(-2, 2, width=32)
    histories = [data.draw(st.lists(token, min_size=1, max_size=9)) for _ in range(rows)]
    num_prompt = [data.draw(st.integers(1, len(h))) for h in histories]
    presence, frequency = ([data.draw(penalty) for _ in range(rows)] for _ in range(2))
    repetition = [data.draw(st.floats(0.5, 2, width=32)) for _ in range(rows)]
    logits = torch.randn(rows + 1, vocab, generator=torch.Generator().manual_seed(rows))
    wanted = logits.clone()
    where = list(range(1, rows + 1))  # row 0 wants nothing
    for i, history in enumerate(histories):
        for t in set(history):
            value = wanted[where[i], t]
            value = value / repetition[i] if value > 0 else value * repetition[i]
            count = history[num_prompt[i] :].count(t)
            wanted[where[i], t] = value - frequency[i] * count - presence[i] * (count > 0)
    padded = torch.full((rows, max(map(len, histories)) + 1), 2**31 - 1)  # what is not known is anything
    for i, history in enumerate(histories):
        padded[i, : len(history)] = torch.tensor(history)
    lengths = torch.tensor([len(h) for h in histories])
    floats = (torch.tensor(x, dtype=torch.float32) for x in (presence, frequency, repetition))
    penalize(logits, torch.tensor(where), padded, lengths, torch.tensor(num_prompt), *floats)
    torch.testing.assert_close(logits, wanted)


def test_a_frequency_penalty_ends_repetition(model: TinyModel) -> None:
    plain = alone(model, PROMPT, GREEDY, 0, 20)
    strict = alone(model, PROMPT, SamplingParams(temperature=0.0, presence_penalty=2, frequency_penalty=2), 0, 20)
    assert strict[0] == plain[0]  # the prompt does not count
    assert len(set(strict)) >= len(set(plain))
    tokens = list(PROMPT)
    for token in strict:
        logits = model.dense(tokens)[-1]
        for t in set(tokens[len(PROMPT) :]):
            logits[t] -= 2 + 2 * tokens[len(PROMPT) :].count(t)
        assert token == int(logits.argmax())
        tokens.append(token)


def test_a_repetition_penalty_counts_the_prompt_too(model: TinyModel) -> None:
    out = alone(model, PROMPT, SamplingParams(temperature=0.0, repetition_penalty=1.5), 0, 6)
    tokens = list(PROMPT)
    for token in out:
        logits = model.dense(tokens)[-1]
        for t in set(tokens):
            logits[t] = logits[t] / 1.5 if logits[t] > 0 else logits[t] * 1.5
        assert token == int(logits.argmax())
        tokens.append(token)


def test_output_before_a_preemption_counts_as_output(model: TinyModel) -> None:
    params = SamplingParams(temperature=0.9, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={8: 2.0})
    whole = alone(model, PROMPT, params, 5, 9)
    driver = Driver(model)
    driver.admit(0, PROMPT + whole[:4], params, 5, num_prompt=len(PROMPT))
    driver.finish_prompts(3)
    driver.decode(4)
    assert driver.out[0] == whole[4:]


def test_stop_tokens_cannot_come_before_min_tokens(model: TinyModel) -> None:
    plain = alone(model, PROMPT, GREEDY, 0, 4)
    held = alone(model, PROMPT, SamplingParams(temperature=0.0, min_tokens=3), 0, 4, stop=(plain[0], VOCAB + 5))
    assert plain[0] not in held[:3]
    assert held[0] == int(model.dense(PROMPT)[-1].topk(2).indices[1])


def test_logit_bias_and_allowed_tokens_apply_to_their_rows_only(model: TinyModel) -> None:
    driver = Driver(model)
    driver.admit(0, PROMPT, SamplingParams(temperature=0.0, logit_bias={17: 100.0, 3: -1.0}))
    driver.admit(1, PROMPT)
    driver.admit(2, PROMPT, SamplingParams(temperature=0.0, allowed_token_ids=(250, 5, 5, 80)))
    driver.admit(3, PROMPT, SamplingParams(temperature=1.5, allowed_token_ids=(299, 2)))
    driver.finish_prompts()
    driver.decode(7)
    assert driver.out[0] == [17] * 8
    assert driver.out[1] == model.generate(PROMPT, 8)
    assert set(driver.out[2]) <= {250, 5, 80}
    assert set(driver.out[3]) <= {299, 2}
    logits = model.dense(PROMPT)[-1]
    assert driver.out[2][0] == max((250, 5, 80), key=lambda t: float(logits[t]))


def test_a_row_with_no_token_left_fails(model: TinyModel) -> None:
    driver = Driver(model)
    driver.admit(0, PROMPT, SamplingParams(temperature=0.0, allowed_token_ids=(4,), min_tokens=1), stop=(4,))
    result = driver.step({0: len(PROMPT)})
    assert len(result.tokens) == 0 and result.failed[0].slot == 0 and "-inf" in result.failed[0].message


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_softmax() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1)) * 4
    tokens = torch.tensor([3, 0, 49, int(logits[3].argmax()), 7])
    top = top_logprobs(logits, tokens, 4)
    wire = on_wire(top, tokens.numpy(), np.array([2, 3, 5, 8, 9]), np.array([4, 0, 2, 1, 3]))
    wanted = torch.log_softmax(logits, -1)
    assert wire.rows.tolist() == [2, 3, 5, 8, 9]
    assert wire.counts.tolist() == [5, 1, 3, 2, 4]
    assert wire.ranks.tolist() == [int((wanted[i] > wanted[i, t]).sum()) + 1 for i, t in enumerate(tokens.tolist())]
    start = 0
    for row, count in enumerate(wire.counts.tolist()):
        ids, values = wire.token_ids[start : start + count], wire.values[start : start + count]
        start += count
        assert ids[0] == tokens[row]
        assert ids[1:].tolist() == wanted[row].topk(count - 1).indices.tolist()
        np.testing.assert_allclose(values, wanted[row, torch.from_numpy(ids).long()], atol=1e-5)
    assert start == len(wire.token_ids)


def test_logprobs_come_from_the_models_own_logits_for_the_rows_that_ask(model: TinyModel) -> None:
    driver = Driver(model)
    driver.admit(0, PROMPT, SamplingParams(temperature=0.7, presence_penalty=1.0, logit_bias={5: 9.0}, logprobs=3), 1)
    driver.admit(1, PROMPT)
    driver.admit(2, PROMPT, SamplingParams(temperature=0.0, logprobs=0))
    driver.finish_prompts()
    result = driver.decode(1)[0]
    top = result.logprobs
    assert top is not None
    assert top.rows.tolist() == [0, 2] and top.counts.tolist() == [4, 1]
    for start, slot in ((0, 0), (4, 2)):
        wanted = torch.log_softmax(model.dense(PROMPT + driver.out[slot][:1])[-1], -1).cpu()
        assert top.token_ids[start] == driver.out[slot][1]
        np.testing.assert_allclose(top.values[start], wanted[driver.out[slot][1]], atol=1e-4)
        if start == 0:
            assert top.token_ids[1:4].tolist() == wanted.topk(3).indices.tolist()


@pytest.mark.parametrize(("chunk", "limit"), [(64, 1000), (64, 3), (5, 3), (4, 1000), (1, 2)])
def test_prompt_logprobs_come_with_each_chunk_in_bounded_pieces(
    model: TinyModel, chunk: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(model)
    monkeypatch.setattr(driver.runner, "_prompt_limit", limit)
    prompts = {
        slot: np.random.default_rng(slot).integers(0, VOCAB, n).tolist() for slot, n in enumerate((11, 1, 14, 6))
    }
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)
    for slot, p in prompts.items():
        driver.admit(slot, p, params if slot != 3 else GREEDY)
    parts = [part for result in driver.finish_prompts(chunk) for part in result.prompt_logprobs]
    for slot, p in prompts.items():
        mine = [part.top for part in parts if part.slot == slot]
        positions = [row for top in mine for row in top.rows.tolist()]
        assert positions == (list(range(1, len(p))) if slot != 3 else [])
        own = torch.log_softmax(model.dense(p), -1).cpu()
        for top in mine:
            assert top.counts.tolist() == [3] * len(top.rows)
            ids, values = top.token_ids.reshape(-1, 3), top.values.reshape(-1, 3)
            for j, position in enumerate(top.rows.tolist()):
                assert ids[j, 0] == p[position]
                assert ids[j, 1:].tolist() == own[position - 1].topk(2).indices.tolist()
                np.testing.assert_allclose(values[j], own[position - 1, torch.from_numpy(ids[j]).long()], atol=1e-4)
        assert driver.out[slot] == model.generate(p, len(driver.out[slot]))


def test_prompt_logprobs_of_a_recomputing_model_come_once() -> None:
    model = TinyModel(recompute=True)
    driver = Driver(model)
    driver.admit(0, PROMPT, SamplingParams(temperature=0.0, prompt_logprobs=1))
    assert driver.step({0: 3}).prompt_logprobs == ()
    (part,) = driver.step({0: 2}).prompt_logprobs
    assert part.top.rows.tolist() == [1, 2, 3, 4]
    assert driver.step({0: 1}).prompt_logprobs == ()


def test_prompt_logprobs_are_not_reported_again_after_a_preemption(model: TinyModel) -> None:
    driver = Driver(model)
    driver.admit(0, [*PROMPT, 8], SamplingParams(temperature=0.0, prompt_logprobs=1), num_prompt=len(PROMPT))
    assert driver.step({0: 6}).prompt_logprobs == ()
