"""An executor without a model: it keeps the persistent batch as `Step`s say, and distrusts every one of them.

Tokens are a function of (seed, position). What a block's place holds is the hash of all tokens up to it, so a block
that is shared wrongly, reused too early, copied wrongly or read before it was written shows at once. For tests of the
scheduler, and for others that want a device which answers at once. Knows the step protocol only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from fast_inference.protocol.messages import EngineInfo, RowFailed, Step, StepResult

SPOILT = -7  # what a place holds whose keys were not written, or were computed from such


def token_at(seed: int, position: int, vocab_size: int) -> int:
    """The token that a sequence with `seed` has at `position`, unless it is masked."""
    return (seed * 7919 + position * 104729 + (seed ^ position) % 13) % vocab_size


def make_info(**changes: object) -> EngineInfo:
    """An engine of 64 blocks of 4 tokens, 8 slots, 100 tokens of vocabulary."""
    facts: dict[str, object] = {
        "model": "fake",
        "max_model_len": 128,
        "vocab_size": 100,
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "dtype": "float32",
        "device": "cpu",
    }
    return EngineInfo(**{**facts, **changes})  # type: ignore[arg-type]


@dataclass
class Row:
    """A slot of the persistent batch."""

    tokens: list[int]
    num_prompt: int
    seed: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    blocks: list[int]
    computed: int
    failed: bool = False  # and so it stays, until it is retired
    chain: list[int] = field(default_factory=list)  # hash of the tokens up to each position


class FakeExecutor:
    """`run(step)` gives its `StepResult`; an AssertionError means that the scheduler broke the contract."""

    def __init__(self, info: EngineInfo, max_tokens: int = 1 << 30) -> None:
        self.info = info
        self.max_tokens = max_tokens
        self.rows: dict[int, Row] = {}
        self.memory: dict[tuple[int, int], tuple[int, int, int]] = {}  # (block, offset) -> (hash, step, slot)
        self.host: dict[int, list[tuple[int, int, int] | None]] = {}  # host block -> what a block held
        self.last = 0
        self.computed_tokens = 0

    def run(self, step: Step, failing: Collection[int] = ()) -> StepResult:
        """Do `step`; the work of slots in `failing` fails, if they have any."""
        assert step.number > self.last, "step numbers must rise"
        self.last = step.number
        self._apply(step)
        slots, counts = step.work_slots.tolist(), step.work_counts.tolist()
        assert slots and len(set(slots)) == len(slots), "a slot has work twice"
        assert counts == sorted(counts, key=lambda c: c > 1), "rows of one token must come first"
        assert sum(counts) <= self.max_tokens, "over the token budget"
        self.computed_tokens += sum(counts)
        for slot, count in zip(slots, counts, strict=True):
            self.rows[slot].failed |= slot in failing
            self._write(step.number, slot, count)
        sampled, failed = [], []
        for slot, count in zip(slots, counts, strict=True):
            row = self.rows[slot]
            sound = row.failed or self._read(step.number, slot, row.computed + count)
            row.computed += count
            samples = row.computed == len(row.tokens)
            if samples:
                token = self._sample(row)
                row.tokens.append(token if sound else (token + 1) % self.info.vocab_size)
            if row.failed:
                failed.append(RowFailed(slot=slot, message="as the test wants it"))
            elif samples:
                sampled.append((slot, row.tokens[-1]))
        return StepResult(
            number=step.number,
            slots=np.array([s for s, _ in sampled], np.int32),
            tokens=np.array([t for _, t in sampled], np.int32),
            failed=tuple(failed),
        )

    def _apply(self, step: Step) -> None:
        for slot in step.retire.tolist():
            assert self.rows.pop(slot, None) is not None, f"slot {slot} retired but empty"
        if len(step.swap_out_to) or len(step.swap_in_to):
            self._swap(step)
        for admit in step.admit:
            assert admit.slot not in self.rows, f"slot {admit.slot} admitted but taken"
            assert 0 <= admit.slot < self.info.max_num_seqs
            assert 0 <= admit.cached_len < len(admit.token_ids), "the last token must be computed"
            self.rows[admit.slot] = Row(
                tokens=admit.token_ids.tolist(),
                num_prompt=admit.num_prompt,
                seed=admit.seed,
                min_tokens=admit.params.min_tokens,
                stop_token_ids=frozenset(admit.stop_token_ids),
                blocks=admit.block_ids.tolist(),
                computed=admit.cached_len,
            )
        for slot, block in zip(step.grow_slots.tolist(), step.grow_blocks.tolist(), strict=True):
            self.rows[slot].blocks.append(block)
        for row in self.rows.values():
            assert len(set(row.blocks)) == len(row.blocks), "a block twice in one table"
            assert all(0 <= b < self.info.num_blocks for b in row.blocks)

    def _swap(self, step: Step) -> None:
        out_to, in_to = step.swap_out_to.tolist(), step.swap_in_to.tolist()
        assert len(set(out_to)) == len(out_to) and len(set(in_to)) == len(in_to), "two copies to one block"
        assert all(0 <= block < self.info.num_host_blocks for block in out_to)
        for block, target in zip(step.swap_out_from.tolist(), out_to, strict=True):
            self.host[target] = [self.memory.get((block, offset)) for offset in range(self.info.block_size)]
        for block, target in zip(step.swap_in_from.tolist(), in_to, strict=True):
            holders = [slot for slot, row in self.rows.items() if target in row.blocks]
            assert not holders, f"a copy overwrites block {target}, which slots {holders} hold"
            for offset, place in enumerate(self.host[block]):
                self.memory.pop((target, offset), None)
                if place is not None:
                    self.memory[target, offset] = (place[0], 0, -1)

    def _chain(self, row: Row, position: int) -> int:
        while len(row.chain) <= position:
            row.chain.append(hash((row.chain[-1] if row.chain else 0, row.tokens[len(row.chain)])))
        return row.chain[position]

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.blocks[position // self.info.block_size], position % self.info.block_size

    def _write(self, number: int, slot: int, count: int) -> None:
        row = self.rows[slot]
        assert 1 <= count <= len(row.tokens) - row.computed, "work beyond the known tokens"
        spoilt = row.failed or any(self._holds(row, position) == SPOILT for position in range(row.computed))
        for position in range(row.computed, row.computed + count):
            block, offset = self._place(row, position)
            others = [s for s, other in self.rows.items() if s != slot and block in other.blocks]
            assert not others, f"slot {slot} writes to block {block}, which slots {others} hold too"
            self.memory[block, offset] = (SPOILT if spoilt else self._chain(row, position), number, slot)

    def _holds(self, row: Row, position: int) -> int | None:
        place = self.memory.get(self._place(row, position))
        return None if place is None else place[0]

    def _read(self, number: int, slot: int, stop: int) -> bool:
        """Whether all that the row reads was computed from what it should."""
        row, sound = self.rows[slot], True
        for position in range(stop):
            content, step, writer = self.memory.get(self._place(row, position), (None, 0, -1))
            if content == SPOILT:
                sound = False
                continue
            assert content == self._chain(row, position), f"slot {slot} reads foreign keys at {position}"
            assert step < number or writer == slot, "read in the step that writes it"
        return sound

    def _sample(self, row: Row) -> int:
        token = token_at(row.seed, len(row.tokens), self.info.vocab_size)
        while len(row.tokens) - row.num_prompt < row.min_tokens and token in row.stop_token_ids:
            token = (token + 1) % self.info.vocab_size
        return token
