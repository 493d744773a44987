"""What the recorder asks of CUDA and in what order, with a double in its place; and a GPU's memory plan likewise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fast_inference.executor import startup
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.graph_recorder import WARM_UPS, Recorder
from fast_inference.executor.kv_cache import bytes_per_block
from fast_inference.executor.transfer import Transfer
from fast_inference.protocol.config import EngineConfig

from .tiny_model import LENGTH, TinyModel


class Cuda:
    """Stands in for the functions of `torch.cuda` that a recorder calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.pools: list[object] = []
        for name in ("Stream", "CUDAGraph", "graph_pool_handle", "current_stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device: torch.device) -> Cuda:
        return self

    def CUDAGraph(self) -> Cuda:
        return self

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self) -> str:
        return "current"

    def wait_stream(self, stream: str) -> None:
        self.calls.append(f"wait for {stream}")

    @contextmanager
    def stream(self, stream: Cuda) -> Iterator[None]:
        self.calls.append("side stream")
        yield

    @contextmanager
    def graph(self, graph: Cuda, pool: object, stream: Cuda, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        self.calls.append(f"capture {capture_error_mode}")
        yield
        self.calls.append("end of capture")

    def replay(self) -> None:
        self.calls.append("replay")


def test_work_is_warmed_up_beside_the_current_stream_captured_once_and_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch)
    recorder = Recorder(torch.device("cuda"))
    result = torch.ones(1)

    def work() -> torch.Tensor:
        cuda.calls.append("work")
        return result

    replay = recorder.record(work)
    assert cuda.calls == [
        "wait for current",
        "side stream",
        *["work"] * WARM_UPS,
        "capture thread_local",
        "work",
        "end of capture",
    ]
    cuda.calls.clear()
    assert replay() is result and replay() is result
    assert cuda.calls == ["replay", "replay"]
    recorder.record(work)
    assert cuda.pools == ["pool", "pool"]  # one scratch memory for all


def test_a_gpus_plan_leaves_room_for_the_largest_step_the_recordings_and_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, other, peak, each = 1 << 30, 1 << 28, 1 << 20, 1 << 16
    recorded = [0]
    record = Recorder.record

    def recording(self: Recorder, work: Any) -> Any:
        recorded[0] += 1
        return record(self, work)

    monkeypatch.setattr(Recorder, "record", recording)
    doubles = {
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: peak,
        "memory_reserved": lambda device: 0,
        "mem_get_info": lambda device: (total - other - each * recorded[0], total),
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    config = EngineConfig(
        model="tiny", max_num_seqs=4, max_num_batched_tokens=2048, gpu_memory_utilization=0.5, block_size=16
    )
    model, transfer = TinyModel(), Transfer(torch.device("cpu"))
    with torch.inference_mode():
        plain = startup._gpu_budget(config, model, TorchBackend(), transfer, graphs=False)
        assert recorded == [0]
        with_graphs = startup._gpu_budget(config, model, TorchBackend(), transfer, graphs=True)
    rows = 4 * (LENGTH + 1 + LENGTH // 16) * 4
    assert plain == total // 2 - other - peak - rows - bytes_per_block(model.spec, 16)
    # 1, 2 and 4 rows, three ways to choose, and 16 to 256 tokens, 7 sizes, two ways: 23, of which 10 were made, which
    # here are not given back.
    assert recorded == [10]
    assert plain - with_graphs == (10 + 23) * each
