"""The face of the package: the public names, each imported when it is first used.

`import fast_inference` itself imports neither torch nor transformers. By absolute names, since this file is the root
package for the importer and `launch/public` for whoever reads the tree.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fast_inference.executor.attention import paged_attention
    from fast_inference.executor.registry import register_model
    from fast_inference.frontend.client import AsyncClient, Client
    from fast_inference.frontend.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from fast_inference.launch.engine import AsyncEngine
    from fast_inference.launch.llm import LLM
    from fast_inference.launch.vllm_style import create_vllm_style_engine
    from fast_inference.protocol.config import EngineConfig
    from fast_inference.protocol.errors import (
        ClientError,
        DeadlineUnreachable,
        EngineDead,
        EngineError,
        InvalidRequest,
        Overloaded,
        StartupError,
    )
    from fast_inference.protocol.policy_names import SchedulerPolicy
    from fast_inference.protocol.sampling import RequestOutputKind, SamplingParams

    __version__: str

_HOMES = {
    "executor.attention": ("paged_attention",),
    "executor.registry": ("register_model",),
    "frontend.client": ("AsyncClient", "Client"),
    "frontend.outputs": ("CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"),
    "launch.engine": ("AsyncEngine",),
    "launch.llm": ("LLM",),
    "launch.vllm_style": ("create_vllm_style_engine",),
    "protocol.config": ("EngineConfig",),
    "protocol.policy_names": ("SchedulerPolicy",),
    "protocol.errors": (
        "ClientError",
        "DeadlineUnreachable",
        "EngineDead",
        "EngineError",
        "InvalidRequest",
        "Overloaded",
        "StartupError",
    ),
    "protocol.sampling": ("RequestOutputKind", "SamplingParams"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncEngine",
    "Client",
    "ClientError",
    "CompletionOutput",
    "DeadlineUnreachable",
    "EngineConfig",
    "EngineDead",
    "EngineError",
    "InvalidRequest",
    "Logprob",
    "Overloaded",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SchedulerPolicy",
    "StartupError",
    "create_vllm_style_engine",
    "paged_attention",
    "register_model",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = version("fast-inference")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f"fast_inference.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
