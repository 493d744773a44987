"""The block pool and the prefix index: order of reuse, reference counts, and books that balance."""

from __future__ import annotations

import numpy as np
import pytest
from fast_inference.scheduler.blocks import BlockPool, BrokenInvariant
from fast_inference.scheduler.prefix import PrefixIndex, extend_hashes
from hypothesis import given, settings
from hypothesis import strategies as st


def hashes_of(tokens: list[int], block_size: int = 4, salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, np.array(tokens, np.int32), block_size, salt)
    return hashes


def make_pool(blocks: int = 4) -> BlockPool:
    return BlockPool(blocks, PrefixIndex())


def test_only_full_blocks_have_a_hash_and_each_covers_all_before_it() -> None:
    first, second = hashes_of([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert hashes_of([1, 2, 3, 4]) == [first]
    assert hashes_of([0, 2, 3, 4, 5, 6, 7, 8])[1] != second
    assert len(first) == 16


def test_hashes_extended_piece_by_piece_are_those_of_the_whole() -> None:
    tokens = np.arange(23, dtype=np.int32)
    hashes: list[bytes] = []
    for stop in range(24):
        extend_hashes(hashes, tokens[:stop], 4, "salt")
    assert hashes == hashes_of(list(range(23)), salt="salt")


def test_another_salt_shares_no_block() -> None:
    assert not set(hashes_of([1] * 8)) & set(hashes_of([1] * 8, salt="tenant"))


def test_a_free_block_is_taken_before_a_cached_one_is_evicted() -> None:
    pool = make_pool()
    blocks = pool.allocate(2)
    pool.prefix.register([b"a"], blocks[:1])
    pool.release(blocks)
    assert (pool.free, pool.cached, pool.used) == (3, 1, 0)
    taken = pool.allocate(3)
    assert blocks[0] not in taken and pool.prefix.lookup([b"a"]) == [blocks[0]]
    assert pool.allocate(1) == [blocks[0]]
    assert pool.prefix.lookup([b"a"]) == []


def test_the_least_recently_used_is_evicted_first_and_of_one_table_its_tail() -> None:
    pool = make_pool()
    old, new = pool.allocate(2), pool.allocate(2)
    pool.prefix.register([b"a", b"b"], old)
    pool.prefix.register([b"c", b"d"], new)
    pool.release(old)
    pool.release(new)
    pool.reference(old[:1])
    pool.release(old[:1])
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], new[1], new[0], old[0]]


def test_a_block_is_free_only_when_its_last_reader_left() -> None:
    pool = make_pool()
    blocks = pool.allocate(1)
    pool.prefix.register([b"a"], blocks)
    pool.reference(blocks)
    pool.release(blocks)
    assert pool.used == 1
    pool.release(blocks)
    assert pool.used == 0 and pool.cached == 1


def test_hits_that_are_cached_count_against_what_is_available() -> None:
    pool = make_pool()
    blocks = pool.allocate(1)
    pool.prefix.register([b"a"], blocks)
    pool.release(blocks)
    assert pool.can_allocate(3, blocks) and not pool.can_allocate(4, blocks)
    with pytest.raises(BrokenInvariant, match="5 blocks wanted, 4 available"):
        pool.allocate(5)


def test_the_first_block_with_a_content_serves_its_hits() -> None:
    index = PrefixIndex()
    index.register([b"a"], [1])
    index.register([b"a"], [2])
    assert index.lookup([b"a", b"b"]) == [1]
    index.forget(2)
    index.forget(1)
    assert index.lookup([b"a"]) == []


def test_check_finds_a_reference_that_no_table_explains() -> None:
    pool = make_pool()
    blocks = pool.allocate(2)
    pool.check([blocks])
    with pytest.raises(BrokenInvariant, match="reference counts differ"):
        pool.check([blocks[:1]])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_random_operations_leave_the_books_balanced(operations: list[tuple[int, int]]) -> None:
    pool = make_pool(8)
    tables: list[list[int]] = []
    for kind, amount in operations:
        if kind == 0 and pool.can_allocate(amount):
            tables.append(pool.allocate(amount))
        elif kind == 1 and tables:
            pool.release(tables.pop(amount % len(tables)))
        elif kind == 2 and tables:
            table = tables[amount % len(tables)]
            pool.prefix.register([bytes([amount, i]) for i in range(len(table))], table)
        elif kind == 3:
            hits = pool.prefix.lookup([bytes([amount, i]) for i in range(3)])
            if pool.can_allocate(1, hits):
                pool.reference(hits)
                tables.append(hits + pool.allocate(1))
        pool.check(tables)
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.available == 8
