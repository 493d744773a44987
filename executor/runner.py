"""One step of the engine on the device: from a `Step` to a `Pending`.

Owns the order of a step (apply, lay out, forward, sample) and the choice between a recorded decode step and one that
is launched operation by operation. `launch` enqueues all of it and waits for nothing, so that a GPU gets step N+1
while N runs. Must not know sockets or how models compute.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocol.errors import EngineError
from ..protocol.messages import RowFailed, Step
from .backends.base import StepBatch
from .batch import PersistentBatch, Work
from .host_pool import HostPool
from .kv_cache import KVCache
from .layout import Int, Pass, lay_out, passes
from .logprobs import top_logprobs
from .models.base import Model
from .pending import Answer, Pending, PromptPart, RowLogprobs, pack
from .sampler import Sampler
from .sampling_columns import Choice
from .step_graphs import StepGraphs
from .transfer import Mark, Transfer

log = logging.getLogger(__name__)

PROMPT_LOGITS_BYTES = 128 << 20  # of float32 logits that a pass keeps for prompt logprobs


@dataclass(slots=True)
class _Outcome:
    """What the passes of a step have left on the device so far."""

    sampled_rows: list[Int] = field(default_factory=list)  # indexes into the step's work, parallel to `logits`
    logits: list[Tensor] = field(default_factory=list)
    prompts: list[PromptPart] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)  # by index into the step's work


class Runner:
    """Runs steps on one device. Not thread-safe; every call in the same thread, under `torch.inference_mode`.

    `host`: where blocks are swapped to. `graphs`: recordings of steps over `batch`; with None, as at first,
    every step is launched operation by operation.
    """

    def __init__(
        self,
        model: Model,
        batch: PersistentBatch,
        kv: KVCache,
        transfer: Transfer,
        host: HostPool | None = None,
    ) -> None:
        self.batch = batch
        self.graphs: StepGraphs | None = None
        self._host = host
        self._model = model
        self.kv = kv
        self._transfer = transfer
        self._sampler = Sampler(transfer)
        self._last_decode: Mark | None = None  # the end of the step before, if it only decoded
        self._prompt_limit = max(64, PROMPT_LOGITS_BYTES // (4 * model.spec.vocab_size))

    def launch(self, step: Step) -> Pending:
        """Enqueue all of `step`. Raises `EngineError` for a step that contradicts the batch, and where the device
        itself is at its end (out of memory, lost)."""
        batch = self.batch
        copied_from = self._move_blocks(step)
        started = self._transfer.mark()
        batch.apply(step)
        failed = []
        if batch.failed:
            hopeless = [s for s in step.work_slots.tolist() if s in batch.failed]
            failed = [RowFailed(slot=slot, message=batch.failed[slot]) for slot in hopeless]
        work = batch.take_work(step)
        decode = work.decode
        answer = self._replayed(work, self.graphs) if self.graphs is not None else None
        if answer is None:
            answer = self._computed(work)
        answer.failed[:0] = failed
        computed = self._transfer.mark()
        # A request that starts comes after a pause as likely as not, which would be no gap.
        before = self._last_decode if decode and not step.admit and copied_from is None else None
        self._last_decode = computed if decode else None
        return Pending(step.number, answer, copied_from, started, computed, before, self._transfer)

    def _move_blocks(self, step: Step) -> Mark | None:
        """Copies out of the device before all that writes to it, copies into it before all that reads them. Returns
        the time before blocks were swapped, if any were."""
        began = None
        if len(step.swap_out_to) or len(step.swap_in_to):
            if self._host is None:
                raise EngineError(f"step {step.number} swaps blocks, but there is no host memory for them")
            began = self._transfer.mark()
            self._host.swap_out(step.swap_out_from.astype(np.int64), step.swap_out_to.astype(np.int64))
        if len(step.copy_from):
            self.kv.copy_blocks(*self._transfer.up(step.copy_from.astype(np.int64), step.copy_to.astype(np.int64)))
        if self._host is not None and began is not None:
            self._host.swap_in(step.swap_in_from.astype(np.int64), step.swap_in_to.astype(np.int64))
        return began

    def _replayed(self, work: Work, graphs: StepGraphs) -> Answer | None:
        """A step from its recording, or None where there is none for it."""
        sampling, slots = self.batch.sampling, work.slots
        if not len(slots) or (not work.decode and (sampling.prompt_logprobs[slots] >= 0).any()):
            return None
        choice = Choice(int(sampling.choice[slots].max()))
        try:
            found = graphs.replay(work, choice)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise _lost(error, self._transfer.device) from error
        if found is None:
            return None
        if choice is not Choice.LOGITS:
            return Answer(*found)
        result = found[1]
        return self._sampled(work, _Outcome([np.arange(len(slots))], [result]))

    def _computed(self, work: Work) -> Answer:
        """The step pass by pass, operation by operation."""
        outcome = _Outcome()
        for part in self._passes(work):
            self._run_or_isolate(part, work, outcome)
        answer = self._sampled(work, outcome) if outcome.logits else Answer(work.slots[:0])
        answer.prompts = outcome.prompts
        for row, message in outcome.failed.items():
            slot = int(work.slots[row])
            self.batch.failed[slot] = message
            answer.failed.append(RowFailed(slot=slot, message=message))
        return answer

    def _sampled(self, work: Work, outcome: _Outcome) -> Answer:
        """Choose a token for each row that has logits, and make it known to its slot."""
        batch = self.batch
        rows = outcome.sampled_rows[0] if len(outcome.sampled_rows) == 1 else np.concatenate(outcome.sampled_rows)
        logits = outcome.logits[0] if len(outcome.logits) == 1 else torch.cat(outcome.logits)
        slots, lengths = work.slots[rows], work.lengths[rows]
        wants = batch.sampling.rows(slots, lengths, batch.num_prompt[slots])
        sampled = self._sampler.sample(logits, wants, batch.tensors.token_ids)
        at, known = self._transfer.up(slots, lengths)
        batch.tensors.append(at, known, sampled.tokens)
        logprobs = None
        if sampled.logprobs is not None and wants.logprob_rows is not None and wants.logprob_counts is not None:
            logprobs = RowLogprobs(wants.logprob_rows, wants.logprob_counts, sampled.logprobs)
        return Answer(slots, pack(sampled.tokens, sampled.best), logprobs)

    def _passes(self, work: Work) -> list[Pass]:
        """How the step goes through the model; nothing for a step without work."""
        batch = self.batch
        asked = batch.sampling.prompt_logprobs[work.slots] >= 0
        if self._model.spec.recompute:
            # Every known token of the rows that reach their end, and no keys kept in between.
            rows = np.flatnonzero(work.samples)
            lengths = work.lengths[rows]
            first = asked[rows] & (lengths == batch.num_prompt[work.slots[rows]])
            kept = np.where(first, lengths - 1, 0)
            whole = Pass(rows, work.slots[rows], np.zeros_like(lengths), lengths, work.samples[rows], kept)
            return [whole] if len(rows) else []
        if not len(work.slots):
            return []
        kept = np.zeros_like(work.counts)
        if asked.any():
            inside = np.minimum(work.starts + work.counts, batch.num_prompt[work.slots] - 1) - work.starts
            kept = np.where(asked, np.maximum(inside, 0), 0)
        return list(passes(work.slots, work.starts, work.counts, work.samples, kept, self._prompt_limit))

    def _run_or_isolate(self, part: Pass, work: Work, outcome: _Outcome) -> None:
        """Run a pass; where the model raises, run each of its rows alone, so that only the guilty ones fail."""
        if outcome.failed:
            part = _without(part, outcome.failed)
        if not len(part.rows):
            return
        try:
            self._run(part, outcome)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise _lost(error, self._transfer.device) from error
        except EngineError:
            raise
        except Exception as error:
            if len(part.rows) == 1:
                log.exception("slot %d failed: the model raised", int(part.slots[0]))
                outcome.failed[int(part.rows[0])] = f"the model raised {type(error).__name__}: {error}"
                return
            log.warning("the model raised %s for %d rows: trying each alone", type(error).__name__, len(part.rows))
            for i in range(len(part.rows)):
                self._run_or_isolate(part.only(i), work, outcome)

    def _run(self, part: Pass, outcome: _Outcome) -> None:
        batch, recompute = self.batch, self._model.spec.recompute
        layout = lay_out(part, None if recompute else batch.tables, batch.block_size, batch.row_tokens)
        positions, flat_tokens, slot_mapping, logits_at, slots, query_start, seq_lens = self._transfer.up(
            layout.positions,
            layout.flat_tokens,
            layout.slot_mapping,
            layout.logits_at,
            part.slots,
            layout.query_start,
            layout.seq_lens,
        )
        width = 0 if recompute else -(-layout.max_seq_len // batch.block_size)
        step_batch = StepBatch(
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=batch.tensors.block_tables[:, :width].index_select(0, slots),
            query_start=query_start,
            seq_lens=seq_lens,
            num_decodes=0 if recompute else layout.num_decodes,
            max_query_len=layout.max_query_len,
            max_seq_len=layout.max_seq_len,
        )
        known = batch.tensors.token_ids.view(-1)
        token_ids = known.index_select(0, flat_tokens).to(torch.int64)
        logits = self._model.forward(token_ids, step_batch, self.kv.layers, logits_at)
        wanted = (len(layout.logits_at), self._model.spec.vocab_size)
        if tuple(logits.shape) != wanted:
            raise ValueError(f"logits have shape {tuple(logits.shape)}, wanted {wanted}")
        rows = part.rows[part.samples]
        if len(layout.logits_at) > len(rows):
            outcome.prompts.extend(self._prompt_parts(part, logits[len(rows) :]))
        if len(rows):
            outcome.sampled_rows.append(rows)
            outcome.logits.append(logits[: len(rows)])

    def _prompt_parts(self, part: Pass, logits: Tensor) -> list[PromptPart]:
        parts, end = [], 0
        for row in np.flatnonzero(part.prompt_counts).tolist():
            slot, count, first = int(part.slots[row]), int(part.prompt_counts[row]), int(part.starts[row]) + 1
            start, end = end, end + count
            tokens = self.batch.tensors.token_ids[slot, first : first + count].to(torch.int64)
            alternatives = int(self.batch.sampling.prompt_logprobs[slot])
            top = top_logprobs(logits[start:end], tokens, alternatives)
            parts.append(PromptPart(slot, np.arange(first, first + count), tokens, alternatives, top))
        return parts


def _without(part: Pass, failed: dict[int, str]) -> Pass:
    keep: NDArray[np.bool_] = ~np.isin(part.rows, list(failed))
    return Pass(
        part.rows[keep],
        part.slots[keep],
        part.starts[keep],
        part.counts[keep],
        part.samples[keep],
        part.prompt_counts[keep],
    )


def _lost(error: Exception, device: torch.device) -> EngineError:
    reason = str(error).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        return EngineError(
            f"out of memory on {device} during a step ({reason}): "
            "lower gpu_memory_utilization, max_num_seqs or max_num_batched_tokens"
        )
    return EngineError(f"{device} failed during a step: {reason}")
