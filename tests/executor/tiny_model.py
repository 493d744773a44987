"""A one-layer attention model over paged keys and values, small enough to be checked against a dense twin; and a
driver that plays scheduler for a `Runner`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fast_inference.executor.backends.base import KVLayer, StepBatch
from fast_inference.executor.batch import PersistentBatch
from fast_inference.executor.graph_recorder import Recorder
from fast_inference.executor.kv_cache import KVCache, KVPlan, bytes_per_block
from fast_inference.executor.models.base import ModelSpec
from fast_inference.executor.pending import Pending
from fast_inference.executor.runner import Runner
from fast_inference.executor.step_graphs import StepGraphs
from fast_inference.executor.transfer import Transfer
from fast_inference.protocol.messages import Admit, Step, StepResult
from fast_inference.protocol.sampling import SamplingParams
from torch import Tensor

VOCAB, WIDTH, LENGTH = 300, 16, 256
GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


class TinyModel:
    """Embedding, one head of attention, output. `poison`: a token that makes `forward` raise when it is in a batch;
    `blight`: one whose row gets NaN logits."""

    def __init__(self, device: str = "cpu", recompute: bool = False) -> None:
        self.spec = ModelSpec("Tiny", 1, 1, WIDTH, VOCAB, LENGTH, torch.float32, recompute)
        g = torch.Generator().manual_seed(3)
        self.embed = torch.randn(VOCAB, WIDTH, generator=g).to(device)
        self.place = torch.randn(LENGTH + 1, WIDTH, generator=g).to(device)
        self.qkv = torch.randn(3 * WIDTH, WIDTH, generator=g).to(device) / WIDTH**0.5
        self.out = torch.randn(VOCAB, WIDTH, generator=g).to(device) / 2
        self.poison, self.blight = -1, -1
        self.batches: list[list[int]] = []  # rows and tokens of each forward

    def forward(self, token_ids: Tensor, batch: StepBatch, kv: list[KVLayer], logits_at: Tensor | None) -> Tensor:
        self.batches.append(batch.query_start.tolist())
        if bool((token_ids == self.poison).any()):
            raise KeyError("poison")
        q, k, v = self._project(token_ids, batch.positions)
        mixed = torch.empty_like(q)
        starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
        if not self.spec.recompute:
            size = kv[0].keys.shape[2]
            kv[0].keys[batch.slot_mapping // size, 0, batch.slot_mapping % size] = k
            kv[0].values[batch.slot_mapping // size, 0, batch.slot_mapping % size] = v
        for row, length in enumerate(lengths):
            here = slice(starts[row], starts[row + 1])
            keys, values = k[here], v[here]
            if not self.spec.recompute:
                blocks = batch.block_tables[row].long()
                keys = kv[0].keys[blocks, 0].reshape(-1, WIDTH)[:length]
                values = kv[0].values[blocks, 0].reshape(-1, WIDTH)[:length]
            mixed[here] = self._attend(q[here], batch.positions[here], keys, values)
        logits = mixed @ self.out.T
        logits[token_ids == self.blight] = float("nan")
        return logits if logits_at is None else logits[logits_at]

    def dense(self, tokens: Sequence[int]) -> Tensor:
        """Logits [len(tokens), VOCAB] of one request, without blocks."""
        ids = torch.tensor(tokens, device=self.embed.device)
        positions = torch.arange(len(tokens), device=ids.device)
        q, k, v = self._project(ids, positions)
        return self._attend(q, positions, k, v) @ self.out.T

    def generate(self, prompt: Sequence[int], new: int) -> list[int]:
        """The greedy continuation."""
        tokens = list(prompt)
        for _ in range(new):
            tokens.append(int(self.dense(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _project(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed[ids] + self.place[positions]
        q, k, v = (x @ self.qkv.T).chunk(3, dim=-1)
        return q, k, v

    @staticmethod
    def _attend(q: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.T
        future = torch.arange(len(k), device=k.device) > positions[:, None]
        return torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ v


class Driver:
    """Scheduler for tests: hands out slots and scattered blocks, and sends steps to a `Runner`."""

    def __init__(
        self,
        model: TinyModel,
        slots: int = 4,
        block_size: int = 4,
        num_blocks: int = 96,
        max_model_len: int = 64,
        graphs: bool = False,
    ) -> None:
        """`graphs`: steps are recorded, all of them before the first."""
        self.transfer = transfer = Transfer(model.embed.device)
        plan = KVPlan(num_blocks, max_model_len, bytes_per_block(model.spec, block_size))
        batch = PersistentBatch(slots, max_model_len, block_size, num_blocks, VOCAB, transfer)
        self.kv = KVCache(model.spec, plan, block_size, transfer.device)
        recorder = Recorder(transfer.device)
        self.graphs = StepGraphs(model, self.kv, batch, recorder, transfer)
        self.runner = Runner(model, batch, self.kv, transfer)
        if graphs:
            self.runner.graphs = self.graphs
        with torch.inference_mode():
            while graphs and self.graphs.recordings.missing:
                self.graphs.recordings.go_on()
        self.block_size = block_size
        self.free = np.random.default_rng(1).permutation(num_blocks).tolist()
        self.blocks: dict[int, list[int]] = {}
        self.length: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.out: dict[int, list[int]] = {}
        self.number = 0
        self.admits: list[Admit] = []
        self.retires: list[int] = []

    def admit(
        self,
        slot: int,
        tokens: Sequence[int],
        params: SamplingParams = GREEDY,
        seed: int = 0,
        num_prompt: int | None = None,
        stop: tuple[int, ...] = (),
        cached: Sequence[int] = (),
    ) -> None:
        """A new request, told with the next step. `cached`: blocks that hold its first tokens already."""
        wanted = -(-len(tokens) // self.block_size)
        self.blocks[slot] = [*cached, *(self.free.pop() for _ in range(wanted - len(cached)))]
        self.length[slot], self.computed[slot] = len(tokens), min(len(cached) * self.block_size, len(tokens) - 1)
        self.out[slot] = []
        self.admits.append(
            Admit(
                slot=slot,
                token_ids=np.array(tokens, np.int32),
                num_prompt=len(tokens) if num_prompt is None else num_prompt,
                params=params,
                seed=seed,
                block_ids=np.array(self.blocks[slot], np.int32),
                cached_len=self.computed[slot],
                stop_token_ids=stop,
            )
        )

    def retire(self, slot: int) -> None:
        """Its slot and blocks are free from the next step on."""
        self.free.extend(self.blocks.pop(slot))
        self.retires.append(slot)

    def launch(self, work: dict[int, int], copies: Sequence[tuple[int, int]] = ()) -> Pending:
        """Send one step with `work` (slot -> tokens), growing slots that cross a block boundary."""
        grow = []
        for slot, count in work.items():
            self.computed[slot] += count
            while len(self.blocks[slot]) * self.block_size < self.computed[slot]:
                self.blocks[slot].append(self.free.pop())
                grow.append((slot, self.blocks[slot][-1]))
            self.length[slot] += self.computed[slot] == self.length[slot]
        order = sorted(work, key=lambda slot: work[slot] > 1)
        self.number += 1
        step = Step(
            number=self.number,
            retire=np.array(self.retires, np.int32),
            copy_from=np.array([source for source, _ in copies], np.int32),
            copy_to=np.array([target for _, target in copies], np.int32),
            admit=tuple(self.admits),
            grow_slots=np.array([slot for slot, _ in grow], np.int32),
            grow_blocks=np.array([block for _, block in grow], np.int32),
            work_slots=np.array(order, np.int32),
            work_counts=np.array([work[slot] for slot in order], np.int32),
        )
        self.admits, self.retires = [], []
        with torch.inference_mode():
            return self.runner.launch(step)

    def finish(self, pending: Pending) -> StepResult:
        """Its result, with the tokens noted in `out`."""
        with torch.inference_mode():
            result = pending.finish()
        for slot, token in zip(result.slots.tolist(), result.tokens.tolist(), strict=True):
            self.out[slot].append(token)
        return result

    def step(self, work: dict[int, int]) -> StepResult:
        return self.finish(self.launch(work))

    def finish_prompts(self, chunk: int = 64) -> list[StepResult]:
        """Work off all known tokens, `chunk` of each request at a time."""
        results = []
        while left := {s: self.length[s] - self.computed[s] for s in self.blocks if not self.out[s]}:
            results.append(self.step({s: min(chunk, n) for s, n in left.items()}))
        return results

    def decode(self, steps: int) -> list[StepResult]:
        return [self.step(dict.fromkeys(self.blocks, 1)) for _ in range(steps)]


def alone(
    model: TinyModel, tokens: Sequence[int], params: SamplingParams, seed: int, new: int, stop: tuple[int, ...] = ()
) -> list[int]:
    """What a request says in a batch of its own, its prompt in one piece."""
    driver = Driver(model)
    driver.admit(2, tokens, params, seed, stop=stop)
    driver.finish_prompts()
    driver.decode(new - 1)
    return driver.out[2]
