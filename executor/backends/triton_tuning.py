"""How the products of a model are done fastest: measured once on a card, on its weights.

Owns the inputs and the order of measurements; must not know models, clocks, or where the table is kept. It is done in
pieces, between which the engine may run steps. All kernels are compiled first, side by side: the compiler takes far
longer than the measuring. Products of long prompts come last, and are measured at length: they have the card at its
limit of power, where the algorithm that spends the least is the fastest.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..kernels.gpu import cublaslt
from ..kernels.gpu.card import is_hopper, processors
from ..kernels.gpu.failures import LAUNCH_FAILURES
from ..kernels.gpu.linear_plan import Plan
from ..kernels.gpu.linear_table import (
    BUCKETS,
    LONG,
    LONG_FROM,
    MIDDLES,
    Choice,
    LinearTable,
    Product,
    bucket,
    candidates,
    fastest,
)
from ..side_by_side import at_home_on
from ..threads import usable_cores
from .base import Piece
from .check import TOLERANCE, relative_difference
from .launch_clock import seconds_at_length, seconds_per_launch
from .triton_linear import HALVES, TritonLinear

log = logging.getLogger(__name__)

LAUNCHES = 24  # in a graph, on as many different weights as there are
MEASURED_BYTES = 1 << 30  # of weights, of which no graph reads many more
FEW_ALGORITHMS, LONG_ALGORITHMS = 6, 6  # of cuBLAS that are measured, the likeliest first
ALGORITHMS_FROM = 128  # rows: for fewer a plan is faster than any of them
HEAT_SECONDS, LENGTH_SECONDS, ROUNDS = 0.5, 0.1, 3
COMPARED = 512  # rows
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

    def run(self, linear: TritonLinear, choice: Choice | None) -> Tensor:
        """The operation on the weights of `linear`. The residual may be changed."""
        if self.product.operation == "linear_silu_mul":
            return linear.multiply_silu_mul(choice, self.x)
        if self.product.operation == "linear":
            return linear.multiply(choice, self.x)
        return linear.multiply_add_norm(choice, self.x, self.residual, self.norm, EPS)[0]

    def result(self, choice: Choice | None) -> Tensor:
        """What the first layer gives, from inputs that stay as they are; of many rows some."""
        result = replace(self, residual=self.residual.clone()).run(self.linears[0], choice)
        return result[:: -(-len(result) // COMPARED)].clone()

    def launches(self, choice: Choice | None) -> list[Callable[[], Tensor]]:
        """The operation on so many layers that their weights are not in a cache."""
        most = max(1, min(LAUNCHES, MEASURED_BYTES // self.linears[0].weight.nbytes))
        return [partial(self.run, linear, choice) for linear in self.linears[:most]]


Attempt = tuple[Trial, Tensor, Choice]  # what must come out is in the middle


def tune(
    linears: Sequence[TritonLinear], table: LinearTable, most_rows: int, most_tokens: int
) -> Generator[Piece, None, int]:
    """Fill `table` with the choice for every operation that `linears` were asked for where it has none yet, for steps
    of up to `most_rows` decode rows, or `most_tokens` tokens. Yields when a piece of that is done, or has been waited
    for long enough; returns how many choices are new."""
    wanted = [rows for rows in BUCKETS if rows <= (bucket(most_rows) or BUCKETS[-1])]
    first = sorted({MIDDLES.get(rows, rows) for rows in wanted})
    few = [
        _trial(product, alike, rows)
        for rows in (*first, *(rows for rows in wanted if rows in MIDDLES))
        for product, alike in _unmeasured(linears, table, rows)
    ]
    many = list(_unmeasured(linears, table, LONG)) if most_tokens >= LONG_FROM else []
    total = len(few) + len(many)
    right = yield from _right_plans(few)
    for done, trial in enumerate(few, 1):
        _tune_few(trial, right.get(trial.product, []), table)
        yield Piece("measuring products", done, total)
    for done, (product, alike) in enumerate(many, len(few)):
        trial = _trial(product, alike, min(LONG, most_tokens))
        yield from _tune_long(trial, table, Piece("measuring products", done, total))
    return total


def _tune_few(trial: Trial, plans: Sequence[Choice], table: LinearTable) -> None:
    """Choose for steps of few rows: among `plans`, or the one that was taken where these are measured, and algorithms
    of cuBLAS."""
    product = trial.product
    if product.rows in MIDDLES:
        taken = table.choices.get(replace(product, rows=MIDDLES[product.rows]))
        plans = [taken] if isinstance(taken, Plan) else []
    algorithms = _right_algorithms(trial, FEW_ALGORITHMS) if product.rows >= ALGORITHMS_FROM else []
    seconds: dict[Choice | None, float] = {}
    for choice in (None, *plans, *algorithms):
        seconds[choice] = seconds_per_launch(trial.launches(choice), LAUNCHES)
    torch.cuda.empty_cache()  # the graphs' memory
    _choose(product, seconds, table)


def _tune_long(trial: Trial, table: LinearTable, piece: Piece) -> Generator[Piece, None, None]:
    """Choose for steps of long prompts. Yields `piece` in between."""
    choices = (None, *_right_algorithms(trial, LONG_ALGORITHMS))
    taken: dict[Choice | None, list[float]] = {choice: [] for choice in choices}
    seconds_at_length(trial.launches(None), HEAT_SECONDS)
    for _ in range(ROUNDS):  # in turns, since the card's clock changes slowly
        for choice in choices:
            taken[choice].append(seconds_at_length(trial.launches(choice), LENGTH_SECONDS))
            yield piece
    _choose(trial.product, {choice: statistics.median(times) for choice, times in taken.items()}, table)


def _choose(product: Product, seconds: Mapping[Choice | None, float], table: LinearTable) -> None:
    table.choices[product] = fastest(seconds)
    log.debug("%s: %s", product, {str(choice): f"{taken * 1e6:.1f} us" for choice, taken in seconds.items()})


def _right_algorithms(trial: Trial, most: int) -> list[cublaslt.Algorithm]:
    """Those of cuBLAS that give what its first choice gives."""
    first, count = trial.linears[0], trial.x.shape[0]
    if any(linear.bias is not None for linear in trial.linears):
        return []
    sizes = (first.out_features, first.in_features)
    listed = cublaslt.algorithms(count, *sizes, first.weight.dtype, first.weight.device, most)
    if not listed:
        return []
    expected = trial.result(None)
    return [one for one in listed if _is_right((trial, expected, one))]


def _right_plans(trials: Sequence[Trial]) -> Generator[Piece, None, dict[Product, list[Choice]]]:
    """The plans whose kernels compile and are right. They are compiled by other threads, and waited for in between."""
    attempts: list[Attempt] = []
    for trial in trials:
        device = trial.x.device
        if plans := candidates(trial.product, processors(device), is_hopper(device)):
            expected = trial.result(None)  # here: each thread that asks cuBLAS costs workspace for ever
            attempts += ((trial, expected, plan) for plan in plans)
    pool = ThreadPoolExecutor(min(MOST_THREADS, usable_cores()))
    try:
        futures: dict[Future[bool], Attempt] = {pool.submit(_is_right, attempt): attempt for attempt in attempts}
        missing = set(futures)
        while missing:
            _, missing = wait(missing, PATIENCE, FIRST_COMPLETED)
            yield Piece("compiling products", len(futures) - len(missing), len(futures))
    finally:
        pool.shutdown(cancel_futures=True)
    right: dict[Product, list[Choice]] = {}
    for future, (trial, _, plan) in futures.items():
        if future.result():
            right.setdefault(trial.product, []).append(plan)
    return right


def _unmeasured(
    linears: Sequence[TritonLinear], table: LinearTable, rows: int
) -> Iterator[tuple[Product, Sequence[TritonLinear]]]:
    """What `linears` were asked for and `table` has nothing about at `rows` rows, each with the layers that were."""
    found: dict[Product, list[TritonLinear]] = {}
    for linear in linears:
        weight = linear.weight
        if weight.dtype in HALVES and weight.nbytes <= LARGEST_WEIGHT:
            for operation in sorted(linear.asked):
                product = Product(operation, rows, *weight.shape, str(weight.dtype).removeprefix("torch."))
                found.setdefault(product, []).append(linear)
    return ((product, alike) for product, alike in found.items() if product not in table.choices)


def _trial(product: Product, linears: Sequence[TritonLinear], rows: int) -> Trial:
    """Random inputs of `rows` rows."""
    weight = linears[0].weight
    outs, ins = weight.shape
    x, residual = (torch.randn(rows, size, device=weight.device, dtype=weight.dtype) for size in (ins, outs))
    return Trial(product, linears, x, residual, torch.ones(outs, device=weight.device, dtype=weight.dtype))


def _is_right(attempt: Attempt) -> bool:
    """Whether a choice compiles, runs and gives what torch gives. Called for plans in threads of their own."""
    trial, expected, choice = attempt
    try:
        with at_home_on(expected.device):
            difference = relative_difference(trial.result(choice), expected)
    except torch.cuda.OutOfMemoryError:  # no fault of the choice's
        raise
    except FAILURES as error:
        log.debug("%s by %s does not run: %s", trial.product, choice, error)
        return False
    return difference <= TOLERANCE[trial.x.dtype]
