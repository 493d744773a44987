"""Least squares with no coefficient below zero, for a handful of unknowns.

Plain Python floats in a fixed order, so that the same sums give the same answer on every machine: what the scheduler
learns must be the same in a replay. Owns the solution; must not know what is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

RIDGE = 1e-7  # relative; tells apart what was not seen apart

Matrix = Sequence[Sequence[float]]


def non_negative(square: Matrix, right: Sequence[float]) -> list[float]:
    """The x >= 0 with the least x' `square` x - 2 `right`' x: least squares by its normal equations, `square` [n, n]
    being A' A and `right` [n] A' b. A column of zeros gets 0."""
    terms = range(len(right))
    # columns differ by orders of magnitude: bring each to length one
    scale = [square[i][i] ** 0.5 or 1.0 for i in terms]
    ridge = [[square[i][j] / (scale[i] * scale[j]) + (RIDGE if i == j else 0.0) for j in terms] for i in terms]
    solution = _best_subset(ridge, [right[i] / scale[i] for i in terms])
    return [solution[i] / scale[i] for i in terms]


def _best_subset(square: Matrix, right: Sequence[float]) -> list[float]:
    """Every set of unknowns that are not zero is tried; most of the time the first, of all of them, is it."""
    terms = len(right)
    best, least = [0.0] * terms, 0.0
    for size in range(terms, 0, -1):
        for chosen in combinations(range(terms), size):
            part = _solved([[square[i][j] for j in chosen] for i in chosen], [right[i] for i in chosen])
            if min(part) < 0.0:
                continue
            value = -sum(x * right[i] for x, i in zip(part, chosen, strict=True))
            if value < least:
                least, best = value, [0.0] * terms
                for x, i in zip(part, chosen, strict=True):
                    best[i] = x
        if size == terms and least < 0.0:
            break
    return best


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination; the ridge keeps every pivot of this positive definite matrix away from zero."""
    size = len(right)
    for column in range(size):
        for row in range(column + 1, size):
            factor = matrix[row][column] / matrix[column][column]
            for k in range(column, size):
                matrix[row][k] -= factor * matrix[column][k]
            right[row] -= factor * right[column]
    out = [0.0] * size
    for row in range(size - 1, -1, -1):
        rest = sum(matrix[row][k] * out[k] for k in range(row + 1, size))
        out[row] = (right[row] - rest) / matrix[row][row]
    return out
