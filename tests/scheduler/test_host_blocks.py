"""The host pool's books: who holds a block there, until when, and which copies the next step carries."""

from __future__ import annotations

import pytest
from fast_inference.scheduler.blocks import BrokenInvariant
from fast_inference.scheduler.host_blocks import CACHED, HostBlocks


def test_an_evicted_block_goes_on_in_host_memory_and_is_found_by_its_hash() -> None:
    host = HostBlocks(2)
    host.keep(7, b"a")
    swaps = host.sent(1)
    assert (swaps.out_from, swaps.out_to) == ([7], [host.prefix.block_of[b"a"]])
    host.check()
    host.acknowledge(1)
    assert (host.pool.used, host.pool.cached) == (0, 1)
    host.check()


def test_what_is_in_host_memory_already_is_not_copied_again_but_kept_longer() -> None:
    host = HostBlocks(2)
    host.keep(1, b"a")
    host.keep(2, b"b")
    host.sent(1)
    host.acknowledge(1)
    host.keep(5, b"a")
    assert host.sent(2).out_from == []
    host.keep(6, b"c")
    assert set(host.prefix.block_of) == {b"a", b"c"}


def test_a_block_that_a_step_copies_to_takes_no_second_copy_before_the_step_is_acknowledged() -> None:
    host = HostBlocks(1)
    host.keep(1, b"a")
    host.keep(2, b"b")
    assert host.sent(1).out_from == [1]
    host.keep(3, b"c")
    assert host.sent(2).out_from == []
    host.acknowledge(2)
    host.keep(4, b"d")
    assert host.sent(3).out_from == [4] and b"a" not in host.prefix.block_of


def test_a_block_that_a_step_reads_is_not_overwritten_before_the_step_is_acknowledged() -> None:
    host = HostBlocks(1)
    host.save(9, 1, 4, [3])
    host.sent(1)
    host.acknowledge(1)
    blocks = host.saved[9].held
    host.pool.reference(blocks)
    host.fetch(blocks, [5])
    host.drop(9)
    host.keep(6, b"a")
    assert host.sent(2).out_from == []
    host.check()
    host.acknowledge(2)
    assert host.pool.free == 1


def test_what_a_request_saved_is_held_until_it_is_dropped() -> None:
    host = HostBlocks(4)
    host.save(9, 1, 10, [CACHED, 3, 4])
    assert host.saved[9].blocks == [CACHED, *host.saved[9].held] and host.pool.used == 2
    assert host.sent(1).out_from == [3, 4]
    host.check()
    host.drop(9)
    assert host.pool.used == 2, "the copy is under way"
    host.acknowledge(1)
    host.drop(9)
    assert host.pool.free == 4
    host.check()


def test_after_a_failed_row_nothing_that_was_copied_out_since_is_trusted() -> None:
    host = HostBlocks(8)
    host.save(1, 1, 4, [1])
    host.keep(2, b"old")
    host.sent(1)
    host.save(2, 2, 4, [3])
    host.keep(4, b"flying")
    host.sent(2)
    host.save(3, 3, 4, [5])
    host.keep(6, b"next")
    host.acknowledge(1)
    host.distrust(1)
    assert set(host.saved) == {1} and set(host.prefix.block_of) == {b"old"}
    host.check()
    host.sent(3)
    host.acknowledge(3)
    assert (host.pool.used, host.pool.cached, host.pool.free) == (1, 1, 6)
    host.check()


def test_check_finds_a_block_that_nobody_explains() -> None:
    host = HostBlocks(2)
    host.save(1, 1, 4, [1])
    del host.saved[1]
    with pytest.raises(BrokenInvariant, match="reference counts differ"):
        host.check()
