"""How long a step takes, learned from the steps that were seen.

    seconds = base + per_token * prefill_tokens + per_row * rows + per_context * context

Least squares of the relative error, so that a few slow steps (a page fault, another program) move it little; no
coefficient is negative; old steps are forgotten. Steps with and without prompt tokens are remembered apart: hours of
decoding don't wash out what a prompt costs. Plain Python floats in a fixed order, so that the same steps give the same
answers on every machine. Owns the fit; must not know requests, clocks or messages: times are handed in.
"""

from __future__ import annotations

from collections import deque

from .least_squares import non_negative

UNBOUNDED = 2**31 - 1  # tokens: the model knows of no cost that would set a limit

TERMS = 4
REMEMBERED = 128  # steps of each kind: an older one weighs less than 1/e
KEEP = 1.0 - 1.0 / REMEMBERED
LEAST_SECONDS = 1e-9  # what claims to have taken less was not measured
LEAST_STEPS = 8  # before anything is said
LEAST_PREFILLS = 4  # of them with prompt tokens, before a prompt's cost is told
REFIT_STEPS = 16  # a fit is used for so many further steps
FASTEST = 0.5  # of the time foretold: what was faster counts as this, or one failed step would outweigh many

Row = tuple[float, float, float, float]
Step = tuple[int, int, int, float]


class _Moments:
    """Normal equations of weighted rows, old ones fading: sum of x * x' and of x, for targets of 1."""

    def __init__(self) -> None:
        self.count = 0
        self.square = [[0.0] * TERMS for _ in range(TERMS)]
        self.right = [0.0] * TERMS

    def add(self, row: Row) -> None:
        self.count += 1
        for i in range(TERMS):
            line, value = self.square[i], row[i]
            self.right[i] = self.right[i] * KEEP + value
            for j in range(i, TERMS):
                line[j] = line[j] * KEEP + value * row[j]


class StepModel:
    """See the head of this file. `observe` each finished step, ask `seconds`, `prefill_rate`, `largest_prefill`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all: steps run on another device from now on."""
        self._prefills = _Moments()
        self._decodes = _Moments()
        # not worked in yet: nothing is computed as long as nobody asks
        self._fresh_prefills: deque[Step] = deque(maxlen=2 * REMEMBERED)
        self._fresh_decodes: deque[Step] = deque(maxlen=2 * REMEMBERED)
        self._coefficients: Row | None = None
        self._fitted_at = 0  # steps worked in by then

    def observe(self, prefill_tokens: int, rows: int, context: int, seconds: float) -> None:
        """A step took `seconds`, with `prefill_tokens` known tokens in chunks, `rows` rows of one token, and
        `context` tokens whose keys its rows read, their own among them."""
        if seconds >= LEAST_SECONDS:
            fresh = self._fresh_prefills if prefill_tokens else self._fresh_decodes
            fresh.append((prefill_tokens, rows, context, seconds))

    def seconds(self, prefill_tokens: int, rows: int, context: int) -> float | None:
        """What such a step is going to take, `context` as in `observe`; None while too few were seen."""
        fit = self._fit()
        if fit is None or (prefill_tokens and self._prefills.count < LEAST_PREFILLS):
            return None
        return fit[0] + fit[1] * prefill_tokens + fit[2] * rows + fit[3] * context

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second that a longer chunk adds to a step; None while too few prompts were seen."""
        fit = self._fit()
        if fit is None or self._prefills.count < LEAST_PREFILLS:
            return None
        cost = fit[1] + fit[3]
        return 1.0 / cost if cost > 0.0 else None

    def largest_prefill(self, bound_seconds: float, rows: int, context: int) -> int | None:
        """Prompt tokens that may join `rows` rows of one token, with `context` tokens read by the step without them,
        so that it stays under `bound_seconds`: 0 if it won't anyway, `UNBOUNDED` if they cost nothing, None while
        too few steps were seen."""
        fit = self._fit()
        if fit is None or self._prefills.count < LEAST_PREFILLS:
            return None
        left = bound_seconds - (fit[0] + fit[2] * rows + fit[3] * context)
        if left <= 0.0:
            return 0
        cost = fit[1] + fit[3]
        return min(UNBOUNDED, int(left / cost)) if cost * UNBOUNDED > left else UNBOUNDED

    # ---- the fit -------------------------------------------------------------------------------------------------

    def _fit(self) -> Row | None:
        for fresh, moments in ((self._fresh_prefills, self._prefills), (self._fresh_decodes, self._decodes)):
            while fresh:
                self._work_in(fresh.popleft(), moments)
        return self._coefficients

    def _work_in(self, step: Step, moments: _Moments) -> None:
        known, seconds = self._coefficients, step[3]
        row: Row = (1.0, float(step[0]), float(step[1]), float(step[2]))
        if known is not None:
            seconds = max(seconds, FASTEST * _dot(known, row))
        moments.add((row[0] / seconds, row[1] / seconds, row[2] / seconds, row[3] / seconds))
        count = self._prefills.count + self._decodes.count
        if count >= LEAST_STEPS and (known is None or count - self._fitted_at >= REFIT_STEPS):
            self._coefficients, self._fitted_at = self._solve(), count

    def _solve(self) -> Row:
        one, two = self._prefills, self._decodes
        square = [[0.0] * TERMS for _ in range(TERMS)]
        for i in range(TERMS):
            for j in range(i, TERMS):
                square[i][j] = square[j][i] = one.square[i][j] + two.square[i][j]
        right = [one.right[i] + two.right[i] for i in range(TERMS)]
        solution = non_negative(square, right)
        return (solution[0], solution[1], solution[2], solution[3])


def _dot(a: Row, b: Row) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
