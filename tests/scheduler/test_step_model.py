"""What the step model learns from steps that are handed in. No clock: every time is made up here."""

from __future__ import annotations

import random

import pytest
from fast_inference.scheduler.step_model import LEAST_STEPS, UNBOUNDED, StepModel
from hypothesis import given, settings
from hypothesis import strategies as st

BASE, PER_TOKEN, PER_ROW, PER_CONTEXT = 4e-3, 2.5e-5, 3e-5, 8e-8


def cost(prefill: int, rows: int, context: int) -> float:
    return BASE + PER_TOKEN * prefill + PER_ROW * rows + PER_CONTEXT * context


def step_of(draw: random.Random) -> tuple[int, int, int]:
    prefill = draw.choice([0, 0, 64, 512, 2048])
    rows = draw.randrange(1, 257)
    return prefill, rows, prefill + rows * draw.randrange(10, 2000)


def fed(steps: int, *, noise: float = 0.0, spikes: float = 0.0, seed: int = 0) -> StepModel:
    draw, model = random.Random(seed), StepModel()
    for _ in range(steps):
        step = step_of(draw)
        seconds = cost(*step) * (1 + noise * draw.uniform(-1, 1))
        model.observe(*step, seconds * (50 if draw.random() < spikes else 1))
    return model


def test_it_says_nothing_before_it_has_seen_enough() -> None:
    model = fed(LEAST_STEPS - 1)
    assert model.seconds(0, 1, 100) is None and model.prefill_rate is None
    assert model.largest_prefill(1.0, 1, 100) is None


def test_it_says_nothing_of_prompts_while_it_has_only_seen_decoding() -> None:
    model = StepModel()
    for rows in range(1, 100):
        model.observe(0, rows, rows * 100, cost(0, rows, rows * 100))
    assert model.seconds(0, 10, 1000) == pytest.approx(cost(0, 10, 1000), rel=1e-3)
    assert model.seconds(100, 10, 1000) is None and model.prefill_rate is None


def test_it_finds_the_costs_that_the_steps_were_made_of() -> None:
    model = fed(300)
    for step in ((0, 1, 50), (0, 256, 200_000), (512, 30, 20_000), (2048, 0, 2048)):
        assert model.seconds(*step) == pytest.approx(cost(*step), rel=1e-3)
    assert model.prefill_rate == pytest.approx(1 / (PER_TOKEN + PER_CONTEXT), rel=1e-3)


def test_noise_and_slow_outliers_move_it_little() -> None:
    model = fed(400, noise=0.1, spikes=0.02)
    for step in ((0, 64, 50_000), (512, 30, 20_000), (2048, 100, 50_000)):
        assert model.seconds(*step) == pytest.approx(cost(*step), rel=0.15)


def test_a_step_that_failed_at_once_does_not_spoil_it() -> None:
    model = fed(200)
    assert model.seconds(512, 30, 20_000) is not None
    model.observe(2048, 10, 4000, 1e-9)
    for _ in range(16):
        model.observe(0, 10, 1000, cost(0, 10, 1000))
    assert model.seconds(512, 30, 20_000) == pytest.approx(cost(512, 30, 20_000), rel=0.1)


def test_a_long_time_of_decoding_does_not_wash_out_what_a_prompt_costs() -> None:
    model = fed(200)
    for i in range(5000):
        model.observe(0, 32, 32 * (100 + i % 500), cost(0, 32, 32 * (100 + i % 500)))
    assert model.seconds(1024, 32, 20_000) == pytest.approx(cost(1024, 32, 20_000), rel=0.05)


def test_it_follows_a_machine_that_has_become_slower() -> None:
    model, draw = fed(400), random.Random(5)
    for _ in range(1500):
        step = step_of(draw)
        model.observe(*step, 3 * cost(*step))
    assert model.seconds(512, 30, 20_000) == pytest.approx(3 * cost(512, 30, 20_000), rel=0.05)


def test_the_largest_prefill_just_keeps_the_bound() -> None:
    model = fed(300)
    tokens = model.largest_prefill(0.030, 64, 50_000)
    assert tokens is not None and 0 < tokens < UNBOUNDED
    at, beyond = model.seconds(tokens, 64, 50_000 + tokens), model.seconds(tokens + 1, 64, 50_001 + tokens)
    assert at is not None and beyond is not None and at <= 0.030 < beyond
    assert model.largest_prefill(0.001, 64, 50_000) == 0


def test_prompts_that_cost_next_to_nothing_set_no_limit_that_matters() -> None:
    model = StepModel()
    for i in range(50):
        model.observe(100 * (i % 3), 4, 100 * (i % 3) + 4, 0.01)
    tokens = model.largest_prefill(0.02, 4, 4)
    assert tokens is not None and 1_000_000 < tokens <= UNBOUNDED


steps = st.tuples(
    st.integers(0, 8192), st.integers(0, 1024), st.integers(0, 2_000_000), st.floats(0, 100, allow_nan=False)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=120))
def test_whatever_it_sees_its_answers_are_never_negative_and_grow_with_the_work(
    seen: list[tuple[int, int, int, float]],
) -> None:
    model, twin = StepModel(), StepModel()
    for step in seen:
        model.observe(*step)
        twin.observe(*step)
    small, large = model.seconds(0, 1, 10), model.seconds(0, 2, 20)
    assert small == twin.seconds(0, 1, 10)
    if small is not None and large is not None:
        assert 0.0 <= small <= large
