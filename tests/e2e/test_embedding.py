"""Engines inside a program: `AsyncEngine` and `LLM`, with models and tokenizers as names and as live objects."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
from fast_inference import (
    LLM,
    AsyncClient,
    AsyncEngine,
    EngineDead,
    InvalidRequest,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

from .conftest import make_model
from .engine_process import run_dirs_here

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SMALL: dict[str, Any] = {"num_blocks": 128, "max_num_seqs": 8}


class LetterTokenizer:
    """The least that a tokenizer can be: no Hugging Face in it."""

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(max(0, token - 3) % 256 for token in ids).decode(errors="replace")


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    """The last of a request's outputs."""
    return [output async for output in outputs][-1]


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    yield
    assert not run_dirs_here()


async def test_an_async_engine_streams_aborts_and_counts(tiny_folder: str) -> None:
    async with AsyncEngine(tiny_folder, **SMALL) as engine:
        outputs = [output async for output in engine.generate("hello", GREEDY)]
        assert outputs[-1].finished and len(outputs[-1].outputs[0].token_ids) == 6
        deltas = GREEDY.replace(output_kind=RequestOutputKind.DELTA)
        pieces = [o.outputs[0].text async for o in engine.chat([{"role": "user", "content": "hello"}], deltas)]
        assert len("".join(pieces)) > 0

        endless = SamplingParams(max_tokens=1500, ignore_eos=True)
        async for output in engine.generate("hello", endless, request_id="endless"):
            if not output.finished:
                await engine.abort("endless")
        assert output.outputs[0].finish_reason == "abort"
        assert engine.info.num_blocks == 128
        await blocks_come_back(engine)
        async with AsyncClient(engine.endpoint) as client:
            assert (await last(client.generate([5, 6, 7], GREEDY))).finished
        assert not engine.errored
    with pytest.raises(EngineDead):
        await engine.get_stats()


async def blocks_come_back(engine: AsyncEngine) -> None:
    """The step that was under way at the abort still names its blocks; once it is back they are free."""
    deadline = time.monotonic() + 5.0
    while (await engine.get_stats()).used_blocks:
        assert time.monotonic() < deadline, "blocks of an aborted request did not come back"
        await asyncio.sleep(0.01)


async def test_requests_under_way_fail_when_an_actor_dies(tiny_folder: str) -> None:
    async with AsyncEngine(tiny_folder, **SMALL) as engine:
        scheduler = next(p for p in psutil.Process().children() if "scheduler" in " ".join(p.cmdline()))
        with pytest.raises(EngineDead, match="scheduler was killed by SIGKILL"):
            async for _ in engine.generate("hello", SamplingParams(max_tokens=1500, ignore_eos=True)):
                if scheduler.is_running():
                    scheduler.send_signal(signal.SIGKILL)
        assert engine.errored
        with pytest.raises(EngineDead, match="scheduler"):
            await engine.get_stats()


async def test_a_start_that_is_cancelled_leaves_nothing(tiny_folder: str) -> None:
    before = set(psutil.Process().children())
    engine = AsyncEngine(tiny_folder, **SMALL)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.5)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert set(psutil.Process().children()) <= before


def test_an_llm_takes_prompts_of_every_kind_in_order(tiny_folder: str) -> None:
    with LLM(tiny_folder, **SMALL) as llm:
        prompts = ["hello", [5, 6, 7], {"prompt_token_ids": [8, 9]}, {"prompt": "hello"}]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [o.prompt for o in outputs] == ["hello", None, None, "hello"]
        assert outputs[1].prompt_token_ids == [5, 6, 7]
        assert outputs[0].outputs[0].token_ids == outputs[3].outputs[0].token_ids
        each = [GREEDY.replace(max_tokens=i) for i in (1, 2, 3)]
        assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b", "c"], each)] == [1, 2, 3]
        chat = [{"role": "user", "content": "hello"}]
        assert len(llm.chat([chat, chat], GREEDY)) == 2
        with pytest.raises(InvalidRequest):
            llm.generate([99_999], GREEDY, use_tqdm=False)


async def test_an_llm_works_under_a_running_event_loop(tiny_folder: str) -> None:
    with LLM(tiny_folder, **SMALL) as llm:
        assert llm.generate("hello", GREEDY, use_tqdm=False)[0].finished


async def test_a_live_model_gives_what_its_checkpoint_gives(tiny_folder: str, tiny_tokenizer: Any) -> None:
    with LLM(tiny_folder, dtype="float32", **SMALL) as llm:
        (wanted,) = llm.generate("hello", GREEDY, use_tqdm=False)
    before = len(psutil.Process().children())
    async with AsyncEngine(make_model(), tiny_tokenizer, dtype="float32", **SMALL) as engine:
        assert engine.info.model == "LlamaForCausalLM"
        output = await last(engine.generate("hello", GREEDY))
        assert len(psutil.Process().children()) == before + 3, "its executor is a thread of this process"
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    assert output.outputs[0].text == wanted.outputs[0].text


async def test_a_tokenizer_of_ones_own_works_on_the_callers_side(tiny_folder: str) -> None:
    tokenizer = LetterTokenizer()
    async with AsyncEngine(tiny_folder, tokenizer, **SMALL) as engine:
        outputs = [output async for output in engine.generate("hello", GREEDY)]
        assert outputs[-1].prompt == "hello" and outputs[-1].prompt_token_ids == tokenizer.encode("hello")
        assert outputs[-1].outputs[0].text == tokenizer.decode(outputs[-1].outputs[0].token_ids)
        deltas = GREEDY.replace(output_kind=RequestOutputKind.DELTA)
        pieces = [output.outputs[0].text async for output in engine.generate("hello", deltas)]
        assert "".join(pieces) == outputs[-1].outputs[0].text
        with pytest.raises(InvalidRequest, match="stop strings"):
            async for _ in engine.generate("hello", GREEDY.replace(stop=("a",))):
                pass


async def test_a_raw_tokenizers_object_is_taken(tiny_folder: str, tiny_tokenizer: Any) -> None:
    async with AsyncEngine(tiny_folder, tiny_tokenizer.backend_tokenizer, **SMALL) as engine:
        assert (await last(engine.generate("hello", GREEDY))).outputs[0].text


def test_a_live_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="a live model needs a tokenizer"):
        AsyncEngine(make_model())


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(InvalidRequest, match="no engine option 'max_seqs'"):
        LLM(max_seqs=3)


def test_a_script_that_forgets_to_stop_leaves_nothing(tiny_folder: str) -> None:
    script = textwrap.dedent(f"""
        import os, psutil
        from fast_inference import LLM, SamplingParams, create_vllm_style_engine
        llm = LLM({tiny_folder!r}, num_blocks=64)
        print(len(llm.generate("hello", SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].token_ids))
        engine = create_vllm_style_engine({tiny_folder!r}, num_blocks=64)
        print(os.getpid(), *[p.pid for p in psutil.Process().children()])
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
    count, pids = done.stdout.splitlines()
    assert count == "3" and len(pids.split()) == 9
    assert not [pid for pid in pids.split() if psutil.pid_exists(int(pid)) and int(pid) != os.getpid()]
