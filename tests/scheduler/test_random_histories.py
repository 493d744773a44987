"""Ten thousand random histories: whatever happens, nothing is lost, doubled, or computed from the wrong blocks."""

from __future__ import annotations

import pytest

from .random_histories import play

HISTORIES = 10_000
PORTIONS = 20


@pytest.mark.parametrize("portion", range(PORTIONS))
def test_in_every_random_history_all_requests_end_once_with_the_right_tokens(portion: int) -> None:
    for seed in range(portion, HISTORIES, PORTIONS):
        try:
            play(seed)
        except Exception as error:
            raise AssertionError(f"history {seed} goes wrong: play({seed}) of random_histories.py shows it") from error
