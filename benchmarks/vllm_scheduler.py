"""vLLM's own v1 scheduler on the work of `core_costs.py`, in an interpreter that has vLLM.

    PYTHON_WITH_VLLM benchmarks/vllm_scheduler.py '{"sizes": [1, 64], "steps": 300, "warmup": 20, ...}'

`core_costs.py` runs it as a child; the last line of its output is the figures as JSON. Only this file imports vLLM,
and it imports nothing of this project. The scheduler is the one that vLLM serves with by default: asynchronous, two
steps under way, chunked prefill and prefix cache on, in blocks of 16 tokens.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import SamplingParams, __version__
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE = 16
IN_FLIGHT = 2  # what vLLM keeps under way with asynchronous scheduling
CONTEXT = 8192
# A Llama that no weights are loaded for: vLLM wants to read what kind of model it schedules.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 49_152,
    "torch_dtype": "float32",
}


class Driver:
    """A scheduler, and a worker that answers at once."""

    def __init__(self, slots: int, budget: int, blocks: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(MODEL))
            model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=CONTEXT)
            cache = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True)
            scheduling = SchedulerConfig(
                max_num_seqs=slots,
                max_num_batched_tokens=budget,
                max_model_len=CONTEXT,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=True,
            )
            config = VllmConfig(scheduler_config=scheduling, model_config=model, cache_config=cache)
        cache.num_gpu_blocks = blocks
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
        layout = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self._scheduler = AsyncScheduler(
            vllm_config=config,
            kv_cache_config=layout,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=False,
        )
        self._in_flight: deque[Any] = deque()
        self.outputs: Any = None

    def submit(self, requests: int, prompt_tokens: int, max_tokens: int) -> None:
        for number in range(requests):
            ids = [(number * 7919 + place * 104_729) % 49_152 for place in range(prompt_tokens)]
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            self._scheduler.add_request(
                Request(
                    request_id=f"request-{number}",
                    prompt_token_ids=ids,
                    sampling_params=params,
                    pooling_params=None,
                    block_hasher=self._hasher,
                )
            )

    def turn(self) -> float:
        """Schedule as many steps as may be under way, apply the oldest's result; returns seconds spent in it."""
        begun = time.perf_counter()
        while len(self._in_flight) < IN_FLIGHT:
            step = self._scheduler.schedule()
            if not step.total_num_scheduled_tokens:
                break
            self._in_flight.append(step)
        spent = time.perf_counter() - begun
        step = self._in_flight.popleft()
        names = list(step.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[100 + index % 1000] for index in range(len(names))],
        )
        begun = time.perf_counter()
        self.outputs = self._scheduler.update_from_output(step, result)
        return spent + time.perf_counter() - begun

    @property
    def last_step(self) -> Any:
        """The step sent last."""
        return self._in_flight[-1]


def median_us(run: Any, times: int) -> float:
    return round(statistics.median(run() for _ in range(times)) * 1e6, 1)


def timed(function: Any, argument: Any) -> float:
    begun = time.perf_counter()
    function(argument)
    return time.perf_counter() - begun


def codec_costs(driver: Driver, times: int) -> dict[str, float]:
    """Its outputs to the frontend in its msgpack, its step for the workers as it is pickled; microseconds, bytes."""
    outputs = driver.outputs[0]
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    frames, step = encoder.encode(outputs), driver.last_step
    data = pickle.dumps(step, pickle.HIGHEST_PROTOCOL)
    return {
        "outputs_encode": median_us(lambda: timed(encoder.encode, outputs), times),
        "outputs_decode": median_us(lambda: timed(decoder.decode, frames), times),
        "outputs_bytes": sum(len(memoryview(frame)) for frame in frames),
        "step_encode": median_us(lambda: timed(lambda s: pickle.dumps(s, pickle.HIGHEST_PROTOCOL), step), times),
        "step_decode": median_us(lambda: timed(pickle.loads, data), times),
        "step_bytes": len(data),
    }


def main(job: dict[str, Any]) -> None:
    gc.collect()
    gc.freeze()  # as vLLM does once it has started
    figures: dict[str, Any] = {}
    for size in job["sizes"]:
        driver = Driver(size, job["budget"], job["blocks"])
        driver.submit(size, job["prompt"], job["max_tokens"])
        for _ in range(job["warmup"]):
            driver.turn()
        figures[str(size)] = median_us(driver.turn, job["steps"])
        if size == job["codec_size"]:
            figures["codec"] = codec_costs(driver, job["steps"])
    admits = []
    for _ in range(job["admissions"]):
        driver = Driver(job["admitted"], job["budget"], job["blocks"])
        driver.submit(job["admitted"], job["admitted_prompt"], job["max_tokens"])
        admits.append(driver.turn())
    figures[f"admit{job['admitted']}"] = round(statistics.median(admits) * 1e6, 1)
    figures["version"] = __version__
    print(json.dumps(figures))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
