"""How each slot wants its tokens chosen, as columns; and the few rows of a step that want something special.

Owns the host side of sampling: parameters by slot, and `SamplingRows`, which lists for one step who needs what, so
that a step where all is greedy does nothing but an argmax. Must not know logits or the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ..protocol.messages import Admit
from .logits import FEW
from .random import stream_keys

GREEDY_BELOW = 1e-5  # a temperature under this is greedy

Int = NDArray[np.int64]
Float = NDArray[np.float32]


class Choice(IntEnum):
    """What the rows of a decode step need, the least first: a recorded step does what its most demanding row needs."""

    GREEDY = 0  # the largest logit
    DRAW = 1  # a draw, cut by min_p and by a top_k of at most `logits.FEW`, with or without top_p; or by anything
    LOGITS = 2  # anything else: the recorded step ends with its logits, for `sampler.py`


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Some rows' token ids: `rows[i]` indexes the sampled rows, `tokens[i]` the vocabulary, `values[i]` if any."""

    rows: Int
    tokens: Int
    values: Float


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """Rows whose earlier tokens change their logits. All arrays [P]; `rows` indexes the sampled rows."""

    rows: Int
    slots: Int
    lengths: Int
    num_prompt: Int
    presence: Float
    frequency: Float
    repetition: Float


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows that are not greedy. All arrays [D]; `rows` indexes the sampled rows."""

    rows: Int
    keys: Int  # of (seed, position), see random.py
    temperature: Float
    top_k: Int  # 0: all
    top_p: Float
    min_p: Float


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """What the R sampled rows of a step want beyond an argmax; None where nobody wants it."""

    allowed: TokenLists | None = None
    forbidden: TokenLists | None = None
    bias: TokenLists | None = None
    penalties: PenaltyRows | None = None
    random: RandomRows | None = None
    logprob_rows: Int | None = None
    logprob_counts: Int | None = None  # alternatives wanted by each of `logprob_rows`

    @property
    def changes_logits(self) -> bool:
        return any(part is not None for part in (self.allowed, self.forbidden, self.bias, self.penalties))


PLAIN = SamplingRows()


class SamplingColumns:
    """Sampling parameters of all slots."""

    def __init__(self, slots: int, vocab_size: int, any_cut: bool = False) -> None:
        """`any_cut`: a recorded draw may be cut in any way."""
        self.vocab_size = vocab_size
        self._any_cut = any_cut
        self.choice = np.full(slots, Choice.GREEDY, np.int8)
        self._draw_floats = np.zeros((3, slots), np.float32)
        self._draw_integers = np.zeros((2, slots), np.int64)
        self.temperature, self.top_p, self.min_p = self._draw_floats
        self.top_k, self.seed = self._draw_integers
        self.top_p[:] = 1.0
        self.presence = np.zeros(slots, np.float32)
        self.frequency = np.zeros(slots, np.float32)
        self.repetition = np.ones(slots, np.float32)
        self.penalized = np.zeros(slots, np.bool_)
        self.min_tokens = np.zeros(slots, np.int64)
        self.logprobs = np.full(slots, -1, np.int64)
        self.prompt_logprobs = np.full(slots, -1, np.int64)
        self._stop: dict[int, Int] = {}
        self._bias: dict[int, tuple[Int, Float]] = {}
        self._allowed: dict[int, Int] = {}

    def set(self, admit: Admit) -> str | None:
        """Take over a request's parameters. Returns what makes them impossible for this model, if anything."""
        slot, p = admit.slot, admit.params
        greedy = p.temperature < GREEDY_BELOW
        self.temperature[slot] = 0.0 if greedy else p.temperature
        self.top_k[slot] = p.top_k if 0 < p.top_k < self.vocab_size else 0
        self.top_p[slot] = p.top_p
        self.min_p[slot] = p.min_p
        self.presence[slot] = p.presence_penalty
        self.frequency[slot] = p.frequency_penalty
        self.repetition[slot] = p.repetition_penalty
        self.penalized[slot] = p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
        self.seed[slot] = admit.seed
        self.logprobs[slot] = -1 if p.logprobs is None else min(p.logprobs, self.vocab_size)
        # A request that comes back with output of its own has had its prompt reported before.
        again = len(admit.token_ids) > admit.num_prompt
        self.prompt_logprobs[slot] = (
            -1 if p.prompt_logprobs is None or again else min(p.prompt_logprobs, self.vocab_size)
        )
        self.min_tokens[slot] = p.min_tokens if admit.stop_token_ids else 0
        if self.min_tokens[slot]:
            stop = np.array(admit.stop_token_ids, np.int64)
            self._stop[slot] = stop[stop < self.vocab_size]
        if p.logit_bias:
            self._bias[slot] = (
                np.fromiter(p.logit_bias.keys(), np.int64, len(p.logit_bias)),
                np.fromiter(p.logit_bias.values(), np.float32, len(p.logit_bias)),
            )
        if p.allowed_token_ids is not None:
            self._allowed[slot] = np.unique(np.array(p.allowed_token_ids, np.int64))
        self.choice[slot] = self._choice(slot)
        return self._problem(admit)

    def clear(self, slots: NDArray[np.int32]) -> None:
        """Forget the lists of retired slots; the columns are overwritten by whoever comes next."""
        for lists in (self._stop, self._bias, self._allowed):
            if lists:
                for slot in slots.tolist():
                    lists.pop(slot, None)

    def rows(self, slots: Int, lengths: Int, num_prompt: Int) -> SamplingRows:
        """What the rows that sample want: slot `slots[i]` with `lengths[i]` known tokens. All arrays [R]."""
        if not self.choice[slots].any():
            return PLAIN
        logprobs = np.flatnonzero(self.logprobs[slots] >= 0)
        early = (lengths - num_prompt) < self.min_tokens[slots]
        return SamplingRows(
            allowed=self._lists(self._allowed, slots),
            forbidden=self._lists({s: self._stop[s] for s in slots[early].tolist()}, slots),
            bias=self._bias_lists(slots),
            penalties=self._penalty_rows(slots, lengths, num_prompt),
            random=self._random_rows(slots, lengths),
            logprob_rows=logprobs if len(logprobs) else None,
            logprob_counts=self.logprobs[slots[logprobs]] if len(logprobs) else None,
        )

    def draws(self, slots: Int) -> tuple[Float, Int]:
        """What draws in `slots` [A] depend on: temperature, top_p and min_p [3, A], top_k and seed [2, A]."""
        return self._draw_floats[:, slots], self._draw_integers[:, slots]

    def _choice(self, slot: int) -> Choice:
        if (
            self.logprobs[slot] >= 0
            or self.penalized[slot]
            or self.min_tokens[slot]
            or slot in self._bias
            or slot in self._allowed
        ):
            return Choice.LOGITS
        if self.temperature[slot] == 0:
            return Choice.GREEDY
        few = self._any_cut or (self.top_k[slot] == 0 and self.top_p[slot] >= 1) or 0 < self.top_k[slot] <= FEW
        return Choice.DRAW if few else Choice.LOGITS

    def _penalty_rows(self, slots: Int, lengths: Int, num_prompt: Int) -> PenaltyRows | None:
        rows = np.flatnonzero(self.penalized[slots])
        if not len(rows):
            return None
        s = slots[rows]
        return PenaltyRows(
            rows, s, lengths[rows], num_prompt[rows], self.presence[s], self.frequency[s], self.repetition[s]
        )

    def _random_rows(self, slots: Int, lengths: Int) -> RandomRows | None:
        rows = np.flatnonzero(self.temperature[slots] > 0)
        if not len(rows):
            return None
        s = slots[rows]
        keys = stream_keys(self.seed[s], lengths[rows])
        return RandomRows(rows, keys, self.temperature[s], self.top_k[s], self.top_p[s], self.min_p[s])

    def _bias_lists(self, slots: Int) -> TokenLists | None:
        if not self._bias:
            return None
        lists = self._lists({slot: tokens for slot, (tokens, _) in self._bias.items()}, slots)
        if lists is None:
            return None
        values = [self._bias[s][1] for s in slots.tolist() if s in self._bias]
        return TokenLists(lists.rows, lists.tokens, np.concatenate(values))

    @staticmethod
    def _lists(lists: dict[int, Int], slots: Int) -> TokenLists | None:
        found = [(row, lists[slot]) for row, slot in enumerate(slots.tolist()) if slot in lists] if lists else []
        if not found:
            return None
        rows = np.repeat([row for row, _ in found], [len(tokens) for _, tokens in found])
        return TokenLists(rows, np.concatenate([tokens for _, tokens in found]), np.empty(0, np.float32))

    def _problem(self, admit: Admit) -> str | None:
        for name, tokens in (
            ("prompt token id", admit.token_ids),
            ("logit_bias token id", self._bias.get(admit.slot, (np.empty(0, np.int64),))[0]),
            ("allowed_token_ids entry", self._allowed.get(admit.slot, np.empty(0, np.int64))),
        ):
            if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
                wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
                return f"{name} must be in [0, {self.vocab_size}), got {wrong}"
        return None
