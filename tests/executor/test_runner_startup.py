"""The choices behind "auto", and a start from settings to a warm, empty runner."""

from __future__ import annotations

import logging

import fast_inference.executor.backends.cpu as cpu_backend
import fast_inference.executor.models as models
import numpy as np
import pytest
import torch
from fast_inference.executor import startup
from fast_inference.executor.backends import check
from fast_inference.executor.backends.base import KernelsUnavailable
from fast_inference.executor.startup import choose_backend, choose_device, most_tokens, start
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import StartupError
from fast_inference.protocol.messages import Admit, Step

from .tiny_model import GREEDY, LENGTH, VOCAB, TinyModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "mps", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(StartupError, match="device"):
        choose_device(EngineConfig(device=device))


def test_a_live_module_is_served_where_it_is_unless_told_otherwise() -> None:
    assert choose_device(EngineConfig(), torch.nn.Linear(2, 2)) == torch.device("cpu")
    assert choose_device(EngineConfig(device="cpu"), torch.nn.Linear(2, 2, device="meta")) == torch.device("cpu")


def test_a_step_holds_more_tokens_on_a_gpu_and_whole_prompts_where_none_are_cut() -> None:
    gpu = torch.device("cuda", 0)
    assert (most_tokens(EngineConfig(), CPU), most_tokens(EngineConfig(), gpu)) == (2048, 8192)
    assert most_tokens(EngineConfig(max_num_batched_tokens=99), gpu) == 99
    assert most_tokens(EngineConfig(enable_chunked_prefill=False, max_model_len=5000), CPU) == 5000


def test_without_a_compiler_the_torch_backend_serves_and_the_reason_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable() -> None:
        raise KernelsUnavailable("no C compiler")

    monkeypatch.setattr(cpu_backend, "CpuBackend", unavailable)
    with caplog.at_level(logging.INFO):
        assert choose_backend(EngineConfig(), CPU).name == "torch"
    assert len(caplog.records) == 1 and "no C compiler" in caplog.text
    with pytest.raises(StartupError, match="no C compiler"):
        choose_backend(EngineConfig(attention_backend="cpu"), CPU)


@pytest.mark.parametrize(("wanted", "device"), (("cpu", "cuda:0"), ("triton", "cpu")))
def test_a_backend_is_refused_on_another_device(wanted: str, device: str) -> None:
    with pytest.raises(StartupError, match=f"attention_backend {wanted} can't be used on {device}"):
        choose_backend(EngineConfig(attention_backend=wanted), torch.device(device))


def test_on_a_gpu_the_triton_kernels_serve_where_they_pass_their_check(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, chosen, dtypes = torch.device("cuda", 0), object(), []

    def make(device: torch.device, dtype: torch.dtype) -> object:
        dtypes.append(dtype)
        return chosen

    monkeypatch.setattr(check, "triton_backend", make)
    assert choose_backend(EngineConfig(), gpu) is chosen
    assert choose_backend(EngineConfig(attention_backend="triton", dtype="float32"), gpu) is chosen
    assert dtypes == [torch.bfloat16, torch.float32]
    assert choose_backend(EngineConfig(attention_backend="torch"), gpu).name == "torch"

    def refuse(*_: object) -> None:
        raise KernelsUnavailable("attention differs from torch")

    monkeypatch.setattr(check, "triton_backend", refuse)
    with caplog.at_level(logging.INFO):
        assert choose_backend(EngineConfig(), gpu).name == "torch"
    assert len(caplog.records) == 1 and "attention differs" in caplog.text
    with pytest.raises(StartupError, match="attention differs"):
        choose_backend(EngineConfig(attention_backend="triton"), gpu)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_started_engine_is_warm_empty_and_says_what_it_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = TinyModel(device)
    monkeypatch.setattr(models, "load_model", lambda *_: model)
    for name in ("freeze", "collect"):
        monkeypatch.setattr(startup.gc, name, lambda: None)
    monkeypatch.setattr(startup, "keep_freed_memory", lambda: None)
    phases: list[str] = []
    config = EngineConfig(model="tiny", device=device, attention_backend="torch", max_num_seqs=8, threads=1)
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            engine = start(config, lambda phase, *_: phases.append(phase))
            assert len(model.batches) >= 2  # prefill and decode
            assert not engine.runner.batch.occupied.any()
            assert engine.info.num_blocks == 8 * LENGTH // 16  # what eight full requests need, of far more memory
            assert (engine.info.max_model_len, engine.info.vocab_size) == (LENGTH, VOCAB)
            assert engine.info.device == ("cpu" if device == "cpu" else "cuda:0")
            assert engine.depth == (1 if device == "cpu" else 2)
            assert phases[-1] == "warming up"
            one = np.array([3], np.int32)
            admit = Admit(
                slot=3,
                token_ids=np.array([7, 8], np.int32),
                num_prompt=2,
                params=GREEDY,
                seed=0,
                block_ids=one,
                cached_len=0,
            )
            step = Step(number=1, admit=(admit,), work_slots=one, work_counts=np.array([2], np.int32))
            assert engine.runner.launch(step).finish().tokens.tolist() == model.generate([7, 8], 1)
    finally:
        torch.set_num_threads(before)


def test_a_pool_of_two_blocks_still_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_: TinyModel())
    config = EngineConfig(model="tiny", device="cpu", attention_backend="torch", num_blocks=2, block_size=1)
    with torch.inference_mode():
        engine = start(config, lambda *_: None, torch.nn.Module())
    assert engine.info.max_model_len == 2


def test_a_model_that_raises_at_once_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel()
    model.poison = 0
    monkeypatch.setattr(models, "load_model", lambda *_: model)
    config = EngineConfig(model="tiny", device="cpu", attention_backend="torch", num_blocks=16)
    with torch.inference_mode(), pytest.raises(StartupError, match=r"first step: the model raised KeyError: 'poison'"):
        start(config, lambda *_: None, torch.nn.Module())
