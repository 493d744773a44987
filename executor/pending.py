"""A step on its way through the device, and what becomes of it: the copies to the host, the wait, the `StepResult`.

Owns the way back. Every copy is enqueued when a `Pending` is made, so that nothing but the wait is left for `finish`;
must not know models, slots' state or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..protocol.messages import PromptLogprobs, RowFailed, StepResult, TopLogprobs
from .layout import Int
from .logprobs import TopTensors, on_wire
from .transfer import Mark, Transfer


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Log-probabilities of some prompt tokens of one slot."""

    slot: int
    positions: Int
    tokens: Tensor  # [N] int64
    alternatives: int
    top: TopTensors

    def down(self, transfer: Transfer) -> PromptPart:
        """The same on the host (after the transfer's next mark)."""
        return PromptPart(
            self.slot, self.positions, transfer.down(self.tokens), self.alternatives, self.top.down(transfer)
        )


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of the rows that asked: `rows` [N] index the sampled rows, `counts` [N] are the alternatives
    that each wants."""

    rows: Int
    counts: Int
    top: TopTensors

    def down(self, transfer: Transfer) -> RowLogprobs:
        """The same on the host (after the transfer's next mark)."""
        return RowLogprobs(self.rows, self.counts, self.top.down(transfer))


@dataclass(slots=True)
class Answer:
    """What a step leaves on the device for the host, and what is known of it already."""

    slots: Int  # [R] of the sampled rows
    packed: Tensor | None = None  # [2, R or more] int32, see `pack`; None where nothing was sampled
    logprobs: RowLogprobs | None = None
    prompts: list[PromptPart] = field(default_factory=list)
    failed: list[RowFailed] = field(default_factory=list)


def pack(tokens: Tensor, best: Tensor) -> Tensor:
    """`tokens` [R] int64 and the largest logit of each row, `best` [R] float32, as one [2, R] int32: one copy."""
    return torch.stack((tokens.to(torch.int32), best.view(torch.int32)))


class Pending:
    """A step on its way through the device.

    `started` and `computed`: marks around its work there; `copied_from`: before the copies that came first, if blocks
    were swapped. `before`: the end of the step before, if the time from there to here is a gap between two decode
    steps.
    """

    def __init__(
        self,
        number: int,
        answer: Answer,
        copied_from: Mark | None,
        started: Mark,
        computed: Mark,
        before: Mark | None,
        transfer: Transfer,
    ) -> None:
        self._number = number
        self._slots = answer.slots
        self._failed = answer.failed
        self._copied_from, self._started, self._computed, self._before = copied_from, started, computed, before
        self._packed = None if answer.packed is None else transfer.down(answer.packed)
        self._logprobs = None if answer.logprobs is None else answer.logprobs.down(transfer)
        self._prompts = [part.down(transfer) for part in answer.prompts]
        self._landed = transfer.mark()

    def done(self) -> bool:
        """Whether `finish` would return at once."""
        return self._landed.done()

    def finish(self, steps_to_record: int = 0) -> StepResult:
        """Wait for the device and say what it sampled, and how many recordings are still to be made."""
        self._landed.wait()
        tokens, logprobs, slots = np.empty(0, np.int32), None, np.empty(0, np.int32)
        if self._packed is not None:
            rows = len(self._slots)
            tokens, best = self._packed[0, :rows].numpy(), self._packed[1, :rows].view(torch.float32).numpy()
            good = np.isfinite(best)
            if not good.all():
                for slot, value in zip(self._slots[~good].tolist(), best[~good].tolist(), strict=True):
                    message = f"the model's logits are not finite: the largest is {value}"
                    self._failed.append(RowFailed(slot=slot, message=message))
            logprobs = self._sampled_logprobs(tokens, good)
            tokens, slots = tokens[good], self._slots[good].astype(np.int32)
        return StepResult(
            number=self._number,
            slots=slots,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(_prompt_on_wire(part) for part in self._prompts),
            failed=tuple(self._failed),
            seconds=self._computed.seconds_since(self._started),
            gap_seconds=None if self._before is None else self._started.seconds_since(self._before),
            copy_seconds=0.0 if self._copied_from is None else self._started.seconds_since(self._copied_from),
            steps_to_record=steps_to_record,
        )

    def _sampled_logprobs(self, tokens: np.ndarray, good: np.ndarray) -> TopLogprobs | None:
        if self._logprobs is None:
            return None
        rows, counts, top = self._logprobs.rows, self._logprobs.counts, self._logprobs.top
        if not good.all():
            kept = good[rows]
            which = torch.from_numpy(kept)
            top = TopTensors(top.own[which], top.ranks[which], top.ids[which], top.values[which])
            rows, counts = rows[kept], counts[kept]
        return on_wire(top, tokens[rows], (np.cumsum(good) - 1)[rows], counts)


def _prompt_on_wire(part: PromptPart) -> PromptLogprobs:
    alternatives = np.full(len(part.positions), part.alternatives)
    return PromptLogprobs(slot=part.slot, top=on_wire(part.top, part.tokens.numpy(), part.positions, alternatives))
