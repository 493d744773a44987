"""Cases of the attention kernels, at the shapes of llama-8b and qwen3-0.6b.

Owns shapes, inputs and the count of what has to be read and multiplied; must not know how time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from device_timing import Case, copies_beyond_l2
from fast_inference.executor.backends.base import KVLayer, StepBatch
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.kernels.gpu import attention_decode, attention_prefill
from fast_inference.executor.kernels.gpu.attention_tiles import Tile
from torch import Tensor

BLOCK_SIZE = 16  # the engine's default
BACKEND = TritonBackend()


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one model: query heads, key/value heads, elements of each."""

    query: int
    kv: int
    size: int


@dataclass(frozen=True, slots=True)
class Shape:
    """`rows` of `query` tokens each, behind `before` that are cached."""

    rows: int
    query: int
    before: int


MODELS = {"llama-8b": Heads(32, 8, 128), "qwen3-0.6b": Heads(16, 8, 128)}
SHAPES = {
    "decode 64 x 4096": Shape(64, 1, 4095),
    "decode 256 x 600": Shape(256, 1, 599),
    "decode 32 x 640": Shape(32, 1, 639),
    "decode 1 x 4096": Shape(1, 1, 4095),
    "prefill 16 x 4096": Shape(16, 4096, 0),
    "prefill 2048 behind 6144": Shape(1, 2048, 6144),
    "prefill 4 x 700": Shape(4, 700, 0),
}
DECODE_TILES = [Tile(16, keys, warps, stages) for keys in (32, 64, 128) for warps in (2, 4, 8) for stages in (2, 4, 6)]
PREFILL_TILES = [
    Tile(rows, keys, warps, stages)
    for rows, warps in ((64, 4), (128, 4), (128, 8))
    for keys in (32, 64, 128)
    for stages in (2, 3, 4)
]


def attention_cases(device: torch.device, dtype: torch.dtype, tune: bool) -> Iterator[Case]:
    """All shapes of all models. With `tune`, each again with every tile of the lists above beside the default."""
    for model, heads in MODELS.items():
        for name, shape in SHAPES.items():
            tiles: list[Tile | None] = [None]
            if tune:
                tiles += DECODE_TILES if shape.query == 1 else PREFILL_TILES
            yield from make_cases(f"{model} {name}", heads, shape, device, dtype, tiles)


def make_cases(
    name: str, heads: Heads, shape: Shape, device: torch.device, dtype: torch.dtype, tiles: list[Tile | None]
) -> Iterator[Case]:
    """One case for each of `tiles` (None: the kernel and the tile that the backend takes), over the same inputs."""
    batch = make_batch(shape, device)
    tokens, length = shape.rows * shape.query, shape.before + shape.query
    kv_size = 2 * shape.rows * length * heads.kv * heads.size * dtype.itemsize
    pages = (batch.block_tables.numel(), heads.kv, BLOCK_SIZE, heads.size)
    layers = [
        KVLayer(*torch.randn(2, *pages, device=device, dtype=dtype).unbind()) for _ in range(copies_beyond_l2(kv_size))
    ]
    q = torch.randn(tokens, heads.query, heads.size, device=device, dtype=dtype)
    scale = heads.size**-0.5
    pairs = shape.rows * (shape.query * shape.before + shape.query * (shape.query + 1) // 2)
    for tile in tiles:
        yield Case(
            name=name if tile is None else f"{name} {tile.rows}x{tile.keys} {tile.warps}w {tile.stages}s",
            launches=[partial(_attend, q, kv, batch, scale, tile) for kv in layers],
            reference=partial(TorchBackend().attention, q, layers[0], batch, scale),
            size=kv_size + 2 * q.nbytes,
            operations=4 * pairs * heads.query * heads.size,
        )


def _attend(q: Tensor, kv: KVLayer, batch: StepBatch, scale: float, tile: Tile | None) -> Tensor:
    if tile is None:
        return BACKEND.attention(q, kv, batch, scale)
    kernel: Callable[..., None] = attention_prefill.prefill_attention
    if batch.num_decodes:
        kernel = attention_decode.decode_attention
    out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), device=q.device, dtype=q.dtype)
    kernel(q, kv, batch, scale, out, tile=tile)
    return out


def make_batch(shape: Shape, device: torch.device) -> StepBatch:
    """A step of equal rows, their blocks scattered over the cache."""
    rows, length = shape.rows, shape.before + shape.query
    width = -(-length // BLOCK_SIZE)
    tables = torch.randperm(rows * width, device=device).view(rows, width)
    positions = torch.arange(shape.before, length, device=device).repeat(rows)
    row = torch.arange(rows, device=device).repeat_interleave(shape.query)
    return StepBatch(
        positions=positions,
        slot_mapping=tables[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=tables.int(),
        query_start=torch.arange(rows + 1, device=device, dtype=torch.int32) * shape.query,
        seq_lens=torch.full((rows,), length, device=device, dtype=torch.int32),
        num_decodes=rows if shape.query == 1 else 0,
        max_query_len=shape.query,
        max_seq_len=length,
    )
