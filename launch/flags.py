"""Command-line flags made from the fields of `EngineConfig` and `SamplingParams`, so that the two can't drift.

Owns how a field becomes a flag: its name, type, default, and its comment as the help text. Must not know what a
command does with them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..protocol.config import EngineConfig
from ..protocol.errors import InvalidRequest
from ..protocol.sampling import SamplingParams

T = TypeVar("T")

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
ALIASES = {  # other names of a flag, as people know them from vLLM
    "num_blocks": ("--num-gpu-blocks-override",),
    "kv_cache_memory": ("--kv-cache-memory-bytes",),
    "scheduling_policy": ("--scheduler-policy",),
    "preemption": ("--preemption-mode",),
}
SAMPLING_FLAGS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)
SCHEDULING_FLAGS = (  # what the scheduler goes by, and the memory that it is told of
    "max_model_len",
    "block_size",
    "num_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "run_ahead",
    "max_num_queued_reqs",
    "fair_weights",
    "preemption",
    "kv_offloading_size",
)


def parse_size(text: str | int) -> int:
    """Bytes of "4GiB", "512MiB", "2GB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise typer.BadParameter(f"{text!r} is no size: give bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match[1]) * unit)


def parse_pair(text: str) -> str:
    """Check NAME=PLACE."""
    name, equals, place = text.partition("=")
    if not (name and equals and ":" in place):
        raise typer.BadParameter(f"{text!r} must be NAME=file.py:Class or NAME=module:Class")
    return text


def parse_weights(text: str) -> str:
    """Check CLIENT=WEIGHT,CLIENT=WEIGHT."""
    _weights(text)
    return text


def _weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for pair in text.split(","):
        client, equals, weight = pair.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (client and equals) or math.isnan(value):
            raise typer.BadParameter(f"{pair!r} must be CLIENT=WEIGHT, several joined by commas")
        if client in weights:
            raise typer.BadParameter(f"{client!r} has two weights")
        weights[client] = value
    return weights


def parse_object(text: str) -> str:
    """Check a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} must be a JSON object")
    return text


def takes_engine_flags(command: Callable[..., None], leave_out: tuple[str, ...] = ()) -> Callable[..., None]:
    """Give `command(..., **engine)` a flag for every field of `EngineConfig`; `engine` holds those given."""
    return _with_flags(command, _engine_parameters(leave_out))


def takes_sampling_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(..., **sampling)` flags for the fields of `SamplingParams` that people set by hand."""
    return _with_flags(command, _parameters(SamplingParams, SAMPLING_FLAGS))


def takes_scheduling_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(..., **engine)` flags for the fields of `EngineConfig` that the scheduler alone goes by."""
    return _with_flags(command, _parameters(EngineConfig, SCHEDULING_FLAGS))


def engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """The settings that flags have named. Raises `typer.BadParameter` naming the flag whose value is out of range."""
    settings = {name: value for name, value in values.items() if value is not None and name in _names(EngineConfig)}
    if "model_classes" in settings:
        settings["model_classes"] = dict(text.split("=", 1) for text in settings["model_classes"])
    if "model_config" in settings:
        settings["model_config"] = json.loads(settings["model_config"])
    if "fair_weights" in settings:
        settings["fair_weights"] = _weights(settings["fair_weights"])
    if values.get("tensor_parallel_size", 1) != 1:
        raise typer.BadParameter("--tensor-parallel-size must be 1: this version runs on one device")
    return _checked(lambda: EngineConfig(**settings))


def sampling_params(values: Mapping[str, Any], **others: Any) -> SamplingParams:
    """The sampling parameters that flags have named, on top of `others`. Raises as `engine_config`."""
    settings = {name: values[name] for name in SAMPLING_FLAGS if values.get(name) is not None}
    return _checked(lambda: SamplingParams(**{**others, **settings}))


def _checked(make: Callable[[], T]) -> T:
    try:
        return make()
    except InvalidRequest as error:
        flag = f"--{(error.param or '').replace('_', '-')}"
        raise typer.BadParameter(error.message.replace(error.param or flag, flag)) from None


def _with_flags(command: Callable[..., None], flags: list[inspect.Parameter]) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

    @wraps(command)
    def wrapped(**values: Any) -> None:
        command(**values)

    # typer reads the signature: `command`'s own parameters, then the flags
    wrapped.__signature__ = signature.replace(parameters=own + flags)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in own + flags}
    return wrapped


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _engine_parameters(leave_out: tuple[str, ...]) -> list[inspect.Parameter]:
    names = tuple(field.name for field in dataclasses.fields(EngineConfig) if field.name not in leave_out)
    parallel = typer.Option("--tensor-parallel-size", "-tp", help="GPUs to split the model over; 1 for now")
    return [
        *_parameters(EngineConfig, names),
        inspect.Parameter(
            "tensor_parallel_size", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=Annotated[int, parallel]
        ),
    ]


def _parameters(cls: type, names: tuple[str, ...]) -> list[inspect.Parameter]:
    hints = get_type_hints(cls)
    comments = field_comments(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return [_parameter(fields[name], hints[name], comments.get(name, "")) for name in names]


def _parameter(field: dataclasses.Field[Any], hint: Any, comment: str) -> inspect.Parameter:
    name = f"--{field.name.replace('_', '-')}"
    names = (name, *ALIASES.get(field.name, ()))
    default = None if field.default is dataclasses.MISSING else field.default
    comment = comment.replace("None:", "without it")
    shown = "" if default in (None, "", ()) else str(default)
    options: dict[str, Any] = {"help": f"{comment} [default: {shown}]" if shown else comment, "show_default": False}
    kind: Any = hint
    if field.name == "model_classes":
        names, kind = ("--model-class",), list[str] | None
        options |= {"parser": parse_pair, "metavar": "NAME=FILE.py:Class"}
    elif field.name == "model_config":
        kind = str | None
        options |= {"parser": parse_object, "metavar": "JSON"}
    elif field.name == "fair_weights":
        kind = str | None
        options |= {"parser": parse_weights, "metavar": "CLIENT=WEIGHT,..."}
    elif field.name in ("kv_cache_memory", "journal_max_bytes"):
        options |= {"parser": parse_size, "metavar": "SIZE"}
    elif hint is bool:
        names = (f"{name}/--no-{name[2:]}",)
        kind = bool | None
    elif field.name == "stop":
        kind = list[str] | None
    else:
        kind = hint | None
    # None is "not given": the dataclass has the defaults
    annotation = Annotated[kind, typer.Option(*names, **options)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, from its source."""
    pattern = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(cls)))
