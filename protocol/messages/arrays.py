"""What messages are made of beside plain fields: arrays with their byte order, and log-probabilities.

An array field that is left out is an empty array, always the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

Int32 = Annotated[NDArray[np.int32], "<i4"]
Int64 = Annotated[NDArray[np.int64], "<i8"]
Float32 = Annotated[NDArray[np.float32], "<f4"]

_NO_INT32: NDArray[np.int32] = np.empty(0, np.int32)
_NO_INT64: NDArray[np.int64] = np.empty(0, np.int64)
_NO_FLOAT32: NDArray[np.float32] = np.empty(0, np.float32)
for _empty in (_NO_INT32, _NO_INT64, _NO_FLOAT32):
    _empty.flags.writeable = False


def no_int32() -> NDArray[np.int32]:
    return _NO_INT32


def no_int64() -> NDArray[np.int64]:
    return _NO_INT64


def no_float32() -> NDArray[np.float32]:
    return _NO_FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs:
    """Log-probabilities of some rows, as ragged columns.

    Row j belongs to `rows[j]` (what that indexes is said where this is used) and holds `counts[j]` entries of
    `token_ids` and `values`: first the token itself, then the likeliest ones, best first. `ranks[j]` is the
    token's own rank in the vocabulary, 1 the likeliest.
    """

    rows: Int32 = field(default_factory=no_int32)
    counts: Int32 = field(default_factory=no_int32)
    ranks: Int32 = field(default_factory=no_int32)
    token_ids: Int32 = field(default_factory=no_int32)
    values: Float32 = field(default_factory=no_float32)
