"""Calibrations: a fit finds the costs that made the steps; a file that can't be one says which field is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.simulator.costs import BUILT_IN, H200_LLAMA_8B, TERMS, MeasuredStep, calibration, fitted
from hypothesis import given, settings
from hypothesis import strategies as st

cost = st.floats(1e-9, 1e-2)


def steps_of(
    base: float, per_token: float, per_row: float, per_context: float, noise: float = 0.0
) -> list[MeasuredStep]:
    rng = np.random.default_rng(3)
    steps = []
    for number in range(200):
        prefill = int(rng.integers(1, 2000)) if number % 4 == 0 else 0
        rows = int(rng.integers(0 if prefill else 1, 200))
        context = prefill + int(rng.integers(0, 1000)) * rows
        seconds = base + per_token * prefill + per_row * rows + per_context * context
        steps.append(MeasuredStep(prefill, rows, context, seconds * (1 + noise * float(rng.normal()))))
    return steps


@settings(max_examples=40, deadline=None)
@given(base=cost, per_token=cost, per_row=cost, per_context=cost)
def test_a_fit_finds_the_costs_that_made_the_steps(
    base: float, per_token: float, per_row: float, per_context: float
) -> None:
    found = fitted(steps_of(base, per_token, per_row, per_context), name="fit")
    for step in steps_of(base, per_token, per_row, per_context):
        assert found.seconds(step.prefill_tokens, step.rows, step.context) == pytest.approx(step.seconds, rel=1e-3)


def test_a_fit_of_noisy_steps_is_near_and_has_no_negative_cost() -> None:
    found = fitted(steps_of(0.02, 1e-4, 1e-3, 0.0, noise=0.1), name="fit")
    assert found.base == pytest.approx(0.02, rel=0.3)
    assert found.per_token == pytest.approx(1e-4, rel=0.2)
    assert found.per_row == pytest.approx(1e-3, rel=0.2)
    assert min(getattr(found, term) for term in TERMS) >= 0


def test_all_steps_together_take_as_long_as_they_did() -> None:
    steps = steps_of(0.02, 1e-4, 1e-3, 1e-6)
    hiccups = [
        dataclasses.replace(step, seconds=3 * step.seconds) if n % 10 == 0 else step for n, step in enumerate(steps)
    ]
    found = fitted(hiccups, name="fit")
    foretold = sum(found.seconds(step.prefill_tokens, step.rows, step.context) for step in hiccups)
    assert foretold == pytest.approx(sum(step.seconds for step in hiccups))


def test_too_few_steps_are_refused_with_their_number() -> None:
    with pytest.raises(InvalidRequest, match="steps must be at least 8, got 3"):
        fitted(steps_of(1, 1, 1, 1)[:3], name="few")


def test_the_built_in_calibration_tells_what_it_is_derived_from() -> None:
    device = calibration("h200-llama-8b")
    assert device is H200_LLAMA_8B and set(BUILT_IN) == {"h200-llama-8b"}
    for rows, milliseconds in ((1, 3.95), (32, 4.78), (128, 7.03), (256, 11.55)):
        assert device.seconds(0, rows, rows * 560) == pytest.approx(milliseconds / 1e3, rel=0.1)
    assert 8192 / device.seconds(8192, 0, 8192) == pytest.approx(41_604, rel=0.03)


def test_a_file_holds_costs_or_steps(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(H200_LLAMA_8B.to_json())
    assert calibration(str(file)) == H200_LLAMA_8B
    steps = [[s.prefill_tokens, s.rows, s.context, s.seconds] for s in steps_of(0.01, 1e-4, 1e-3, 1e-6)]
    file.write_text(json.dumps({"steps": steps, "gap": 0.001, "num_blocks": 99}))
    found = calibration(str(file))
    assert (found.name, found.gap, found.num_blocks) == ("mine.json", 0.001, 99)
    assert found.per_row == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object, got list"),
        ('{"base": 1, "per_token": 1, "per_row": 1}', "per_context is missing"),
        ('{"base": -1, "per_token": 1, "per_row": 1, "per_context": 1}', "base must be a number of 0 or more, got -1"),
        ('{"base": 1, "speed": 3}', "unknown field 'speed'"),
        ('{"steps": [[1, 2]]}', r"steps\[0\] must be \[prefill_tokens, rows, context, seconds\], got \[1, 2\]"),
    ],
)
def test_a_file_that_is_no_calibration_says_why(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        calibration(str(file))


def test_a_name_that_is_none_is_answered_with_those_that_are() -> None:
    with pytest.raises(InvalidRequest, match="calibrate must be h200-llama-8b, a JSON file or a journal; got 'a100'"):
        calibration("a100")
