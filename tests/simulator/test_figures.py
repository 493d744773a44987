"""Figures: percentiles of gaps, fairness, service while two clients both wait."""

from __future__ import annotations

import numpy as np
import pytest
from fast_inference.simulator.figures import Gaps, Shares, jain_index
from fast_inference.simulator.workload import Workload
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=200), st.sampled_from([50, 90, 99]))
def test_percentiles_of_gaps_are_right_within_a_bin(gaps: list[float], percent: int) -> None:
    histogram = Gaps()
    for part in np.array_split(np.array(gaps), 3):
        histogram.add(part)
    histogram.add(np.array([np.nan]))
    histogram.flush()
    exact = np.percentile(gaps, percent, method="inverted_cdf")
    assert histogram.percentile(percent) == pytest.approx(exact, rel=0.011)
    assert histogram.mean() == pytest.approx(np.mean(gaps))


def test_jain_index_is_one_for_equal_shares_and_one_in_n_for_one_winner() -> None:
    assert jain_index(np.array([5.0, 5.0, 5.0])) == pytest.approx(1.0)
    assert jain_index(np.array([9.0, 0.0, 0.0])) == pytest.approx(1 / 3)
    assert jain_index(np.zeros(3)) == 1.0


def shares(*clients: int) -> Shares:
    count = len(clients)
    return Shares(
        Workload(
            arrival=np.zeros(count),
            prompt=np.full(count, 10, np.int64),
            output=np.full(count, 5, np.int64),
            client=np.array(clients, np.int64),
            deadline=np.full(count, np.inf),
        )
    )


def test_a_difference_counts_only_while_both_clients_wait() -> None:
    books = shares(0, 0, 0, 1, 1)
    books.arrived(0)
    books.spoken(np.array([0]))  # client 0 alone: 12 of service, nobody of client 1 waits
    assert books.service.tolist() == [12.0, 0.0] and books.largest_gap == 0.0
    for index in (1, 2, 3, 4):
        books.arrived(index)
    books.spoken(np.array([1]))  # both wait from here on: 12 ahead since then
    assert books.largest_gap == 12.0
    books.spoken(np.array([3]))
    assert books.service.tolist() == [24.0, 12.0] and books.largest_gap == 12.0
    assert books.contended.tolist() == [12.0, 12.0]


def test_a_refused_request_is_no_longer_waited_for() -> None:
    books = shares(0, 1, 1)
    for index in range(3):
        books.arrived(index)
    books.refused(0)
    books.spoken(np.array([1]))
    assert books.largest_gap == 0.0
