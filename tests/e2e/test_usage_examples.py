"""The calls of the original usage examples, exactly as they stand there: only model, tokenizer and config filled in."""

from collections.abc import Iterator
from typing import Any

import pytest
from fast_inference.core.engine.vllm_style_engine import (
    SamplingParams,
    SchedulerPolicy,
    create_vllm_style_engine,
)

from .conftest import make_model
from .engine_process import run_dirs_here

# Tests of one module in one process: each engine's executor of a live model runs on a thread here.


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return tiny_tokenizer


@pytest.fixture
def config(model: Any) -> Any:
    return model.config


@pytest.fixture
def engines() -> Iterator[list[Any]]:
    """Engines to shut down after the test; nothing of them may be left."""
    made: list[Any] = []
    yield made
    for engine in made:
        engine.shutdown()
    assert not run_dirs_here()


async def test_streaming_and_metrics(
    model: Any, tokenizer: Any, config: Any, engines: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = create_vllm_style_engine(
        model=model,
        tokenizer=tokenizer,
        config=config,
        num_blocks=1000,
        block_size=128,
        scheduler_policy=SchedulerPolicy.PRIORITY,
    )
    engines.append(engine)
    async for token in engine.generate_async("Hello, world!"):
        print(token, end="", flush=True)
    assert capsys.readouterr().out

    metrics = engine.get_metrics()
    assert metrics["throughput_tokens_per_sec"] > 0
    assert 0 <= metrics["memory_stats"]["utilization"] <= 1
    assert 0 <= engine.kv_cache.get_memory_stats()["fragmentation"] <= 1
    assert engine.kv_cache.get_memory_stats()["num_blocks"] == 1000


async def test_the_vip_is_served_first_when_both_wait(
    model: Any, tokenizer: Any, config: Any, engines: list[Any]
) -> None:
    engine = create_vllm_style_engine(
        model=model,
        tokenizer=tokenizer,
        config=config,
        num_blocks=1000,
        block_size=128,
        scheduler_policy=SchedulerPolicy.PRIORITY,
        max_num_seqs=1,
    )
    engines.append(engine)
    busy = await engine.add_request("busy", SamplingParams(max_tokens=300, ignore_eos=True), priority=99)
    sampling_params = SamplingParams(max_tokens=8, ignore_eos=True)
    normal = await engine.add_request("Normal prompt", sampling_params, priority=1)
    vip = await engine.add_request("VIP prompt", sampling_params, priority=10)
    assert not busy.done(), "the two must have waited"
    first, second = (await vip).metrics, (await normal).metrics
    assert first.finished_time < second.first_scheduled_time
    assert "".join([text async for text in vip]) == (await vip).outputs[0].text
    assert (await busy).outputs[0].finish_reason == "length"


async def test_memory_aware(model: Any, tokenizer: Any, config: Any, engines: list[Any]) -> None:
    engine = create_vllm_style_engine(model, tokenizer, config, scheduler_policy=SchedulerPolicy.MEMORY_AWARE)
    engines.append(engine)
    metrics = engine.get_metrics()
    assert metrics["throughput_tokens_per_sec"] == 0
    assert metrics["memory_stats"]["utilization"] == 0
    assert engine.kv_cache.get_memory_stats()["fragmentation"] == 0


def test_without_an_event_loop(tiny_folder: str, engines: list[Any]) -> None:
    engine = create_vllm_style_engine(tiny_folder, num_blocks=100)
    engines.append(engine)
    assert engine.get_metrics()["memory_stats"]["num_blocks"] == 100


async def test_a_request_that_can_not_be_is_refused_at_once(tiny_folder: str, engines: list[Any]) -> None:
    from fast_inference import EngineError

    engine = create_vllm_style_engine(tiny_folder, num_blocks=100)
    engines.append(engine)
    with pytest.raises(EngineError):
        await engine.add_request([99_999])
    with pytest.raises(EngineError):
        async for _ in engine.generate_async([99_999]):
            pass
