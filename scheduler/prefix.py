"""Which block holds which prefix: chained block hashes and the index over them.

The hash of a block covers its tokens and, through its parent, every token before them, down to a root made of the
cache salt. 16 bytes of BLAKE2b: two different prefixes with one hash are not to be expected, made on purpose or
not, so a hit needs no further look at tokens. Owns hashes; must not know reference counts or requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16


def extend_hashes(hashes: list[bytes], tokens: NDArray[np.int32], block_size: int, salt: str) -> None:
    """Append to `hashes` (of the first blocks of `tokens` [n] int32) those of all further full blocks."""
    start, stop = len(hashes), len(tokens) // block_size
    if start == stop:
        return
    parent = hashes[-1] if hashes else blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
    data = np.ascontiguousarray(tokens[start * block_size : stop * block_size], np.int32).tobytes()
    width = 4 * block_size
    for at in range(0, len(data), width):
        parent = blake2b(parent + data[at : at + width], digest_size=DIGEST_BYTES).digest()
        hashes.append(parent)


class PrefixIndex:
    """Hash of a full block's prefix <-> the one block that serves hits for it."""

    def __init__(self) -> None:
        self.block_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known run from the start of `hashes`."""
        found: list[int] = []
        get = self.block_of.get
        for digest in hashes:
            block = get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, hashes: list[bytes], blocks: list[int]) -> None:
        """From now on each of `blocks` serves hits for its hash, unless another block does already."""
        block_of, hash_of = self.block_of, self.hash_of
        for digest, block in zip(hashes, blocks, strict=True):
            if digest not in block_of and block not in hash_of:
                block_of[digest] = block
                hash_of[block] = digest

    def forget(self, block: int) -> None:
        """`block` is about to hold something else, or never got its content."""
        digest = self.hash_of.pop(block, None)
        if digest is not None:
            del self.block_of[digest]
