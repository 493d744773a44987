"""Blocks between the device and host memory: each arrives whole where it should, and nothing else is touched."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from fast_inference.executor import host_pool
from fast_inference.executor.host_pool import HostPool, host_blocks, staging_bytes
from fast_inference.executor.kv_cache import KVCache, KVPlan, bytes_per_block
from fast_inference.executor.models.base import ModelSpec
from fast_inference.executor.transfer import Transfer
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import EngineError, StartupError

SPEC = ModelSpec("Test", 3, 2, 8, 100, 1024, torch.bfloat16)
SIZE = 4
BLOCK = bytes_per_block(SPEC, SIZE)
DEVICES = ["cpu", "bus", pytest.param("cuda", marks=pytest.mark.gpu)]


class Bus(Transfer):
    """Takes the way of a GPU, whose memory is another, with main memory on both ends."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.shared = False

    def up(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(array.copy()) for array in arrays]


@pytest.fixture(autouse=True)
def nothing_to_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(host_pool, "_pin", lambda memory: None)
        monkeypatch.setattr(host_pool, "_unpin", lambda memory: None)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def make_pool(device: str, blocks: int = 12, host: int = 16) -> tuple[KVCache, HostPool]:
    """Device blocks with random contents."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    place = torch.device("cuda" if device == "cuda" else "cpu")
    kv = KVCache(SPEC, KVPlan(blocks, 64, BLOCK), SIZE, place)
    kv.blocks.copy_(torch.randn(kv.blocks.shape, generator=torch.Generator().manual_seed(3)))
    return kv, HostPool(kv, host, Bus() if device == "bus" else Transfer(place))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("staging", [64 << 20, 2 * BLOCK])
def test_blocks_go_out_and_come_back_to_other_places(
    device: str, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_pool, "STAGING_BYTES", staging)
    kv, pool = make_pool(device)
    before = kv.blocks.clone()
    pool.swap_out(ids(3, 9, 4, 0, 7), ids(5, 6, 7, 15, 0))
    kv.blocks.zero_()
    pool.swap_in(ids(6, 7, 0, 15), ids(1, 0, 2, 11))
    expected = torch.zeros_like(before)
    expected[:, :, [1, 0, 2, 11]] = before[:, :, [9, 4, 7, 0]]
    assert torch.equal(kv.blocks, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_that_is_copied_out_twice_holds_the_later_content(device: str) -> None:
    kv, pool = make_pool(device)
    pool.swap_out(ids(3), ids(5))
    pool.swap_out(ids(4), ids(5))
    pool.swap_in(ids(5), ids(0))
    assert torch.equal(kv.blocks[:, :, 0], kv.blocks[:, :, 4])


def test_neighbours_travel_in_one_piece() -> None:
    assert host_pool._runs(ids(4, 5, 6, 2, 1, 8, 9)) == [(0, 4, 3), (3, 2, 1), (4, 1, 1), (5, 8, 2)]
    assert host_pool._runs(ids(0)) == [(0, 0, 1)]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (ids(12), ids(0), r"device block ids must be in \[0, 12\), got 12..12"),
        (ids(0, 1), ids(-1, 3), r"host block ids must be in \[0, 16\), got -1..3"),
        (ids(0, 1), ids(3), "2 blocks of the device and 1 of the host"),
    ],
)
def test_ids_that_are_no_blocks_are_refused(source: np.ndarray, target: np.ndarray, message: str) -> None:
    _, pool = make_pool("cpu")
    with pytest.raises(EngineError, match=message):
        pool.swap_out(source, target)


def test_a_size_in_gib_becomes_whole_blocks() -> None:
    plan = KVPlan(10, 64, BLOCK)
    assert host_blocks(EngineConfig(), plan) == 0 == staging_bytes(EngineConfig())
    config = EngineConfig(kv_offloading_size=(7.5 * BLOCK) / 2**30)
    assert host_blocks(config, plan) == 7
    assert staging_bytes(config) == 2 * host_pool.STAGING_BYTES


def test_less_than_a_block_and_more_than_the_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pool, "machine_memory", lambda: 2**30)
    for size in (0.5 * BLOCK / 2**30, 1.1):
        with pytest.raises(StartupError, match=f"between one block of {BLOCK} bytes and the {2**30} bytes"):
            host_blocks(EngineConfig(kv_offloading_size=size), KVPlan(10, 64, BLOCK))


def test_a_model_without_a_kv_cache_has_nothing_to_move(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert host_blocks(EngineConfig(kv_offloading_size=1.0), KVPlan(8, 64, 0)) == 0
    assert "kv_offloading_size is of no use" in caplog.text


def test_memory_that_is_not_there_is_refused() -> None:
    kv, _ = make_pool("cpu")
    with pytest.raises(StartupError, match="lower kv_offloading_size"):
        HostPool(kv, 2**45, Transfer(torch.device("cpu")))
