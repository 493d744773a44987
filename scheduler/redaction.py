"""A journal without what people wrote: token ids are replaced so that the core decides just as it did.

What the core reads off token ids is only which prompts begin alike (the prefix cache), which ids are in the
vocabulary, and which generated token ends a request. So in what comes in, token i becomes a keyed hash of tokens 0
to i: two sequences that begin alike still do, up to the same token. The key is random and is never written. A token
that ends its request stays as it is; an id outside the vocabulary becomes another such id. Stop strings, biases,
log-probabilities and error texts are left out. What goes out holds zeros for token ids, in the record and in the
replay.

Owns that mapping; must not know files or the record's form.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.messages import (
    Deliver,
    EngineInfo,
    ExecutorReady,
    Int32,
    Message,
    PromptLogprobs,
    RowFailed,
    Step,
    StepResult,
    Submit,
    TopLogprobs,
)
from ..protocol.sampling import SamplingParams
from .core import SchedulerCore

# Hashed ids lie above every real one, so that none is a stop id by chance.
HASHED = 1 << 30
VOCABULARY = 2**31 - 1  # of the redacted engine: the hashed ids are in it
OUTSIDE = 2**31 - 1  # for an id that no vocabulary holds: refused, or never generated, as the real one is
OUTSIDE_PROMPT = -1
KEY_BYTES = 32


class _Prefix:
    """The keyed hash of a sequence as it grows."""

    __slots__ = ("_hash", "lease", "length")

    def __init__(self, key: bytes, tokens: NDArray[np.int32], lease: int = 0) -> None:
        self._hash = blake2b(tokens.tobytes(), key=key, digest_size=4)
        self.length = len(tokens)
        self.lease = lease

    def add(self, token: bytes) -> int:
        """Append one token (4 bytes); returns its redacted id."""
        self._hash.update(token)
        self.length += 1
        return int.from_bytes(self._hash.digest(), "little") & (HASHED - 1) | HASHED


class Redactor:
    """Redacts what comes into `core`. Asked before the core takes the message in: what a token ends is read off the
    core's table. `key`: `KEY_BYTES` random bytes."""

    def __init__(self, core: SchedulerCore, key: bytes) -> None:
        self._core = core
        self._key = key
        self._vocab_size = HASHED  # until the executor is ready
        self._rows: dict[int, _Prefix] = {}  # by slot

    def incoming(self, message: Message) -> Message:
        """The message as the journal may hold it."""
        if isinstance(message, StepResult):
            return self._result(message)
        if isinstance(message, Submit):
            return self._submit(message)
        if isinstance(message, ExecutorReady):
            self._vocab_size = message.info.vocab_size
            self._rows.clear()
            return ExecutorReady(info=_hidden_info(message.info))
        return message

    def _submit(self, submit: Submit) -> Submit:
        tokens = submit.prompt_token_ids
        prefix = _Prefix(self._key, tokens[:0])
        ids = np.array([prefix.add(token.tobytes()) for token in tokens], np.int32)
        ids[(tokens < 0) | (tokens >= self._vocab_size)] = OUTSIDE_PROMPT
        salt = submit.cache_salt
        return replace(
            submit,
            prompt_token_ids=ids,
            params=_submitted_params(submit.params, self._vocab_size),
            seed=0,
            eos_token_ids=_stops(submit.eos_token_ids, self._vocab_size),
            cache_salt=blake2b(salt.encode(), key=self._key, digest_size=16).hexdigest() if salt else "",
        )

    def _result(self, result: StepResult) -> StepResult:
        return replace(
            result,
            tokens=self._sampled(result.slots, result.tokens),
            logprobs=None if result.logprobs is None else _hidden_top(result.logprobs),
            prompt_logprobs=tuple(PromptLogprobs(slot=p.slot, top=_hidden_top(p.top)) for p in result.prompt_logprobs),
            failed=tuple(RowFailed(slot=row.slot, message="") for row in result.failed),
        )

    def _sampled(self, slots: Int32, tokens: Int32) -> Int32:
        """Of rows that the core will pass over, be they late or nonsense, the ids don't matter."""
        out = np.zeros(len(tokens), np.int32)
        batch = self._core.batch
        if batch is None or len(slots) != len(tokens):
            return out
        table = batch.table
        rows = np.flatnonzero((slots >= 0) & (slots < table.slots))
        rows = rows[table.lease[slots[rows]] > 0]
        at, sampled = slots[rows], tokens[rows]
        lengths = table.length[at]
        ends = table.stop_hits(at, sampled, lengths + 1)
        leases = table.lease[at]
        for i, (slot, lease, length) in enumerate(zip(at.tolist(), leases.tolist(), lengths.tolist(), strict=True)):
            prefix = self._rows.get(slot)
            if prefix is None or prefix.lease != lease or prefix.length != length:
                prefix = self._rows[slot] = _Prefix(self._key, table.tokens[slot, :length], lease)
            hashed = prefix.add(sampled[i].tobytes())
            out[rows[i]] = sampled[i] if ends[i] else hashed
        return out


def hidden(message: Message) -> Message:
    """What went out, without token ids and texts; the same for what a replay of the redacted messages sends."""
    if isinstance(message, Deliver):
        return replace(
            message,
            opened=tuple(
                replace(o, params=_hidden_params(o.params), context_token_ids=_zeros(o.context_token_ids))
                for o in message.opened
            ),
            tokens=_zeros(message.tokens),
            logprobs=None if message.logprobs is None else _hidden_top(message.logprobs),
            prompt_logprobs=tuple(replace(part, top=_hidden_top(part.top)) for part in message.prompt_logprobs),
            ended=tuple(replace(end, message="") for end in message.ended),
        )
    if isinstance(message, Step):
        return replace(
            message,
            admit=tuple(
                replace(admit, token_ids=_zeros(admit.token_ids), params=_hidden_params(admit.params), seed=0)
                for admit in message.admit
            ),
        )
    return _hidden_info(message) if isinstance(message, EngineInfo) else message


def _hidden_info(info: EngineInfo) -> EngineInfo:
    """The engine that the redacted core believes in."""
    return replace(info, vocab_size=VOCABULARY)


def _submitted_params(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Without stop strings and biases; ids outside the vocabulary are marked as such, in every list that is checked.
    A stop token's id stays: it says nothing of the prompt, and the end by it must be the same."""
    foreign = any(token >= vocab_size for token in params.logit_bias)
    allowed = params.allowed_token_ids
    return params.replace(
        stop=(),
        stop_token_ids=_stops(params.stop_token_ids, vocab_size),
        logit_bias={OUTSIDE: 0.0} if foreign else {},
        allowed_token_ids=None if allowed is None else (OUTSIDE if any(t >= vocab_size for t in allowed) else 0,),
        seed=None,
    )


def _stops(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    return tuple(OUTSIDE if token >= vocab_size else token for token in ids)


def _hidden_params(params: SamplingParams) -> SamplingParams:
    return params.replace(stop=(), stop_token_ids=(), logit_bias={}, allowed_token_ids=None, seed=None)


def _zeros(ids: NDArray[Any]) -> NDArray[Any]:
    return np.zeros_like(ids)


def _hidden_top(top: TopLogprobs) -> TopLogprobs:
    return replace(top, ranks=_zeros(top.ranks), token_ids=_zeros(top.token_ids), values=_zeros(top.values))
