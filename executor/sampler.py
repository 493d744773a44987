"""From logits to tokens.

Owns the order of things (vLLM's): allowed tokens, min_tokens, logit_bias, penalties; the greedy choice; temperature,
min_p, top_k, top_p, the draw. Only rows that want something pay for it. Must not know slots, blocks or messages.
Shapes: R sampled rows, V vocabulary, D rows drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import logits as edits
from .logprobs import TopTensors, top_logprobs
from .random import gumbel
from .sampling_columns import Float, Int, PenaltyRows, RandomRows, SamplingRows, TokenLists
from .step_kernels import StepKernels, step_kernels
from .transfer import Transfer

GROUP = 256  # tokens that share one first-stage draw; part of what a seed means, so it never changes


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen, on the device. `best` is each row's largest logit: not finite means that the row is void."""

    tokens: Tensor  # [R] int64
    best: Tensor  # [R] float32
    logprobs: TopTensors | None = None  # of the rows that asked


class Sampler:
    """Chooses tokens on `transfer`'s device. `kernels`: to do it with; by default what that device has."""

    def __init__(self, transfer: Transfer, kernels: StepKernels | None = None) -> None:
        self._transfer = transfer
        self._kernels = kernels or step_kernels(transfer.device)

    def sample(self, logits: Tensor, rows: SamplingRows, token_ids: Tensor) -> Sampled:
        """`logits` [R, V] float32, which this may overwrite; `token_ids` [slots, row_tokens]: all known tokens."""
        find_best = best_tokens if self._kernels is None else self._kernels.best_tokens
        best, tokens = find_best(logits) if not rows.changes_logits else (None, None)
        raw = None
        if rows.logprob_rows is not None:
            (asked,) = self._transfer.up(rows.logprob_rows)
            raw = logits.index_select(0, asked) if rows.changes_logits or len(asked) < len(logits) else logits
        if best is None or tokens is None:
            self._edit(logits, rows, token_ids)
            best, tokens = find_best(logits)
        if rows.random is not None:
            tokens = self._draw(logits, best, tokens, rows.random)
        if raw is None or rows.logprob_counts is None:
            return Sampled(tokens, best)
        chosen = tokens.index_select(0, asked)
        return Sampled(tokens, best, top_logprobs(raw, chosen, int(rows.logprob_counts.max()), self._kernels))

    def _edit(self, logits: Tensor, rows: SamplingRows, token_ids: Tensor) -> None:
        if rows.allowed is not None:
            edits.allow_only(logits, *self._lists(rows.allowed))
        if rows.forbidden is not None:
            edits.forbid(logits, *self._lists(rows.forbidden))
        if rows.bias is not None:
            pairs = self._transfer.up(rows.bias.rows, rows.bias.tokens, rows.bias.values)
            (edits.add_bias if self._kernels is None else self._kernels.add_bias)(logits, *pairs)
        if rows.penalties is not None:
            self._penalize(logits, rows.penalties, token_ids)

    def _lists(self, lists: TokenLists) -> tuple[Tensor, Tensor]:
        rows, tokens = self._transfer.up(lists.rows, lists.tokens)
        return rows, tokens

    def _penalize(self, logits: Tensor, p: PenaltyRows, token_ids: Tensor) -> None:
        rows, slots, lengths, num_prompt, presence, frequency, repetition = self._transfer.up(
            p.rows, p.slots, p.lengths, p.num_prompt, p.presence, p.frequency, p.repetition
        )
        longest = int(p.lengths.max())
        if self._kernels is not None:
            self._kernels.penalize(
                logits, rows, token_ids, slots, longest, lengths, num_prompt, presence, frequency, repetition
            )
            return
        history = token_ids[:, :longest].index_select(0, slots).to(torch.int64)
        edits.penalize(logits, rows, history, lengths, num_prompt, presence, frequency, repetition)

    def _draw(self, logits: Tensor, best: Tensor, tokens: Tensor, r: RandomRows) -> Tensor:
        """`tokens` [R], with others for the rows that are not greedy."""
        rows, keys, temperature, top_k, top_p, min_p = self._transfer.up(
            r.rows, r.keys, r.temperature, r.top_k, r.top_p, r.min_p
        )
        if self._kernels is not None:
            self._kernels.draw(logits, best, tokens, rows, keys, temperature, top_k, top_p, min_p)
            return tokens
        vocab = logits.shape[1]
        chosen = logits if len(rows) == len(logits) else logits.index_select(0, rows)
        weights = (chosen - best.index_select(0, rows)[:, None]).div_(temperature[:, None]).exp_()
        cut = np.flatnonzero((r.top_k > 0) | (r.top_p < 1) | (r.min_p > 0))
        if len(cut):
            (where,) = self._transfer.up(cut)
            part = weights if len(cut) == len(rows) else weights.index_select(0, where)
            sizes = self._sizes(r.top_k[cut], r.top_p[cut], vocab)
            least = edits.least_kept(part, top_k[where], top_p[where], min_p[where], sizes)
            part.mul_(edits.at_least(part, least))
            if part is not weights:
                weights.index_copy_(0, where, part)
        if vocab % GROUP:
            weights = torch.nn.functional.pad(weights, (0, GROUP - vocab % GROUP))
        return tokens.index_copy(0, rows, draw(weights, keys).clamp_(max=vocab - 1))

    def _sizes(self, top_k: Int, top_p: Float, vocab: int) -> list[int]:
        """How many of the likeliest tokens to look at, in turn. A GPU, which must not wait for the host to see
        whether a size was enough, takes at once one that surely is."""
        open_ended = bool(((top_k == 0) & (top_p < 1)).any())
        most = int(top_k.max())
        if not open_ended and most == 0:
            return []
        surely = vocab if open_ended else next((s for s in (edits.FEW, edits.MANY) if s >= most), vocab)
        surely = min(surely, vocab)
        if not self._transfer.shared:
            return [surely]
        return [size for size in (edits.FEW, edits.MANY) if size < surely] + [surely]


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `logits` [R, V] float32 and its index; the first of equals, and the first NaN."""
    if logits.device.type == "cpu":
        # numpy's search is vectorised, torch's walks element by element
        tokens = torch.from_numpy(logits.numpy().argmax(-1))
        return logits.gather(1, tokens[:, None])[:, 0], tokens
    best, tokens = logits.max(dim=-1)
    return best, tokens


def draw(weights: Tensor, keys: Tensor) -> Tensor:
    """One token of each row with probability proportional to its weight.

    `weights` [D, G * GROUP] float32, at least one of each row positive; `keys` [D] int64: what the noise is a
    function of, together with the token. Returns [D] int64.

    The Gumbel-max trick (argmax of log-weight + Gumbel noise is such a draw) in two stages: first a group of
    neighbours by its summed weight, then one of the group. The same distribution, with noise for some hundred numbers
    instead of the whole vocabulary.
    """
    grouped = weights.view(len(weights), -1, GROUP)
    groups = torch.arange(grouped.shape[1], device=weights.device)
    group = (grouped.sum(-1).double().log_() + gumbel(keys[:, None], -1 - groups)).argmax(-1)
    members = grouped[torch.arange(len(weights), device=weights.device), group].double().log_()
    tokens = group[:, None] * GROUP + torch.arange(GROUP, device=weights.device)
    member = (members + gumbel(keys[:, None], tokens)).argmax(-1)
    return group * GROUP + member
