"""From settings to a runner that is warm: device, backend, model, KV memory, first steps.

Owns the choices behind "auto" and the order of the start; must not know sockets. Every choice that is not what was
asked for is logged once, with its reason.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from ..protocol.config import EngineConfig
from ..protocol.errors import StartupError
from ..protocol.messages import EngineInfo
from .backends.base import Backend, KernelsUnavailable, Piece
from .batch import PersistentBatch
from .checkpoint import Progress
from .compile_ahead import compile_first_steps
from .graph_memory import bytes_of_all
from .graph_recorder import Recorder
from .host_pool import HostPool, host_blocks, staging_bytes
from .kv_cache import KVCache, KVPlan, allowed_length, bytes_per_block, cpu_budget, plan_kv
from .models.base import Model, ModelSpec
from .runner import Runner
from .side_by_side import side_by_side
from .step_graphs import StepGraphs
from .step_kernels import step_kernels
from .threads import usable_cores
from .transfer import Transfer
from .warmup import profile_peak, warm_up

log = logging.getLogger(__name__)

CPU_TOKENS, GPU_TOKENS = 2048, 8192  # of a step, where the settings leave it open
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True, slots=True)
class Engine:
    """What a start comes to. `facts`: for the log; `depth`: steps that may be under way on the device at once."""

    runner: Runner
    info: EngineInfo
    facts: dict[str, str | int | float]
    depth: int


def start(config: EngineConfig, progress: Progress, live: torch.nn.Module | None = None) -> Engine:
    """Everything up to the first step. Call under `torch.inference_mode`. Raises `StartupError`."""
    from .models import load_model

    clock = _Phases()
    device = choose_device(config, live)
    config = config.replace(max_num_batched_tokens=most_tokens(config, device))
    threads = config.threads or usable_cores()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.cuda.set_device(device)
    progress("compiling kernels", 0, 0)
    # The step's kernels are tried out beside the model's: each mostly waits for the compiler.
    tried: list[Callable[[], object]] = [partial(choose_backend, config, device), partial(step_kernels, device)]
    backend = cast(Backend, side_by_side(tried, device)[0])
    clock.end("backend")
    progress("loading the model", 0, 0)
    model = load_model(config, device, backend, progress, live)
    clock.end("load")
    if live is None and device.type == "cpu":
        keep_freed_memory()
    transfer = Transfer(device)
    allowed_length(config, model.spec)  # before the profiling run, whose time a refusal would waste
    progress("measuring memory", 0, 0)
    graphs = wants_graphs(config, model, device)
    plan = plan_memory(config, model, backend, transfer, graphs)
    swap_room = host_blocks(config, plan)
    if swap_room and not transfer.shared:
        progress("pinning host memory", 0, 0)
    runner = make_runner(config, model, plan, transfer, swap_room)
    clock.end("memory")
    progress("warming up", 0, 0)
    warm_up(runner, config)
    clock.end("warm_up")
    tuning = backend.tune(config.max_num_seqs, config.max_num_batched_tokens)
    if graphs:  # behind the first steps, which are no hint of what will be wanted
        runner.graphs = make_graphs(model, runner, transfer, tuning)
    else:  # there is no later
        for piece in tuning:
            progress(*piece)
    clock.end("tune")
    if live is None:  # a caller's own process keeps its own garbage habits
        gc.collect()
        gc.freeze()
    spec = model.spec
    info = _info_of(config, spec, plan, device, swap_room)
    facts: dict[str, str | int | float] = {
        "architecture": spec.architecture,
        "device": str(device),
        "dtype": info.dtype,
        "backend": backend.name,
        "threads": threads,
        "num_blocks": plan.num_blocks,
        "kv_bytes": plan.total_bytes,
        "host_kv_bytes": swap_room * plan.block_bytes,
        "max_model_len": plan.max_model_len,
        "graphs": runner.graphs.recordings.total if runner.graphs is not None else 0,
        **clock.seconds,
    }
    return Engine(runner, info, facts, depth=1 if device.type == "cpu" else config.run_ahead)


def _info_of(config: EngineConfig, spec: ModelSpec, plan: KVPlan, device: torch.device, swap_room: int) -> EngineInfo:
    """What the others are told of the engine."""
    return EngineInfo(
        model=config.model_name,
        max_model_len=plan.max_model_len,
        vocab_size=spec.vocab_size,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        dtype=str(spec.dtype).removeprefix("torch."),
        device=str(device),
        num_host_blocks=swap_room,
        block_bytes=plan.block_bytes,
    )


def choose_device(config: EngineConfig, live: torch.nn.Module | None = None) -> torch.device:
    """`config.device`; for "auto" the place of a live module, else a GPU if there is one. Raises `StartupError` for
    a device that is not there."""
    if config.device == "auto":
        if live is not None and (first := next(live.parameters(), None)) is not None:
            return first.device
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise StartupError(f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}", param="device") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise StartupError(f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}", param="device")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise StartupError(
            f"device is {config.device!r}, but torch sees {torch.cuda.device_count()} CUDA devices: set device to cpu",
            param="device",
        )
    return torch.device("cuda", index)


def most_tokens(config: EngineConfig, device: torch.device) -> int:
    """Tokens of a step: enough to keep a device busy, and no more, since everybody waits for the step's end."""
    usual = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    if not config.enable_chunked_prefill:
        usual = max(usual, config.max_model_len or 0)
    return config.max_num_batched_tokens or usual


def choose_backend(config: EngineConfig, device: torch.device) -> Backend:
    """The kernels for `device`. Raises `StartupError` where `config.attention_backend` can't be had."""
    from .backends.torch import TorchBackend

    wanted, own = config.attention_backend, "cpu" if device.type == "cpu" else "triton"
    if wanted == "torch":
        return TorchBackend()
    if wanted not in ("auto", own):
        raise StartupError(
            f"attention_backend {wanted} can't be used on {device}: set it to {own}, torch or auto",
            param="attention_backend",
        )
    try:
        if own == "cpu":
            from .backends.cpu import CpuBackend

            return CpuBackend()
        from .backends.check import triton_backend

        return triton_backend(device, torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype))
    except KernelsUnavailable as reason:
        if wanted == own:
            raise StartupError(f"attention_backend {own} can't be used: {reason}", param="attention_backend") from None
        log.warning("using the torch backend, which is slower: %s", reason)
        return TorchBackend()


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, instead of handing large pieces back to the system each time.

    Every step allocates and frees the same tens of megabytes (logits and their like); taken anew from the system,
    each page of them costs a fault, which doubles the time of sampling. Does nothing without glibc.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not musl
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)


def plan_memory(config: EngineConfig, model: Model, backend: Backend, transfer: Transfer, graphs: bool) -> KVPlan:
    """How many KV blocks there will be. `graphs`: steps will be recorded."""
    if config.num_blocks is not None or model.spec.recompute:
        return plan_kv(config, model.spec, 0, "num_blocks")
    if transfer.shared:
        return plan_kv(config, model.spec, cpu_budget(config), "kv_cache_memory")
    return plan_kv(config, model.spec, _gpu_budget(config, model, backend, transfer, graphs), "gpu_memory_utilization")


def wants_graphs(config: EngineConfig, model: Model, device: torch.device) -> bool:
    """Whether steps are to be recorded. The recording itself is done between steps, after the start."""
    if device.type != "cuda" or config.enforce_eager:
        return False
    if not model.spec.recordable:
        log.info("steps of %s run eagerly: model or kernels can't be recorded", model.spec.architecture)
    return model.spec.recordable


def make_runner(
    config: EngineConfig, model: Model, plan: KVPlan, transfer: Transfer, num_host_blocks: int = 0
) -> Runner:
    """A runner with an empty batch, `plan`'s blocks and `num_host_blocks` in host memory."""
    spec: ModelSpec = model.spec
    kv = KVCache(spec, plan, config.block_size, transfer.device)
    batch = PersistentBatch(
        config.max_num_seqs, plan.max_model_len, config.block_size, plan.num_blocks, spec.vocab_size, transfer
    )
    host = HostPool(kv, num_host_blocks, transfer) if num_host_blocks else None
    return Runner(model, batch, kv, transfer, host)


def make_graphs(model: Model, runner: Runner, transfer: Transfer, before: Iterable[Piece] = ()) -> StepGraphs:
    """Recordings of `runner`'s steps, none made yet; `before` as in `Recordings`."""
    return StepGraphs(model, runner.kv, runner.batch, Recorder(transfer.device), transfer, before)


def _gpu_budget(config: EngineConfig, model: Model, backend: Backend, transfer: Transfer, graphs: bool) -> int:
    """Bytes for keys and values: the share that the engine may use, minus what is used already (by anyone), minus
    what the largest step and the recorded ones need beside, as a profiling run measures it."""
    device = transfer.device
    length = allowed_length(config, model.spec)
    tokens = min(config.max_num_batched_tokens, config.max_num_seqs * length)
    blocks = -(-tokens // config.block_size) + config.max_num_seqs
    small = KVPlan(blocks, min(length, blocks * config.block_size), bytes_per_block(model.spec, config.block_size))
    held = torch.cuda.memory_allocated(device)
    runner = make_runner(config, model, small, transfer)
    compile_first_steps(runner, model.spec, backend)
    before = torch.cuda.memory_allocated(device)
    peak = profile_peak(runner, config) - before
    del runner
    recorded = _graph_bytes(config, model, small, transfer) if graphs else 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - held
    rows = config.max_num_seqs * (length + 1 + -(-length // config.block_size)) * 4
    spare = bytes_per_block(model.spec, config.block_size)  # the cache's block that is nobody's
    taken = total - free - cached
    beside = peak + recorded + rows + spare + staging_bytes(config)
    budget = int(total * config.gpu_memory_utilization) - taken - beside
    log.info(
        "GPU memory: %.1f of %.1f GiB free, a full step takes %.1f, recorded steps %.1f, the batch %.1f: "
        "%.1f GiB for keys and values",
        *(n / 2**30 for n in (free, total, peak, recorded, rows, max(0, budget))),
    )
    return max(0, budget)


def _graph_bytes(config: EngineConfig, model: Model, small: KVPlan, transfer: Transfer) -> int:
    """Bytes that all recordings of steps will take, from making some of them over a small cache."""

    def used() -> int:
        torch.cuda.synchronize(transfer.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(transfer.device)
        return total - free

    runner = make_runner(config, model, small, transfer)
    before = used()
    graphs = make_graphs(model, runner, transfer)
    return used() - before + bytes_of_all(graphs.recordings, used)


class _Phases:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{phase}_seconds"] = round(now - self._last, 2)
        self._last = now
