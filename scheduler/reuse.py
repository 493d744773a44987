"""What of a request is there already: in the device's prefix cache, in the host's, or saved at its preemption.

Pure functions of the books; must not change them, nor know when a copy pays.
"""

from __future__ import annotations

from .batch import FETCHED, Batch, Reuse
from .host_blocks import CACHED
from .request import Request


def reusable(batch: Batch, request: Request, *, fetch: bool) -> Reuse:
    """The longest start of `request` that is there. `fetch`: whether to copy blocks in from the host's prefix cache
    (what the request saved itself is copied in any case)."""
    size, host = batch.block_size, batch.host
    full = (len(request.tokens) - 1) // size  # the last token is to be computed
    hashes = request.hashes[:full] if request.takes_prefix_hits else []
    if not host.num_blocks:
        hits = batch.prefix.lookup(hashes)
        return Reuse(hits, hits, [], len(hits) * size)
    saved = host.saved.get(request.number)
    own = saved.blocks[: saved.tokens // size] if saved is not None else []
    here, there = batch.prefix.block_of, host.prefix.block_of if fetch else {}
    blocks: list[int] = []
    fetched: list[int] = []
    for index in range(max(len(hashes), len(own))):
        digest = hashes[index] if index < len(hashes) else b""
        block = here.get(digest, FETCHED)
        if block == FETCHED:
            source = own[index] if index < len(own) and own[index] != CACHED else there.get(digest)
            if source is None:
                break
            fetched.append(source)
        blocks.append(block)
    cached = len(blocks) * size
    if saved is not None and cached < saved.tokens < cached + size:  # its last block, which is not full
        fetched.append(saved.blocks[-1])
        blocks.append(FETCHED)
        cached = saved.tokens
    return Reuse(blocks, [block for block in blocks if block != FETCHED], fetched, cached)


def blocks_to_start(batch: Batch, request: Request, reuse: Reuse) -> int:
    """Blocks to take from the pool for `request` to start and say a token: a first growth is counted in, so that
    it is not thrown out in the very next step."""
    computed = min(len(request.tokens) + 1, request.limit - 1)
    refs = batch.pool.refs
    unused = sum(1 for block in reuse.shared if not refs[block]) if reuse.shared else 0
    return -(-computed // batch.block_size) - len(reuse.shared) + unused
