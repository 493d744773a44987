"""What a program hands over (a name, a live module, a live tokenizer, options) as settings of an engine.

Owns telling the kinds apart; must not start anything, and imports neither torch nor transformers: whoever hands over
a module has torch already.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..executor.registry import registered_models
from ..executor.threads import usable_cores
from ..protocol.config import EngineConfig
from ..protocol.errors import InvalidRequest
from .live_tokenizer import CallerSide, saver

if TYPE_CHECKING:
    import torch

# A program that embeds the engine has its own output, and wants no port opened unasked.
EMBEDDED_DEFAULTS: dict[str, Any] = {"port": None, "log_level": "warning"}


@dataclass(frozen=True)
class Embedded:
    """An engine as its program described it."""

    config: EngineConfig
    module: torch.nn.Module | None  # a live model
    save_tokenizer: Callable[[Path], None] | None  # a live tokenizer that can be saved
    caller_side: CallerSide | None  # a live tokenizer that can't


def describe(
    model: object,
    tokenizer: object,
    config: EngineConfig | Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Embedded:
    """Put the parts together.

    Args:
        model: None (the default model), a folder, file or hub name, a registered class's name, or a torch module.
        tokenizer: None (the model's own), a folder or hub name, or a live tokenizer.
        config: settings to start from.
        options: settings by name, over those of `config`.

    Raises: `InvalidRequest` naming what is wrong.
    """
    settings: dict[str, Any] = dict(EMBEDDED_DEFAULTS)
    if isinstance(config, EngineConfig):
        settings = dataclasses.asdict(config)
    elif config is not None:
        settings |= config
    settings |= options
    _refuse_unknown(settings)
    module = _as_module(model)
    if module is not None:
        settings["model"] = "live"
        settings.setdefault("served_model_name", type(module).__name__)
        settings["threads"] = settings.get("threads") or _threads_beside_the_caller()
    elif model is not None:
        settings["model"] = _as_name(model)
    settings["model_classes"] = {**registered_models(), **settings.get("model_classes", {})}
    save, caller_side = None, None
    if isinstance(tokenizer, str | PathLike):
        settings["tokenizer"] = fspath(tokenizer)
    elif tokenizer is not None:
        save = saver(tokenizer)
        if save is None:
            caller_side = CallerSide(tokenizer)
            settings["skip_tokenizer_init"] = True
    described = EngineConfig(**settings)
    if module is not None and described.tokenizer is None and save is None and not described.skip_tokenizer_init:
        raise InvalidRequest(
            "a live model needs a tokenizer: pass tokenizer=, or skip_tokenizer_init=True to work with token ids",
            param="tokenizer",
        )
    return Embedded(described, module, save, caller_side)


def _threads_beside_the_caller() -> int:
    """Compute threads for an executor in the caller's process.

    There OpenMP has been loaded, by default with threads that spin while they wait. One more of them than there are
    free cores, and each barrier waits for a thread that has no core: tens of times slower. So one core is left to the
    caller and the other actors, unless OpenMP was told not to spin.
    """
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    return usable_cores() if passive else max(1, usable_cores() - 1)


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    for name in settings:
        if name not in known:
            raise InvalidRequest(f"there is no engine option {name!r}", param=name)


def _as_module(model: object) -> torch.nn.Module | None:
    torch = sys.modules.get("torch")
    return model if torch is not None and isinstance(model, torch.nn.Module) else None


def _as_name(model: object) -> str:
    if isinstance(model, str | PathLike):
        return str(fspath(model))
    raise InvalidRequest(
        f"model must be a name, a path or a torch.nn.Module, got {type(model).__name__}", param="model"
    )
