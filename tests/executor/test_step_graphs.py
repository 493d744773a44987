"""Steps from recordings say what steps launched operation by operation say.

On a CPU a replay runs the recorded function again, on the same buffers that a GPU would read and write.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from fast_inference.executor.decode_graphs import recording_order, sizes_up_to
from fast_inference.executor.graph_memory import bytes_of_all
from fast_inference.executor.graph_recorder import Recorder, Work
from fast_inference.executor.random import stream_keys, stream_keys_tensor
from fast_inference.executor.sampling_columns import Choice
from fast_inference.executor.step_graphs import StepGraphs
from fast_inference.protocol.messages import StepResult
from fast_inference.protocol.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from .tiny_model import GREEDY, VOCAB, Driver, TinyModel, alone

PARAMS = {
    "greedy": GREEDY,
    "hot": SamplingParams(temperature=1.3),
    "few": SamplingParams(temperature=0.8, top_k=20),
    "few of the mass": SamplingParams(temperature=0.9, top_k=50, top_p=0.7, min_p=0.02),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "nucleus": SamplingParams(temperature=0.8, top_p=0.95),
    "many": SamplingParams(temperature=0.8, top_k=100),
    "logprobs": SamplingParams(temperature=0.0, logprobs=3),
    "penalties": SamplingParams(temperature=0.7, presence_penalty=0.5, repetition_penalty=1.2),
    "bias": SamplingParams(temperature=0.0, logit_bias={7: 50.0, 9: -50.0}),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, length).tolist()


def serve(graphs: bool, params: list[SamplingParams], steps: int) -> tuple[Driver, list[StepResult]]:
    driver = Driver(TinyModel(), graphs=graphs)
    for slot, own in enumerate(params):
        driver.admit(slot, prompt(3 + 5 * slot, slot), own, seed=slot)
    driver.finish_prompts()
    return driver, driver.decode(steps)


# ---- the same tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_greedy_tokens_are_those_of_a_dense_model_for_any_number_of_rows(rows: int) -> None:
    driver, _ = serve(True, [GREEDY] * rows, 9)
    for slot in range(rows):
        assert driver.out[slot] == TinyModel().generate(prompt(3 + 5 * slot, slot), 10)


@pytest.mark.parametrize("name", PARAMS)
def test_each_kind_of_sampling_gives_the_tokens_of_the_unrecorded_step(name: str) -> None:
    params = [GREEDY, PARAMS[name], PARAMS["few"]]
    eager, unrecorded = serve(False, params, 12)
    recorded, replayed = serve(True, params, 12)
    assert recorded.out == eager.out
    for a, b in zip(unrecorded, replayed, strict=True):
        assert (a.logprobs is None) == (b.logprobs is None)
        if a.logprobs is not None and b.logprobs is not None:
            assert a.logprobs.token_ids.tolist() == b.logprobs.token_ids.tolist()
            assert a.logprobs.values == pytest.approx(b.logprobs.values, abs=1e-5)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_each_request_the_tokens_it_would_get_alone(data: st.DataObject) -> None:
    driver = Driver(TinyModel(), slots=3, num_blocks=64, graphs=True)
    kinds = list(PARAMS.values())
    waiting = [(prompt(data.draw(st.integers(1, 20)), n), kinds[data.draw(st.integers(0, 4))], n) for n in range(5)]
    running: dict[int, tuple[list[int], SamplingParams, int]] = {}
    for _ in range(18):
        for slot in [s for s in running if len(driver.out[s]) >= 6]:
            assert driver.out[slot] == alone(TinyModel(), *running.pop(slot), len(driver.out[slot]))
            driver.retire(slot)
        for slot in range(3):
            if waiting and slot not in running and data.draw(st.booleans()):
                running[slot] = waiting.pop()
                driver.admit(slot, *running[slot])
        most = {slot: driver.length[slot] - driver.computed[slot] for slot in running}
        work = {slot: min(left, data.draw(st.sampled_from([0, 1, 1, 1, 9]))) for slot, left in most.items()}
        driver.step({slot: count for slot, count in work.items() if count})
    for slot, request in running.items():
        assert driver.out[slot] == alone(TinyModel(), *request, 10)[: len(driver.out[slot])]


def test_a_request_may_grow_to_the_full_length() -> None:
    driver = Driver(TinyModel(), max_model_len=12, graphs=True)
    driver.admit(0, prompt(9, 8))
    driver.step({0: 9})
    driver.decode(3)
    assert driver.out[0] == TinyModel().generate(prompt(9, 8), 4)


def test_draws_are_keyed_alike_on_both_sides() -> None:
    rng = np.random.default_rng(4)
    seeds = rng.integers(-(2**63), 2**63 - 1, 1000)
    positions = rng.integers(0, 2**17, 1000)
    keys = stream_keys_tensor(torch.from_numpy(seeds), torch.from_numpy(positions))
    assert keys.tolist() == stream_keys(seeds, positions).tolist()


# ---- prompts -------------------------------------------------------------------------------------------------------


def sizes(model: TinyModel) -> list[int]:
    """Tokens of each step, padding included."""
    return [starts[-1] for starts in model.batches]


def test_short_prompts_decodes_and_chunks_share_a_recorded_step_in_any_order() -> None:
    model = TinyModel()
    driver = Driver(model, slots=6, graphs=True)
    prompts = [prompt(length, length) for length in (9, 21, 1, 12)]
    driver.admit(0, prompts[0], PARAMS["few"], seed=4)
    driver.step({0: 9})
    driver.admit(1, prompts[1])
    driver.admit(2, prompts[2], PARAMS["few"], seed=5)
    model.batches.clear()
    assert driver.step({0: 1, 1: 10, 2: 1}).slots.tolist() == [0, 2]  # the other's prompt is not through
    driver.admit(3, prompts[3])
    assert driver.step({0: 1, 1: 11, 2: 1, 3: 12}).slots.tolist() == [0, 2, 1, 3]  # in the order of the work
    assert sizes(model) == [16, 32]
    driver.decode(3)
    for slot, (params, seed) in enumerate([(PARAMS["few"], 4), (GREEDY, 0), (PARAMS["few"], 5), (GREEDY, 0)]):
        assert driver.out[slot] == alone(TinyModel(), prompts[slot], params, seed, len(driver.out[slot]))


def test_a_prompt_shares_a_recorded_step_with_many_decode_rows() -> None:
    model = TinyModel()
    driver = Driver(model, slots=13, num_blocks=160, max_model_len=160, graphs=True)
    for slot in range(12):
        driver.admit(slot, prompt(4 + slot, slot))
    driver.finish_prompts()
    driver.admit(12, prompt(9, 12))
    model.batches.clear()
    driver.step({**dict.fromkeys(range(12), 1), 12: 9})
    assert sizes(model) == [128] and len(model.batches[-1]) == 16 + 1  # the fewest tokens with so many rows
    driver.decode(2)
    for slot in range(13):
        length = 9 if slot == 12 else 4 + slot
        assert driver.out[slot] == TinyModel().generate(prompt(length, slot), len(driver.out[slot]))


def test_a_step_whose_rows_all_go_on_or_that_is_too_large_or_wants_prompt_logprobs_is_not_replayed() -> None:
    model = TinyModel()
    driver = Driver(model, slots=8, graphs=True)
    model.batches.clear()
    driver.admit(0, prompt(50, 1))
    driver.step({0: 20})  # nothing is sampled
    driver.admit(1, prompt(60, 2))
    driver.step({0: 30, 1: 60})  # over the largest recording
    driver.admit(2, prompt(5, 3), SamplingParams(temperature=0.0, prompt_logprobs=1))
    (told,) = driver.step({2: 5}).prompt_logprobs
    assert told.top.rows.tolist() == [1, 2, 3, 4]
    assert sizes(model) == [20, 90, 5]
    for slot in range(3, 8):
        driver.admit(slot, prompt(2, slot))
    driver.step(dict.fromkeys(range(3, 8), 2) | {0: 1, 1: 1, 2: 1})  # no row is left for the padding
    assert sizes(model)[3:] == [13]
    for slot, length in {0: 50, 1: 60, 2: 5}.items():
        assert driver.out[slot] == TinyModel().generate(prompt(length, slot + 1), 2)


def test_a_cached_prefix_is_read_in_a_recorded_step() -> None:
    driver = Driver(TinyModel(), graphs=True)
    p = prompt(13, 6)
    driver.admit(0, p)
    driver.step({0: 13})
    driver.admit(1, [*p, 9, 8], cached=driver.blocks[0][:3])
    driver.step({1: 3})
    driver.decode(2)
    assert driver.out[1] == TinyModel().generate([*p, 9, 8], 3)


# ---- what a replay costs and touches -------------------------------------------------------------------------------


def test_a_decode_step_in_which_nothing_changes_copies_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, _ = serve(True, [GREEDY, PARAMS["few"], GREEDY], 1)
    copied: list[int] = []
    up, write = driver.transfer.up, driver.transfer.write

    def counted(*arrays: np.ndarray) -> list[torch.Tensor]:
        copied.append(len(arrays))
        return up(*arrays)

    def counted_too(array: np.ndarray, target: torch.Tensor) -> None:
        copied.append(1)
        write(array, target)

    monkeypatch.setattr(driver.transfer, "up", counted)
    monkeypatch.setattr(driver.transfer, "write", counted_too)
    driver.decode(6)
    assert copied == []
    driver.retire(1)
    driver.decode(3)
    assert copied == [1]  # which slots are left, once


def test_rows_that_only_fill_up_write_to_nobodys_block_and_slot() -> None:
    driver, _ = serve(True, [GREEDY] * 3, 8)
    keys = driver.kv.layers[0].keys
    owned = {block for blocks in driver.blocks.values() for block in blocks}
    touched = {block for block in range(len(keys)) if bool(keys[block].any())}
    assert touched == owned | {len(keys) - 1}
    tensors = driver.runner.batch.tensors
    assert int(tensors.lengths[tensors.scratch]) == 1


def test_the_gap_is_told_for_decode_steps_that_follow_one_another_and_for_no_others() -> None:
    driver = Driver(TinyModel())
    driver.admit(0, prompt(4))
    assert driver.step({0: 4}).gap_seconds is None  # a prompt
    assert driver.step({0: 1}).gap_seconds is None  # behind a prompt
    gap = driver.step({0: 1}).gap_seconds
    assert gap is not None and gap >= 0
    driver.admit(1, prompt(1))
    assert driver.step({0: 1, 1: 1}).gap_seconds is None  # whose request may have come after a pause
    assert driver.step({0: 1, 1: 1}).gap_seconds is not None
    driver.step({})
    assert driver.step({0: 1, 1: 1}).gap_seconds is None


# ---- which recordings there are ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (20, [1, 2, 4, 8, 16, 20]),
        (100, [1, 2, 4, *range(8, 65, 8), 100]),
        (300, [1, 2, 4, *range(8, 65, 8), *range(128, 257, 8), 288, 300]),
    ],
)
def test_sizes_reach_the_largest_batch_and_no_further(rows: int, sizes: list[int]) -> None:
    assert sizes_up_to(rows) == sizes
    assert sizes_up_to(4000)[-1] == 512


def test_one_row_is_recorded_first_then_the_largest_and_down() -> None:
    assert recording_order([1, 2, 4, 8]) == [1, 8, 4, 2]
    assert recording_order([1]) == [1]


def made(graphs: StepGraphs, kind: str) -> set[int]:
    return {key.size for key in graphs.recordings._made if key.kind == kind and key.choice is Choice.GREEDY}


def test_a_larger_recording_serves_until_the_fitting_one_is_made_next() -> None:
    driver = Driver(TinyModel(), slots=8)
    driver.runner.graphs = graphs = driver.graphs
    model = driver.runner._model
    assert isinstance(model, TinyModel)
    driver.admit(0, prompt(4))
    driver.admit(1, prompt(6))
    driver.step({0: 4, 1: 6})
    driver.decode(1)
    assert model.batches[-1] == [0, 1, 2]  # no recording yet
    with torch.inference_mode():
        for _ in range(3):
            graphs.recordings.go_on()  # what was asked for, the last first; then one row alone
    assert made(graphs, "decode") == {1, 2} and made(graphs, "prompt") == {16}
    with torch.inference_mode():
        graphs.recordings.go_on()
    assert made(graphs, "decode") == {1, 2, 8}
    driver.admit(2, prompt(5))
    driver.step({2: 5})
    assert model.batches[-1] == [0, *[5] * 7, 16]  # six rows without tokens, and one of padding
    driver.decode(1)
    assert model.batches[-1] == list(range(9))  # three rows in the recording for eight
    with torch.inference_mode():
        graphs.recordings.go_on()
    driver.decode(1)
    assert model.batches[-1] == list(range(5))
    for slot, length in enumerate((4, 6, 5)):
        assert driver.out[slot] == TinyModel().generate(prompt(length), len(driver.out[slot]))


class Failing(Recorder):
    """Can't record more than two rows."""

    def record(self, work: Work) -> Work:
        if super().record(work)().shape[-1] > 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return work


def test_a_recording_that_fails_is_logged_once_and_its_steps_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(TinyModel(), slots=8)
    batch, recorder = driver.runner.batch, Failing(torch.device("cpu"))
    graphs = StepGraphs(driver.runner._model, driver.kv, batch, recorder, driver.transfer)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        while graphs.recordings.missing:
            graphs.recordings.go_on()
    assert [r.message for r in caplog.records] == [
        "no graph for decode steps of 8 rows (operation not permitted when stream is capturing): they run eagerly"
    ]
    driver.runner.graphs = graphs
    for slot in range(3):
        driver.admit(slot, prompt(4, slot))
    driver.finish_prompts()
    driver.decode(3)
    driver.retire(2)
    driver.blocks.pop(2, None)
    driver.decode(3)
    for slot in range(3):
        assert driver.out[slot] == TinyModel().generate(prompt(4, slot), len(driver.out[slot]))


def test_memory_is_reckoned_from_the_largest_and_the_smallest_recordings() -> None:
    # Decode steps of 1, 2, 4 and 8 rows, three ways to choose; prompts of 16, 32 and 64 tokens, two ways.
    recordings = Driver(TinyModel(), slots=8).graphs.recordings
    readings = iter([1000, 1600, 1650])
    with torch.inference_mode():
        assert bytes_of_all(recordings, lambda: next(readings)) == 600 + (18 - 5) * 10


def test_recording_between_two_steps_changes_nothing() -> None:
    driver = Driver(TinyModel())
    driver.runner.graphs = driver.graphs
    params = [GREEDY, PARAMS["few"], PARAMS["nucleus"]]
    for slot, own in enumerate(params):
        driver.admit(slot, prompt(3 + 5 * slot, slot), own, seed=slot)
    driver.finish_prompts()
    recordings = driver.graphs.recordings
    while recordings.missing:
        driver.decode(1)
        with torch.inference_mode():
            recordings.go_on()
    eager, _ = serve(False, params, recordings.total)
    assert driver.out == eager.out
