"""The peer's process: reads a `PeerJob` as JSON from standard input, writes events as JSON lines to standard output.

Owns the model and the clock of the peer; must not know the engine under test. An event is `{"phase", "done"}` or, at
the end of each run, `{"records"}`.

Both ways get the same model, threads and requests, and never stop at an end-of-sequence token:
`transformers-generate` takes what has arrived, in order of arrival, in left-padded batches, each run to the longest
output in it; only the tokens asked for are counted. `transformers-cb` is transformers' continuous batching.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from records import Record
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from workloads import Request

Progress = Callable[[int], None]
Run = Callable[[list[Request], Progress], list[Record]]
PAGE = 256  # tokens, continuous batching's default
SPARE_PAGES = 8
MAX_PAUSE = 0.2  # seconds between looks at a manager that says nothing
NO_TOKEN = -1
PAD_TOKEN = 0


def load(job: dict[str, Any]) -> PreTrainedModel:
    """The model of the job, its own end-of-sequence tokens forgotten."""
    dtype = getattr(torch, job["dtype"])
    if job["load_format"] == "dummy":
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(job["model"])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=PAD_TOKEN, do_sample=False)
    model.config.eos_token_id = None
    return model.eval()


class StepClock(StoppingCriteria):
    """Notes when each step of a batch is done; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate_batch(model: PreTrainedModel, batch: list[Request]) -> list[float]:
    """Run one left-padded batch to its longest output; returns the times at which its steps were done."""
    width = max(len(request.prompt_token_ids) for request in batch)
    ids = torch.full((len(batch), width), PAD_TOKEN)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for row, request in enumerate(batch):
        length = len(request.prompt_token_ids)
        ids[row, width - length :] = torch.tensor(request.prompt_token_ids)
        mask[row, width - length :] = 1
    steps = max(request.max_tokens for request in batch)
    clock = StepClock()
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    if output.shape[1] != width + steps:
        raise RuntimeError(f"generate made {output.shape[1] - width} tokens of {steps}")
    return clock.times


@contextmanager
def generate_in_batches(model: PreTrainedModel, job: dict[str, Any]) -> Iterator[Run]:
    """`model.generate` on what has arrived, at most `batch` (or the allowed concurrency) at once."""
    size = min(job["batch"], job["max_concurrency"] or job["batch"])

    def run(requests: list[Request], progress: Progress) -> list[Record]:
        records: list[Record] = []
        start = time.perf_counter()
        while len(records) < len(requests):
            waiting = requests[len(records) :]
            time.sleep(max(0.0, waiting[0].arrival - (time.perf_counter() - start)))
            now = time.perf_counter() - start
            batch = [request for request in waiting[:size] if request.arrival <= now]
            times = [at - start for at in generate_batch(model, batch)]
            records += [finished(request, times[: request.max_tokens]) for request in batch]
            progress(len(records))
        return records

    yield run


@contextmanager
def continuous_batching(model: PreTrainedModel, job: dict[str, Any]) -> Iterator[Run]:
    """transformers' continuous batching manager, handed each request as it arrives."""
    # The cache is sized for all requests at once: left alone it would take nine tenths of the machine's memory.
    pages = max(
        sum(-(-(len(request["prompt_token_ids"]) + request["max_tokens"]) // PAGE) for request in run)
        for run in job["runs"]
    )
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=1, eos_token_id=NO_TOKEN, pad_token_id=PAD_TOKEN, bos_token_id=NO_TOKEN
        ),
        continuous_batching_config=ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages + SPARE_PAGES),
        block=True,
        timeout=5,
    ) as manager:

        def run(requests: list[Request], progress: Progress) -> list[Record]:
            return serve_with_manager(manager, requests, job["max_concurrency"] or len(requests), progress)

        yield run


def serve_with_manager(manager: Any, requests: list[Request], concurrency: int, progress: Progress) -> list[Record]:
    """Feed a running manager and wait for all results; records come in the order of `requests`."""
    records: dict[int, Record] = {}
    start = time.perf_counter()
    sent = 0
    while len(records) < len(requests):
        pause = MAX_PAUSE
        while sent < len(requests) and sent - len(records) < concurrency:
            wait = requests[sent].arrival - (time.perf_counter() - start)
            if wait > 0:
                pause = min(wait, MAX_PAUSE)
                break
            manager.add_request(
                requests[sent].prompt_token_ids,
                request_id=str(sent),
                max_new_tokens=requests[sent].max_tokens,
                record_timestamps=True,
            )
            sent += 1
        result = manager.get_result(timeout=pause)
        if result is None and not manager.is_running():
            raise RuntimeError("the continuous batching manager stopped")
        if result is None or not result.is_finished():
            continue
        request = requests[int(result.request_id)]
        if result.error or len(result.generated_tokens) != request.max_tokens:
            raise RuntimeError(result.error or f"made {len(result.generated_tokens)} tokens of {request.max_tokens}")
        records[int(result.request_id)] = finished(request, [at - start for at in result.timestamps])
        progress(len(records))
    return [records[index] for index in range(len(requests))]


def finished(request: Request, events: list[float]) -> Record:
    """The record of a request whose tokens came at `events`."""
    return Record(len(request.prompt_token_ids), request.arrival, request.max_tokens, events, events[-1])


WAYS = {"transformers-cb": continuous_batching, "transformers-generate": generate_in_batches}


def main() -> None:
    # What libraries print must not get between the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(phase: str, done: int = 0) -> None:
        print(json.dumps({"phase": phase, "done": done}), file=events)

    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    tell("load")
    model = load(job)
    with torch.inference_mode(), WAYS[job["peer"]](model, job) as run:
        tell("warm-up")
        run([Request(**request) for request in job["warmup"]], lambda done: tell("warm-up", done))
        for requests in job["runs"]:
            tell("run")
            records = run([Request(**request) for request in requests], lambda done: tell("run", done))
            print(json.dumps({"records": [asdict(record) for record in records]}), file=events)
            if max(record.end for record in records) > job["long_run"]:
                break


if __name__ == "__main__":
    main()
