"""What the two generating routes share: from a checked body to a running request, and the parts of its answer.

Owns `Api`, the context of all routes; must not know the routes' own JSON shapes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive

from ..protocol.config import EngineConfig
from ..protocol.errors import InvalidRequest, NotFound
from ..protocol.lengths import too_long
from ..protocol.messages import EngineInfo
from .engine_link import EngineLink
from .logprobs import TokenLogprobs, prompt_positions
from .siblings import Siblings
from .sse import unless_gone
from .stream import Piece, Stream
from .submission import Request
from .tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity
MAX_REQUEST_ID = 256


@dataclass(slots=True)
class Api:
    """What every route may use."""

    config: EngineConfig
    link: EngineLink
    tokenizer: Tokenizer | None
    defaults: Mapping[str, float | int]
    siblings: Siblings
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raises `NotFound` for a model that is not the served one."""
        if name is not None and name not in (self.config.model_name, self.config.model):
            raise NotFound(f"The model `{name:.200}` does not exist.", param="model")

    def need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"{what} needs a tokenizer; this server takes token ids only", param="prompt")
        return self.tokenizer


@dataclass(slots=True)
class Call:
    """One HTTP request as the routes see it."""

    receive: Receive
    request_id: str
    client: str  # who asks, for fairness


def check_request_id(value: str | None) -> str | None:
    """A caller's own request id, if it can be one."""
    if value is None:
        return None
    if not value or len(value) > MAX_REQUEST_ID or not value.isprintable() or not value.isascii():
        raise InvalidRequest(
            f"request_id must be 1 to {MAX_REQUEST_ID} printable ASCII characters, got {value!r:.80}",
            param="request_id",
        )
    return value


def new_request_id() -> str:
    return uuid.uuid4().hex


def check_room(prompts: Sequence[Sequence[int]], max_tokens: int | None, info: EngineInfo, param: str) -> None:
    """Raises `InvalidRequest` where a prompt, or a prompt and its `max_tokens`, pass the context length."""
    for ids in prompts:
        if (error := too_long(len(ids), max_tokens, info.max_model_len, param)) is not None:
            raise error


async def start(api: Api, call: Call, request: Request, *, whole: bool) -> tuple[Stream, list[Piece]]:
    """Submit, and wait for the first news: all of it with `whole`. Raises what the engine answers, so that a refusal
    becomes an HTTP status; raises `ClientGone`, with everything aborted, if the client leaves meanwhile."""
    stream = api.link.submit(request, whole=whole)
    try:
        return stream, await unless_gone(call.receive, stream.take())
    except BaseException:  # the client has gone, a sequence has failed, or the server is being stopped
        api.link.cancel(stream)
        raise


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's `usage` object."""
    out: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        out["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return out


class Tally:
    """Token counts of one request while it runs."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._prompt_tokens = sum(len(ids) for ids in prompts)
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}  # by sequence

    def add(self, piece: Piece) -> None:
        self._completion_tokens += piece.count
        if piece.end is not None:
            self._cached[piece.index] = piece.end.cached_tokens

    def usage(self, n: int, *, final: bool = True) -> dict[str, Any]:
        """`n`: sequences per prompt. Only each prompt's first sequence counts as cached or not."""
        cached = sum(tokens for index, tokens in self._cached.items() if index % n == 0)
        return usage(self._prompt_tokens, self._completion_tokens, cached if final else None)


def clamp(value: float) -> float:
    """A log-probability that JSON can hold."""
    return value if value >= LOWEST_LOGPROB else LOWEST_LOGPROB


def prompt_records(api: Api, ids: Sequence[int], piece: Piece) -> list[TokenLogprobs | None]:
    """The prompt's log-probabilities, one per position."""
    decode = None if api.tokenizer is None else api.tokenizer.token_text
    return prompt_positions(len(ids), piece.prompt_logprobs, decode)


def prompt_logprobs_json(records: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per position, token id -> log-probability, rank and text."""
    return [
        None
        if record is None
        else {
            str(token): {"logprob": clamp(p.logprob), "rank": p.rank, "decoded_token": p.decoded_token}
            for token, p in record.by_token().items()
        }
        for record in records
    ]
