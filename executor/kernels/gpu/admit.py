"""What the device learns of newly admitted requests: tokens, block tables, and how each draws.

Owns the kernel behind `SlotTensors.admit`; must not know who owns a slot. It is one launch where single operations
would be five and two more for each request, for which a first token would wait.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .sizes import tiles_of

TILE = 1024  # tokens, or blocks, that one program copies


def admit(
    packed: Tensor,
    count: int,
    longest: int,
    token_ids: Tensor,
    lengths: Tensor,
    block_tables: Tensor,
    draw_floats: Tensor,
    draw_integers: Tensor,
) -> None:
    """Write `count` requests into the tensors of S slots.

    `packed` [N] int32 holds, one after the other: numbers [7, count] of two words each: slot, where its tokens begin,
    how many they are, where its blocks begin, how many they are, top_k and seed; the words of floats [3, count]:
    temperature, top_p and min_p; what tokens and blocks there are, from whose first word "where" counts. `longest`: the
    most tokens or blocks of any. Written are `token_ids` [S, row_tokens] int32, `lengths` [S] int64, `block_tables`
    [S, max_blocks] int32, `draw_floats` [3, S] float32, `draw_integers` [2, S] int64.
    """
    _admit[(count, tiles_of(longest, TILE))](
        packed, token_ids, lengths, block_tables, draw_floats, draw_integers,
        token_ids.stride(0), block_tables.stride(0), lengths.shape[0], TILE=TILE, num_warps=4,
    )  # fmt: skip


@triton.jit
def _admit(
    packed, token_ids, lengths, block_tables, draw_floats, draw_integers,
    row_tokens, row_blocks, slots, TILE: tl.constexpr,
):  # fmt: skip
    request, count = tl.program_id(0), tl.num_programs(0)
    numbers = packed.to(tl.pointer_type(tl.int64)) + request
    floats = (packed + 14 * count).to(tl.pointer_type(tl.float32)) + request
    words = packed + 17 * count
    slot, known, held = tl.load(numbers), tl.load(numbers + 2 * count), tl.load(numbers + 4 * count)
    tokens, blocks = words + tl.load(numbers + count), words + tl.load(numbers + 3 * count)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tl.store(token_ids + slot * row_tokens + place, tl.load(tokens + place, place < known), place < known)
    tl.store(block_tables + slot * row_blocks + place, tl.load(blocks + place, place < held), place < held)
    if tl.program_id(1) == 0:
        tl.store(lengths + slot, known)
        for kind in tl.static_range(3):
            tl.store(draw_floats + kind * slots + slot, tl.load(floats + kind * count))
        for kind in tl.static_range(2):
            tl.store(draw_integers + kind * slots + slot, tl.load(numbers + (5 + kind) * count))
