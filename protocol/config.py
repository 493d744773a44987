"""The engine's settings: one frozen dataclass, its fields named as the command line's flags.

Built in `launch/`, written once into the run directory as JSON, read by every actor. Owns names, defaults and
ranges; must not know how an actor uses them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidRequest
from .names import MAX_FRONTENDS
from .policy_names import SchedulerPolicy, known_policies

LATENCY_STEP_MS = 50.0  # of `latency`: a pause that a reader of streamed text does not notice
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Raises `InvalidRequest` on construction, naming the field, the value and the range."""

    model: str = ""  # folder, hub name, GGUF file, or "class:NAME" of a registered class; "" is the default model
    tokenizer: str | None = None  # folder or hub name; None: the model's own
    skip_tokenizer_init: bool = False  # token ids in, token ids out
    served_model_name: str | None = None  # the name that clients use; None: the model as it was given
    revision: str | None = None  # branch, tag or commit of a hub model
    trust_remote_code: bool = False  # run Python code that comes with a checkpoint
    load_format: str = "auto"  # or "dummy": random weights
    model_classes: dict[str, str] = field(default_factory=dict)  # registered name -> "module:Class" | "file.py:Class"
    model_config: dict[str, Any] = field(default_factory=dict)  # keyword arguments of a registered class

    dtype: str = "auto"  # "float32", "bfloat16", "float16"; auto: as the checkpoint has it
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto: where a live model is, else a GPU if there is one
    attention_backend: str = "auto"  # "triton", "cpu", "torch"; auto: the fastest that works on the device
    max_model_len: int | None = None  # tokens of prompt and output; None: what the model can take
    block_size: int = 16  # tokens in a KV block
    num_blocks: int | None = None  # None: as many as the memory setting gives
    gpu_memory_utilization: float = 0.9  # share of the GPU memory to use
    kv_offloading_size: float = 0.0  # GiB of host memory for KV blocks that leave the device; 0: none
    kv_cache_memory: int | None = None  # bytes, CPU only; None: a quarter of what is free
    threads: int | None = None  # CPU compute threads; None: the cores that the process may use
    seed: int = 0  # of random weights
    enforce_eager: bool = False  # GPU only: launch steps operation by operation, none as a recorded CUDA graph

    max_num_seqs: int = 256  # requests that run at a time
    max_num_batched_tokens: int | None = None  # tokens computed in one step; None: 2,048 on a CPU, 8,192 on a GPU
    enable_prefix_caching: bool = True  # keep KV blocks for later prompts that begin alike
    enable_chunked_prefill: bool = True  # split long prompts over several steps
    scheduling_policy: str = "fcfs"  # "priority", "memory-aware", "shortest-first", "fair", "deadline", or a plug-in's
    fair_weights: dict[str, float] = field(default_factory=dict)  # client -> its share under "fair"; others have 1
    max_step_ms: float | None = None  # prompts are cut so that a step stays under this; None: no bound
    latency: bool = False  # for even streaming rather than throughput: a max_step_ms of 50, unless that is given
    preemption: str = "auto"  # keep KV in host memory: "swap"; compute it again: "recompute"; auto: the faster
    run_ahead: int = 2  # steps in flight; 1: the scheduler waits for each result
    max_num_queued_reqs: int = 10_000  # waiting requests over this are refused with a retry hint

    host: str = "127.0.0.1"  # where the HTTP server listens
    port: int | None = 8000  # None: no HTTP server
    api_server_count: int = 1  # frontend processes on the port, each with a detokenizer of its own
    api_key: str | None = None  # what HTTP clients must send as their bearer token
    chat_template: str | None = None  # a file's path or the template itself
    start_timeout: float = 600.0  # seconds until every actor must be ready
    shutdown_timeout: float = 5.0  # seconds given to running requests at SIGTERM
    client_endpoint: str | None = None  # a second address for native clients, e.g. tcp://127.0.0.1:5555
    journal: str | None = None  # record every message of the scheduler into this file, for `replay` and `explain`
    journal_max_bytes: int = 2**30  # kept of records, in FILE and the segment before it, FILE.1
    journal_redact: bool = False  # no prompts and no text in the journal: lengths and hashes only
    log_level: str = "info"  # "debug", "info", "warning", "error"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.served_model_name or self.model

    @property
    def step_bound(self) -> float | None:
        """Seconds that a step should not exceed."""
        if self.max_step_ms is not None:
            return self.max_step_ms / 1000.0
        return LATENCY_STEP_MS / 1000.0 if self.latency else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> EngineConfig:
        return EngineConfig(**json.loads(text))

    def replace(self, **changes: Any) -> EngineConfig:
        return dataclasses.replace(self, **changes)


def _check(c: EngineConfig) -> None:
    def within(name: str, low: float, high: float) -> None:
        value = getattr(c, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InvalidRequest(f"{name} must be in [{low:g}, {high:g}], got {value!r}", param=name)

    def one_of(name: str, allowed: tuple[str, ...]) -> None:
        if getattr(c, name) not in allowed:
            raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}; got {getattr(c, name)!r}", param=name)

    one_of("load_format", ("auto", "dummy"))
    one_of("dtype", DTYPES)
    if c.scheduling_policy not in tuple(SchedulerPolicy):  # else other packages need not be looked at
        one_of("scheduling_policy", known_policies())
    for client, weight in c.fair_weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-6 <= weight <= 1e6:
            raise InvalidRequest(
                f"fair_weights[{client!r}] must be in [1e-06, 1e+06], got {weight!r}", param="fair_weights"
            )
    one_of("preemption", ("auto", "recompute", "swap"))
    one_of("attention_backend", ("auto", "torch", "cpu", "triton"))
    one_of("log_level", ("debug", "info", "warning", "error"))
    within("max_model_len", 1, 2**24)
    within("block_size", 1, 4096)
    within("num_blocks", 2, 2**31 - 1)
    within("gpu_memory_utilization", 0.01, 1.0)
    within("kv_cache_memory", 1, 2**50)
    within("kv_offloading_size", 0, 2**20)
    within("threads", 1, 4096)
    within("max_num_seqs", 1, 65536)
    within("max_num_batched_tokens", 1, 2**24)
    within("run_ahead", 1, 8)
    within("max_step_ms", 0.1, 60_000)
    if c.step_bound is not None and not c.enable_chunked_prefill:
        name = "latency" if c.max_step_ms is None else "max_step_ms"
        raise InvalidRequest(
            f"{name} needs enable_chunked_prefill, got {getattr(c, name)!r}: prompts are what is cut", param=name
        )
    within("max_num_queued_reqs", 1, 2**31 - 1)
    within("port", 0, 65535)
    within("api_server_count", 1, MAX_FRONTENDS)
    within("journal_max_bytes", 2**16, 2**50)
    within("start_timeout", 1, 86400)
    within("shutdown_timeout", 0, 86400)
    if c.journal == "":
        raise InvalidRequest("journal must be a file's path, got ''", param="journal")
    if c.journal_redact and c.journal is None:
        raise InvalidRequest("journal_redact needs a journal to redact, got True without one", param="journal_redact")
    if c.preemption == "swap" and not c.kv_offloading_size:
        raise InvalidRequest(
            "preemption swap needs host memory: kv_offloading_size must be more than 0, got 0", param="preemption"
        )
    tokens, length = c.max_num_batched_tokens, c.max_model_len
    if not c.enable_chunked_prefill and length is not None and tokens is not None and tokens < length:
        raise InvalidRequest(
            f"max_num_batched_tokens must be at least max_model_len ({length}) without chunked prefill, got {tokens}",
            param="max_num_batched_tokens",
        )
