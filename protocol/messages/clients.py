"""The `client` link: native clients and a frontend, and the frontends of one port among themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..sampling import SamplingParams
from .arrays import Int32, Int64
from .requests import EngineInfo
from .version import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientHello:
    """First message of a client; answered by `ServerHello`, or by `Refused` when the major versions differ."""

    version_major: int = PROTOCOL_VERSION[0]
    version_minor: int = PROTOCOL_VERSION[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHello:
    """The frontend's answer: what it serves."""

    version_major: int = PROTOCOL_VERSION[0]
    version_minor: int = PROTOCOL_VERSION[1]
    info: EngineInfo
    eos_token_ids: tuple[int, ...] = ()
    has_tokenizer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """A request of a native client: exactly one of `prompt`, `prompt_token_ids` and `chat` is given.

    `chat`: messages as in OpenAI's API (`[{"role": ..., "content": ...}, ...]`), put through the chat template.
    """

    key: int
    request_id: str
    params: SamplingParams
    prompt: str | None = None
    prompt_token_ids: Int32 | None = None
    chat: list[dict[str, Any]] | None = None
    priority: int = 0
    cache_salt: str = ""
    client: str = ""  # who asks, for fairness; "": this connection
    deadline_ms: int | None = None  # from its arrival to its first token; None: no matter when


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The client no longer wants these requests (its own keys)."""

    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The frontend took a request: these are its prompt's tokens. Text follows in `TextBatch`es."""

    key: int
    prompt_token_ids: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A request (or, with key -1, a frame) was not taken. Nothing further comes for that key."""

    key: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GetFigures:
    """A frontend asks another, over that one's `client` link, for what it has counted; `token` comes back."""

    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One histogram: how many values fell into each of its buckets (the last has no upper bound), and their sum."""

    counts: Int64
    sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendFigures:
    """What one frontend has counted since its start: its share of what /metrics shows of the whole engine."""

    token: int = 0
    live: int = 0  # sequences that have not ended
    finished: dict[str, int] = field(default_factory=dict)  # sequences by reason
    histograms: dict[str, Distribution] = field(default_factory=dict)  # by metric name, without the prefix
