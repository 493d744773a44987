"""All steps of a runner that are recorded: decode steps and short prompts.

Owns the order of the recordings, and the choice of the recording for a step; must not know how either is computed.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .backends.base import Piece
from .batch import PersistentBatch, Work
from .decode_graphs import DecodeGraphs
from .graph_recorder import Recorder
from .kv_cache import KVCache
from .layout import Int
from .models.base import Model
from .prompt_graphs import PromptGraphs
from .recordings import Recordings
from .sampling_columns import Choice
from .transfer import Transfer


class StepGraphs:
    """Recordings of steps over `batch`, none made yet; `before` as in `Recordings`."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        batch: PersistentBatch,
        recorder: Recorder,
        transfer: Transfer,
        before: Iterable[Piece] = (),
    ) -> None:
        self.recordings = Recordings(recorder, before)
        self.decode = DecodeGraphs(model, kv, batch.tensors, self.recordings, transfer)
        self.prompts = PromptGraphs(model, kv, batch, self.recordings, transfer)
        for choice in Choice:  # greedy ones first: all serve as soon as one is there
            self.decode.plan(choice)
            self.prompts.plan(choice)

    def replay(self, work: Work, choice: Choice) -> tuple[Int, Tensor] | None:
        """A step of `work`, or None where there is no recording for it.

        Returns the slots [R] that got a token, and what `pack` makes of the tokens; but for a decode step of
        `Choice.LOGITS` all its slots, which are as they were, and the logits [R, V].
        """
        if not work.decode:
            return self.prompts.replay(work, choice)
        result = self.decode.replay(work.slots, choice)
        return None if result is None else (work.slots, result)
