"""How long the outputs were that ended lately: what policies predict from.

Owns that history; must not know who asks.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from .request import Request, RequestState

HISTORY = 512
LEAST_HISTORY = 32  # short outputs end first: a small sample would promise too much


class OutputLengths:
    """Tokens of the last `HISTORY` outputs that came to their own end."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=HISTORY)
        self._total = 0
        self._sorted: NDArray[np.int64] | None = None

    def ended(self, request: Request, generated: int) -> None:
        """`request` is in a final state after `generated` tokens; what was aborted or failed tells nothing."""
        if request.state not in (RequestState.STOPPED, RequestState.LENGTH):
            return
        if len(self._lengths) == HISTORY:
            self._total -= self._lengths[0]
        self._lengths.append(generated)
        self._total += generated
        self._sorted = None

    @property
    def enough(self) -> bool:
        """Whether a prediction can be made."""
        return len(self._lengths) >= LEAST_HISTORY

    @property
    def mean(self) -> float:
        """Tokens of an average output; only where there are `enough`."""
        return self._total / len(self._lengths)

    def expected(self, generated: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens still to come of outputs that have `generated` [n] already: the mean of those that got further, less
        what they have; one where none did."""
        lengths = self.sorted()
        count = len(lengths)
        first = np.searchsorted(lengths, generated, side="right")
        beyond = np.append(np.cumsum(lengths[::-1])[::-1], 0)[first] / np.maximum(count - first, 1)
        return np.where(first < count, beyond - generated, 1.0)

    def sorted(self) -> NDArray[np.int64]:
        """The lengths, shortest first."""
        if self._sorted is None:
            self._sorted = np.sort(np.array(self._lengths, np.int64))
        return self._sorted
