"""How much memory the keys and values get, and how many cores there are: arithmetic on made-up machines."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from fast_inference.executor import kv_cache, threads
from fast_inference.executor.cgroup import cpu_quota, memory_left, memory_limit
from fast_inference.executor.kv_cache import KVCache, KVPlan, bytes_per_block, cpu_budget, plan_kv
from fast_inference.executor.models.base import ModelSpec
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import StartupError

SPEC = ModelSpec("Test", 2, 3, 8, 100, 1024, torch.bfloat16)
BLOCK = 2 * 2 * 3 * 8 * 16 * 2  # keys and values, layers, heads, size, tokens, bytes


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    assert bytes_per_block(SPEC, 16) == BLOCK


def test_a_budget_becomes_as_many_blocks_as_fit() -> None:
    assert plan_kv(EngineConfig(), SPEC, 100 * BLOCK + 5, "kv_cache_memory") == KVPlan(100, 1024, BLOCK)


def test_no_more_blocks_than_the_slots_can_use() -> None:
    config = EngineConfig(max_num_seqs=3, max_model_len=33)
    assert plan_kv(config, SPEC, 10**9, "kv_cache_memory").num_blocks == 9


def test_num_blocks_is_taken_as_it_is() -> None:
    assert plan_kv(EngineConfig(num_blocks=70), SPEC, 0, "").num_blocks == 70


def test_a_small_pool_lowers_the_length_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = plan_kv(EngineConfig(), SPEC, 10 * BLOCK, "kv_cache_memory")
    assert plan.max_model_len == 160
    assert len(caplog.records) == 1 and "from 1024 to 160" in caplog.text


@pytest.mark.parametrize(
    ("config", "budget", "message"),
    [
        (EngineConfig(max_model_len=2000), 0, "max_model_len is 2000, but this model takes at most 1024"),
        (EngineConfig(max_model_len=161), 10 * BLOCK, "raise kv_cache_memory or lower max_model_len to 160"),
        (EngineConfig(max_model_len=161, num_blocks=10), 0, "raise num_blocks or lower max_model_len to 160"),
        (EngineConfig(), BLOCK - 1, "room for 0 blocks"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(config: EngineConfig, budget: int, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        plan_kv(config, SPEC, budget, "kv_cache_memory")


def test_a_model_without_keys_needs_no_memory() -> None:
    spec = ModelSpec("Whole", 0, 0, 0, 100, 64, torch.float32, recompute=True)
    plan = plan_kv(EngineConfig(max_num_seqs=2), spec, 0, "num_blocks")
    assert plan == KVPlan(8, 64, 0)
    assert KVCache(spec, plan, 16, torch.device("cpu")).layers == []


def test_the_tensors_are_zero_apart_and_have_one_block_that_is_nobodys() -> None:
    cache = KVCache(SPEC, KVPlan(5, 64, BLOCK), 16, torch.device("cpu"))
    assert len(cache.layers) == 2
    assert cache.layers[0].keys.shape == (5 + 1, 3, 16, 8) and cache.layers[0].keys.dtype is torch.bfloat16
    assert not any(bool(t.any()) for layer in cache.layers for t in (layer.keys, layer.values))
    cache.layers[0].values[1] = 7
    cache.copy_blocks(torch.tensor([1]), torch.tensor([4]))
    assert bool((cache.layers[0].values[4] == 7).all())
    assert not bool(cache.layers[0].keys.any()) and not bool(cache.layers[1].values.any())


def test_memory_that_is_not_there_is_refused() -> None:
    with pytest.raises(StartupError, match="lower num_blocks"):
        KVCache(SPEC, KVPlan(2**45, 64, BLOCK), 16, torch.device("cpu"))


def test_a_quarter_of_what_is_free_in_machine_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "memory_left", lambda: 4000)
    monkeypatch.setattr(kv_cache, "memory_limit", lambda: 10_000)
    assert cpu_budget(EngineConfig()) == 1000
    assert cpu_budget(EngineConfig(kv_cache_memory=9_000)) == 9_000
    with pytest.raises(StartupError, match="kv_cache_memory is 10001 bytes, but there are 10000"):
        cpu_budget(EngineConfig(kv_cache_memory=10_001))


# ---- control groups ------------------------------------------------------------------------------------------------


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_tightest_enclosing_group_of_version_2_counts(tmp_path: Path) -> None:
    member = tmp_path / "cgroup"
    member.write_text("0::/a/b\n")
    group(tmp_path / "fs", cpu__max="max 100000")
    group(tmp_path / "fs/a", cpu__max="250000 100000", memory__max="1000", memory__current="600")
    group(tmp_path / "fs/a", memory__stat="anon 3\ninactive_file 100\n")
    group(tmp_path / "fs/a/b", cpu__max="800000 100000", memory__max="max", memory__current="6")
    assert cpu_quota(member, tmp_path / "fs") == 2.5
    assert memory_limit(member, tmp_path / "fs") == 1000
    assert memory_left(member, tmp_path / "fs") == 500


def test_version_1_has_one_tree_for_each_controller(tmp_path: Path) -> None:
    member = tmp_path / "cgroup"
    member.write_text("4:memory:/x\n1:cpu,cpuacct:/host/path\n")
    group(tmp_path / "fs/cpu,cpuacct", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(tmp_path / "fs/memory/x", memory__limit_in_bytes="800", memory__usage_in_bytes="900")
    group(tmp_path / "fs/memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="5000")
    assert cpu_quota(member, tmp_path / "fs") == 0.5
    assert memory_left(member, tmp_path / "fs") == 0


def test_no_group_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) is None
    assert memory_limit(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.5, 3), (2.4, 2), (0.2, 1), (64.0, 8)])
def test_cores_are_those_of_the_mask_cut_to_the_quota(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert threads.usable_cores() == cores
