"""The actors' names."""

from __future__ import annotations

import pytest
from fast_inference.protocol import names


def test_each_frontend_has_a_detokenizer_of_its_number() -> None:
    assert names.actors(1) == ("scheduler", "executor", "detokenizer", "frontend-0")
    assert names.actors(2) == ("scheduler", "executor", "detokenizer", "detokenizer-1", "frontend-0", "frontend-1")
    for index in (0, 1, 63):
        assert names.index_of(names.frontend(index)) == names.index_of(names.detokenizer(index)) == index


@pytest.mark.parametrize("name", ["", "client", "client-", "client-a", "client-1-2", "client-²", "-"])
def test_a_name_without_a_number_is_the_first_of_its_kind(name: str) -> None:
    assert names.index_of(name) == 0
