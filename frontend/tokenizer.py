"""Text to token ids: the model's tokenizer, its chat template, its end tokens and its default sampling values.

Owns everything that is read from the model's folder on the text side; must not know requests or sockets, and never
imports torch: `hide_torch` keeps transformers from doing so (it otherwise takes a second and 200 MB).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..protocol.config import EngineConfig
from ..protocol.errors import InvalidRequest, StartupError

log = logging.getLogger(__name__)

T = TypeVar("T")

POOL_THREADS = 2
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What a template may raise on messages that it was not written for (jinja2.TemplateError is added where it is used).
TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def hide_torch() -> None:
    """Make torch look uninstalled in this process, unless it is in use already. For processes that only tokenize."""
    if "torch" not in sys.modules:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        sys.modules["torch"] = None  # type: ignore[assignment]


class Tokenizer:
    """A Hugging Face tokenizer, made safe for threads. The slow methods come in a form off the event loop too."""

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        self._hf = hf
        self._fast = getattr(hf, "backend_tokenizer", None) if getattr(hf, "is_fast", False) else None
        self._lock = threading.Lock()  # only for tokenizers written in Python, which keep state
        self._template = chat_template
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="tokenizer")
        self._reserved = frozenset(inspect.signature(hf.apply_chat_template).parameters) - {"kwargs"}
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary spells it (no shorter than as text)."""
        return max((len(token) for token in self._hf.get_vocab()), default=1)

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id  # type: ignore[no-any-return]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        if self._fast is not None:
            return self._fast.encode(text, add_special_tokens=add_special_tokens).ids  # type: ignore[no-any-return]
        with self._lock:
            return self._hf.encode(text, add_special_tokens=add_special_tokens)  # type: ignore[no-any-return]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`."""
        if self._fast is not None:
            return self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)  # type: ignore[no-any-return]
        with self._lock:
            return self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens)  # type: ignore[no-any-return]

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each token."""
        return [str(token) for token in self._hf.convert_ids_to_tokens(list(ids))]

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt's text for a conversation. The template runs in transformers' jinja sandbox.

        Raises `InvalidRequest` where the model has no template, or the template can't take the messages."""
        from jinja2 import TemplateError

        taken = self._reserved.intersection(kwargs or {})
        if taken:
            raise InvalidRequest(
                f"chat_template_kwargs may not hold {', '.join(sorted(taken))}", param="chat_template_kwargs"
            )
        if self._template is None and not self._hf.chat_template:
            raise InvalidRequest(
                "the model has no chat template: start the server with --chat-template, or use /v1/completions",
                param="messages",
            )
        try:
            text = self._hf.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(kwargs or {}),
            )
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            raise InvalidRequest(
                f"messages can't be put through the chat template: {error}", param="messages"
            ) from None
        return str(text)

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Run `work` on one of the tokenizer's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def encode_prompt(self, text: str, room: int | None, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, off the loop. Raises `InvalidRequest`, before any work, for a text that can't fit
        into `room` tokens even if each were the longest there is; `room` None: the prompt will be shortened."""
        if room is not None and len(text) > room * self.longest_token:
            raise InvalidRequest(
                f"prompt has {len(text)} characters, more than {room} tokens (the context length) can hold",
                param="prompt",
            )
        return await self.off_loop(lambda: self.encode(text, add_special_tokens))

    async def encode_chat(
        self, messages: list[dict[str, Any]], room: int | None, *, add_special_tokens: bool = False, **options: Any
    ) -> list[int]:
        """As `encode_prompt`, for a conversation; `options` as of `apply_chat_template`."""
        text = await self.off_loop(lambda: self.apply_chat_template(messages, **options))
        return await self.encode_prompt(text, room, add_special_tokens=add_special_tokens)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _token_text(self, token: int) -> str:
        return self.decode([token])


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer of the engine, or None with `skip_tokenizer_init`. Raises `StartupError` if there is none."""
    if config.skip_tokenizer_init:
        return None
    from transformers import AutoTokenizer

    source = config.tokenizer or config.model
    try:
        hf = AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StartupError(
            f"no tokenizer could be loaded from {source!r}: give --tokenizer, or --skip-tokenizer-init to work with "
            f"token ids only ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    return Tokenizer(hf, _read_template(config.chat_template))


def _read_template(template: str | None) -> str | None:
    """A chat template given as text, or as the path of a file that holds it."""
    if template is None or "{" in template or "\n" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise StartupError(f"--chat-template {template!r} can't be read: {error.strerror}") from None


def _read_json(folder: str, name: str) -> dict[str, Any]:
    path = Path(folder) / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} can't be read: {error}") from None
    return value if isinstance(value, dict) else {}


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def eos_token_ids(folder: str, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end a sequence: those of generation_config.json (else config.json), and the tokenizer's."""
    ids = _ids(_read_json(folder, "generation_config.json").get("eos_token_id"))
    if not ids:
        ids = _ids(_read_json(folder, "config.json").get("eos_token_id"))
    if tokenizer is not None:
        ids += _ids(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


def sampling_defaults(folder: str) -> dict[str, float | int]:
    """Values that generation_config.json puts in place of the usual defaults, by name, as vLLM takes them."""
    found = _read_json(folder, "generation_config.json")
    out: dict[str, float | int] = {
        name: found[name]
        for name in SAMPLING_DEFAULTS
        if isinstance(found.get(name), int | float) and not isinstance(found[name], bool)
    }
    if out:
        log.info("default sampling values from generation_config.json: %s", out)
    return out
