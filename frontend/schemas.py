"""The JSON bodies that the HTTP routes take, and what `SamplingParams` they mean.

Owns field names and types; ranges are checked by `SamplingParams`. A field that is null is a field not given. Must
not know sockets or the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from ..protocol.errors import InvalidRequest
from ..protocol.sampling import SamplingParams
from .errors_http import from_validation

log = logging.getLogger(__name__)

B = TypeVar("B", bound="Body")

MAX_NAMES_NOTED = 1000

# Fields that change what comes out, which this server can't do: to ignore them would be to answer wrongly.
_UNSUPPORTED = {
    "best_of": "best_of is not supported: ask for n sequences and choose",
    "suffix": "suffix is not supported",
    "use_beam_search": "beam search is not supported",
    "tools": "tools are not supported yet",
    "functions": "functions are not supported yet",
    "chat_template": "a chat template is set at the server's start (--chat-template), not by a request",
    "structured_outputs": "structured outputs are not supported yet",
    "guided_json": "structured outputs are not supported yet",
    "guided_regex": "structured outputs are not supported yet",
    "guided_choice": "structured outputs are not supported yet",
    "guided_grammar": "structured outputs are not supported yet",
    "bad_words": "bad_words is not supported yet",
    "logprob_token_ids": "logprob_token_ids is not supported yet",
    "prompt_embeds": "prompt embeddings are not supported",
    "audio": "audio is not supported",
}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(BaseModel):
    """What every body has. Unknown fields are let through, and logged once each."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None


class SamplingBody(Body):
    """Fields common to both generating routes."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    priority: int | None = None
    deadline_ms: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None


class CompletionBody(SamplingBody):
    """`/v1/completions`."""

    prompt: Any = None  # str, list of str, token ids, list of token ids: told apart by `split_prompts`
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None


class ChatBody(SamplingBody):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = None


class TokenizeBody(Body):
    """`/tokenize`: `prompt`, or `messages`."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """`/detokenize`."""

    tokens: list[int]


def parse_body(kind: type[B], raw: bytes) -> B:
    """A body from its bytes. Raises `InvalidRequest` naming the field and the value."""
    try:
        value = pydantic_core.from_json(raw)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {type(value).__name__}")
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None
    _look_at_extras(body)
    return body


_noted: set[str] = set()


def _look_at_extras(body: Body) -> None:
    extra = dict(body.model_extra or {})
    if getattr(body, "tool_choice", None) == "none":
        extra.pop("tools", None)
    for name, value in extra.items():
        if name in _UNSUPPORTED:
            if value and not (name == "best_of" and value == (getattr(body, "n", None) or 1)):
                raise InvalidRequest(_UNSUPPORTED[name], param=name)
        elif name not in _noted and len(_noted) < MAX_NAMES_NOTED:
            _noted.add(name)
            log.warning("request field %.80r is unknown and ignored (said once)", name)


def sampling_params(
    body: SamplingBody,
    defaults: Mapping[str, float | int],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The `SamplingParams` of a body; `defaults` are the model's own for what the body leaves open."""
    given: dict[str, Any] = dict(defaults)
    for name in (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "truncate_prompt_tokens",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "logit_bias",
        "allowed_token_ids",
    ):
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise InvalidRequest(f"response_format.type must be 'text', got {kind!r:.60}", param="response_format")
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **given)


def split_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion request. Raises `InvalidRequest` for anything that is not one of the four forms."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(
            f"prompt must be a string, a list of strings, token ids or a list of them, got {_short(prompt)}",
            param="prompt",
        )
    if all(type(item) is int for item in prompt):
        return [prompt]
    for place, item in enumerate(prompt):
        if not isinstance(item, str) and not (isinstance(item, list) and all(type(t) is int for t in item)):
            raise InvalidRequest(
                f"prompt[{place}] must be a string or a list of token ids, got {_short(item)}", param="prompt"
            )
    return list(prompt)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return text[:80]
