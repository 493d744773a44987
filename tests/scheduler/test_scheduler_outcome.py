"""Failures and log-probabilities in a step's result: what reaches the streams, and what is thrown away."""

from __future__ import annotations

import dataclasses

import numpy as np
from fast_inference.protocol.messages import (
    Abort,
    Deliver,
    PromptLogprobs,
    RowFailed,
    StepResult,
    TopLogprobs,
)
from fast_inference.scheduler.core import Effect, Send
from fast_inference.scheduler.delivery import merge

from .fake_executor import make_info, token_at
from .harness import Harness


def top(rows: list[int], counts: list[int]) -> TopLogprobs:
    """Row j has `counts[j]` entries, whose token ids are 100 * rows[j] + i."""
    ids = [100 * row + i for row, count in zip(rows, counts, strict=True) for i in range(count)]
    return TopLogprobs(
        rows=np.array(rows, np.int32),
        counts=np.array(counts, np.int32),
        ranks=np.array(rows, np.int32) + 1,
        token_ids=np.array(ids, np.int32),
        values=-np.arange(len(ids), dtype=np.float32),
    )


def delivered(effects: list[Effect]) -> Deliver:
    for effect in effects:
        if isinstance(effect, Send) and isinstance(effect.message, Deliver):
            return effect.message
    raise AssertionError("nothing was delivered")


def test_logprobs_follow_their_tokens_when_a_row_is_dropped() -> None:
    harness = Harness()
    for key in range(3):
        harness.submit(key, [key, 1], max_tokens=9, logprobs=1)
    harness.schedule()
    harness.handle(Abort(keys=(1,)))
    result = harness.device.run(harness.queue.popleft())
    message = delivered(harness.handle(dataclasses.replace(result, logprobs=top([0, 1, 2], [1, 2, 3])), "executor"))
    assert message.logprobs is not None
    assert message.logprobs.rows.tolist() == [0, 1]
    assert message.logprobs.counts.tolist() == [1, 3]
    assert message.logprobs.ranks.tolist() == [1, 3]
    assert message.logprobs.token_ids.tolist() == [0, 200, 201, 202]


def test_a_row_that_failed_ends_with_its_message_and_the_others_go_on() -> None:
    harness = Harness()
    for key in range(3):
        harness.submit(key, [key, 1], max_tokens=9)
    harness.schedule()
    result = harness.device.run(harness.queue.popleft())
    failed = StepResult(
        number=result.number,
        slots=result.slots[[0, 2]],
        tokens=result.tokens[[0, 2]],
        logprobs=top([0, 1], [1, 1]),
        failed=(RowFailed(slot=int(result.slots[1]), message="logits are not finite"), RowFailed(slot=99, message="")),
    )
    message = delivered(harness.handle(failed, "executor"))
    assert message.logprobs is not None and message.logprobs.token_ids.tolist() == [0, 100]
    assert harness.ends[1].reason == "error"
    assert (harness.ends[1].code, harness.ends[1].message) == ("internal_error", "logits are not finite")
    harness.drain()
    for key in (0, 2):
        assert harness.tokens[key] == [token_at(key, 2 + i, 100) for i in range(9)]


def test_a_row_without_a_token_or_a_failure_ends_with_an_error() -> None:
    harness = Harness()
    for key in range(2):
        harness.submit(key, [key, 1], max_tokens=9)
    harness.schedule()
    result = harness.device.run(harness.queue.popleft())
    harness.handle(dataclasses.replace(result, slots=result.slots[:1], tokens=result.tokens[:1]), "executor")
    assert harness.ends[1].reason == "error" and "gave no token" in harness.ends[1].message
    harness.drain()
    assert harness.ends[0].reason == "length"


def test_a_step_that_was_passed_over_ends_its_rows_with_an_error() -> None:
    harness = Harness()
    harness.submit(1, [1, 2], max_tokens=9)
    harness.schedule()
    first, second = harness.queue.popleft(), harness.queue.popleft()
    harness.device.run(first)
    harness.handle(harness.device.run(second), "executor")
    assert harness.ends[1].reason == "error"
    assert "passed over step 1" in harness.logs[0].text
    assert harness.core.idle


def test_who_read_blocks_that_were_never_filled_starts_again() -> None:
    harness = Harness(make_info(num_blocks=40))
    prompt = list(range(20))
    harness.submit(1, prompt, max_tokens=5)
    harness.submit(2, [*prompt, 7], max_tokens=5)
    harness.schedule()
    first, second = harness.queue.popleft(), harness.queue.popleft()
    assert second.admit[0].cached_len == 20
    result = harness.device.run(first)
    none = np.empty(0, np.int32)
    failed = (RowFailed(slot=int(result.slots[0]), message="broken"),)
    harness.handle(StepResult(number=first.number, slots=none, tokens=none, failed=failed), "executor")
    harness.handle(harness.device.run(second), "executor")
    assert harness.ends[1].reason == "error" and harness.tokens[2] == []
    harness.drain()
    assert harness.steps[2].admit[0].cached_len == 0
    assert harness.tokens[2] == [token_at(2, 21 + i, 100) for i in range(5)]


def test_prompt_logprobs_are_passed_on_once_also_after_a_preemption() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.submit(1, list(range(8)), max_tokens=5, prompt_logprobs=0)
    harness.schedule()
    effects = []
    for positions in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]):
        result = harness.device.run(harness.queue.popleft())
        part = PromptLogprobs(slot=int(harness.steps[0].work_slots[0]), top=top(positions, [1] * len(positions)))
        stray = PromptLogprobs(slot=5, top=part.top)
        effects.append(harness.handle(dataclasses.replace(result, prompt_logprobs=(stray, part)), "executor"))
    rows = [delivered(e).prompt_logprobs[0].top.rows.tolist() for e in effects]
    assert rows == [[1, 2, 3, 4], [5, 6, 7]]


def test_columns_that_do_not_fit_one_another_are_left_out() -> None:
    harness = Harness()
    harness.submit(1, [1, 2], max_tokens=9, logprobs=1)
    harness.schedule()
    result = harness.device.run(harness.queue.popleft())
    broken = dataclasses.replace(top([0], [2]), counts=np.array([3], np.int32))
    message = delivered(harness.handle(dataclasses.replace(result, logprobs=broken), "executor"))
    assert message.logprobs is None and len(message.tokens) == 1


def test_merged_deliveries_keep_order_and_rows() -> None:
    first = Deliver(numbers=np.array([1, 2]), tokens=np.array([10, 20], np.int32), logprobs=top([1], [2]))
    second = Deliver(numbers=np.array([1]), tokens=np.array([11], np.int32), logprobs=top([0], [1]))
    both = merge(first, second)
    assert both.numbers.tolist() == [1, 2, 1] and both.tokens.tolist() == [10, 20, 11]
    assert both.logprobs is not None
    assert both.logprobs.rows.tolist() == [1, 2] and both.logprobs.token_ids.tolist() == [100, 101, 0]
    plain = Deliver(numbers=np.array([5]), tokens=np.array([1], np.int32))
    joined = merge(plain, second).logprobs
    assert joined is not None and joined.rows.tolist() == [1]
    assert merge(second, plain).logprobs is second.logprobs
