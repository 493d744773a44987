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
    admitted: Tensor,
    draws: Tensor,
    tokens: Tensor,
    blocks: Tensor,
    longest: int,
    token_ids: Tensor,
    lengths: Tensor,
    block_tables: Tensor,
    draw_floats: Tensor,
    draw_integers: Tensor,
) -> None:
    """Write A requests into the tensors of S slots.

    `admitted` [7, A] int64: slot; where its tokens begin in `tokens` int32, and how many they are; the same of its
    blocks in `blocks` int32; top_k and seed. `draws` [3, A] float32: temperature, top_p, min_p. `longest`: the most
    tokens or blocks of any. Written are `token_ids` [S, row_tokens] int32, `lengths` [S] int64, `block_tables`
    [S, max_blocks] int32, `draw_floats` [3, S] float32, `draw_integers` [2, S] int64.
    """
    _admit[(admitted.shape[1], tiles_of(longest, TILE))](
        admitted, draws, tokens, blocks, token_ids, lengths, block_tables, draw_floats, draw_integers,
        token_ids.stride(0), block_tables.stride(0), lengths.shape[0], TILE=TILE, num_warps=4,
    )  # fmt: skip


@triton.jit
def _admit(
    admitted, draws, tokens, blocks, token_ids, lengths, block_tables, draw_floats, draw_integers,
    row_tokens, row_blocks, slots, TILE: tl.constexpr,
):  # fmt: skip
    request, count = tl.program_id(0), tl.num_programs(0)
    mine = admitted + request
    slot = tl.load(mine)
    first, known = tl.load(mine + count), tl.load(mine + 2 * count)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tl.store(token_ids + slot * row_tokens + place, tl.load(tokens + first + place, place < known), place < known)
    first, held = tl.load(mine + 3 * count), tl.load(mine + 4 * count)
    tl.store(block_tables + slot * row_blocks + place, tl.load(blocks + first + place, place < held), place < held)
    if tl.program_id(1) == 0:
        tl.store(lengths + slot, known)
        for kind in tl.static_range(3):
            tl.store(draw_floats + kind * slots + slot, tl.load(draws + kind * count + request))
        for kind in tl.static_range(2):
            tl.store(draw_integers + kind * slots + slot, tl.load(mine + (5 + kind) * count))
