"""Which products of a model this project's kernels do faster than cuBLAS: measured once on a card, on its weights.

Owns the inputs, the clock and the order of measurements; must not know models, or where the table is kept. It is done
in pieces, between which the engine may run steps. All kernels are compiled first, side by side: the compiler takes far
longer than the measuring.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels.gpu.card import is_hopper, processors
from ..kernels.gpu.failures import LAUNCH_FAILURES
from ..kernels.gpu.linear_plan import Plan
from ..kernels.gpu.linear_table import BUCKETS, MEASURED, LinearTable, Operation, Product, bucket, candidates, fastest
from ..side_by_side import at_home_on
from ..threads import usable_cores
from .base import Piece
from .check import TOLERANCE, relative_difference
from .launch_clock import seconds_per_launch
from .triton_linear import HALVES, TritonLinear

log = logging.getLogger(__name__)

LAUNCHES = 24  # in a graph, on as many different weights as there are
MEASURED_BYTES = 1 << 30  # of weights, of which no graph reads many more
EPS = 1e-5
PATIENCE = 0.02  # seconds for which a piece waits for the compiler
MOST_THREADS = 16  # that compile; with more, Python's share of it leaves none to the others
LARGEST_WEIGHT = 256 << 20  # bytes: a larger one (that of the logits) cuBLAS reads at the memory's rate
# Of a plan: the compiler's and the driver's, and what another version of the compiler may no longer have.
FAILURES = (*LAUNCH_FAILURES, AssertionError, ValueError, ImportError, AttributeError, TypeError)


@dataclass(frozen=True, slots=True)
class Trial:
    """One product, with all layers that have such a one, and inputs for it."""

    product: Product
    linears: Sequence[TritonLinear]
    x: Tensor
    residual: Tensor
    norm: Tensor

    def run(self, linear: TritonLinear, plan: Plan | None) -> Tensor:
        """The operation on the weights of `linear`: None is cuBLAS with the kernel of what follows."""
        if self.product.operation == "linear_silu_mul":
            return linear.multiply_silu_mul(plan, self.x)
        if self.product.operation == "linear":
            return linear.multiply(plan, self.x)
        return linear.multiply_add_norm(plan, self.x, self.residual, self.norm, EPS)[0]


Attempt = tuple[Trial, Tensor, Plan]  # what the plan's kernel must give is in the middle


def tune(linears: Sequence[TritonLinear], table: LinearTable, most_rows: int) -> Generator[Piece, None, int]:
    """Fill `table` with the choice for every operation that `linears` were asked for, for up to `most_rows` rows, where
    it has none yet. Yields when a piece of that is done, or has been waited for long enough; returns how many choices
    are new."""
    trials = list(_trials(linears, table, most_rows))
    if not trials:
        return 0
    device = trials[0].x.device
    attempts: list[Attempt] = []
    for trial in trials:
        expected = trial.run(trial.linears[0], None)  # here: each thread that asks cuBLAS costs workspace for ever
        attempts += (
            (trial, expected, plan) for plan in candidates(trial.product, processors(device), is_hopper(device))
        )
    right = yield from _right_plans(attempts)
    for done, trial in enumerate(trials, 1):
        launches = min(LAUNCHES, MEASURED_BYTES // trial.linears[0].weight.nbytes)
        seconds: dict[Plan | None, float] = {}
        for choice in (None, *right.get(trial.product, [])):
            layers = [partial(trial.run, linear, choice) for linear in trial.linears[:launches]]
            seconds[choice] = seconds_per_launch(layers, launches)
        torch.cuda.empty_cache()  # the graphs' memory
        table.plans[trial.product] = fastest(seconds)
        log.debug("%s: %s", trial.product, {str(plan): f"{taken * 1e6:.1f} us" for plan, taken in seconds.items()})
        yield Piece("measuring products", done, len(trials))
    return len(trials)


def _right_plans(attempts: Sequence[Attempt]) -> Generator[Piece, None, dict[Product, list[Plan]]]:
    """The plans whose kernels compile and are right. They are compiled by other threads, and waited for in between."""
    pool = ThreadPoolExecutor(min(MOST_THREADS, usable_cores()))
    try:
        futures: dict[Future[bool], Attempt] = {pool.submit(_is_right, attempt): attempt for attempt in attempts}
        missing = set(futures)
        while missing:
            _, missing = wait(missing, PATIENCE, FIRST_COMPLETED)
            yield Piece("compiling products", len(futures) - len(missing), len(futures))
    finally:
        pool.shutdown(cancel_futures=True)
    right: dict[Product, list[Plan]] = {}
    for future, (trial, _, plan) in futures.items():
        if future.result():
            right.setdefault(trial.product, []).append(plan)
    return right


def _trials(linears: Sequence[TritonLinear], table: LinearTable, most_rows: int) -> Iterator[Trial]:
    kinds: dict[tuple[Operation, int, int, torch.dtype], list[TritonLinear]] = {}
    for linear in linears:
        weight = linear.weight
        if weight.dtype in HALVES and weight.nbytes <= LARGEST_WEIGHT:
            for operation in sorted(linear.asked):
                kinds.setdefault((operation, *weight.shape, weight.dtype), []).append(linear)
    largest = bucket(most_rows) or BUCKETS[-1]
    for (operation, outs, ins, dtype), alike in kinds.items():
        device = alike[0].weight.device
        for rows in BUCKETS:
            product = Product(operation, rows, outs, ins, str(dtype).removeprefix("torch."))
            if rows <= largest and product not in table.plans:
                count = MEASURED.get(rows, rows)
                x, residual = (torch.randn(count, size, device=device, dtype=dtype) for size in (ins, outs))
                yield Trial(product, alike, x, residual, torch.ones(outs, device=device, dtype=dtype))


def _is_right(attempt: Attempt) -> bool:
    """Whether the kernel of a plan compiles, runs and gives what torch gives. Called in a thread of its own."""
    trial, expected, plan = attempt
    linear = trial.linears[0]
    try:
        with at_home_on(expected.device):
            difference = relative_difference(trial.run(linear, plan), expected)
    except torch.cuda.OutOfMemoryError:  # no fault of the plan's
        raise
    except FAILURES as error:
        log.debug("%s by %s does not run: %s", trial.product, plan, error)
        return False
    return difference <= TOLERANCE[linear.weight.dtype]
