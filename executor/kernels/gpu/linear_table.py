"""How each product is done: by this project's kernels, and cut how, or by which of cuBLAS's algorithms.

Owns the plans worth trying, the choice among what was measured on the card, and the file that keeps it; must not know
clocks (`backends/triton_tuning.py` measures) or models. Products that are not in the table are cuBLAS's as torch calls
it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from ....protocol.endpoints import home
from .cublaslt import Algorithm
from .cublaslt import version as cublaslt_version
from .linear_plan import Plan
from .sizes import power_of_two

log = logging.getLogger(__name__)

Operation = Literal["linear", "linear_silu_mul", "linear_add_norm"]
OPERATIONS: tuple[Operation, ...] = ("linear", "linear_silu_mul", "linear_add_norm")
# Numbers of rows for which there is a choice; each serves those below. Up to 128 rows steps are recorded for so many
# rows as a plan's tile has; beyond, cuBLAS has tiles for any number, and a plan is slower where rows are missing.
BUCKETS = (1, 16, 32, 64, 128, *range(144, 257, 16))
MIDDLES = {144: 160, 176: 160, 192: 160, 208: 224, 240: 224, 256: 224}  # where plans are measured for these
LONG, LONG_FROM = 8192, 4096  # rows of a long prompt's step that stand for all steps of so many or more
SHARED_BYTES = 216 << 10  # of the tiles under way on one processor
KERNELS = ("linear.py", "linear_hopper.py", "linear_table.py", "cublaslt.py")
SPLITS = (2, 3, 4, 6)
# Of the time of cuBLAS as torch calls it that a choice may take: what is closer is noise. Another algorithm of cuBLAS
# is no risk.
PLAN_MARGIN, ALGORITHM_MARGIN = 0.97, 0.99

Choice = Plan | Algorithm


@dataclass(frozen=True, slots=True)
class Product:
    """A kind of call: `rows` as `bucket` rounds them, a weight [outs, ins] of `dtype` (torch's name for it)."""

    operation: Operation
    rows: int
    outs: int
    ins: int
    dtype: str


def bucket(rows: int) -> int | None:
    """The measured number of rows that stands for `rows`, if any does."""
    if rows >= LONG_FROM:
        return LONG
    place = bisect_left(BUCKETS, rows)
    return BUCKETS[place] if place < len(BUCKETS) else None


def candidates(product: Product, processors: int, hopper: bool) -> list[Plan]:
    """Plans worth measuring on a card with so many `processors`, which are `hopper`'s or not: sums are cut into parts
    while that gives work to idle ones, and not into parts so short that adding them up would cost more. None for long
    prompts, which are cuBLAS's, and where the middle one of some numbers of rows stands for all."""
    if product.rows == LONG or product.rows in MIDDLES:
        return []
    gate = product.operation == "linear_silu_mul"
    width = product.outs // 2 if gate else product.outs
    return list(_tiled(product, width, gate, processors) if hopper else _pointed(product, width, gate, processors))


def _tiled(product: Product, width: int, gate: bool, processors: int) -> Iterator[Plan]:
    """For the kernel whose tiles come by the copy engine: a program fills a processor's memory with what is under way,
    so one of the next kernel begins there when it ends. On an H200 no other tiles were faster by more than 3 %."""
    row_tile, halves = max(16, power_of_two(product.rows)), 2 if gate else 1
    ins = 128 if row_tile <= 64 else 64
    for rows, outs in itertools.product(sorted({row_tile, min(row_tile, 128)}), (64, 128)):
        if outs * rows > 128 * 128 or ins > product.ins:  # registers have no room for more sums
            continue
        stages = SHARED_BYTES // ((halves * outs + rows) * ins * 2)
        warps = 8 if halves * outs * rows >= 128 * 128 or (outs == 128 and rows >= 64) else 4
        programs = -(-product.rows // rows) * -(-width // outs)
        for splits in (1,) if gate else _splits(programs, product.ins // (4 * ins), processors):
            yield Plan(rows, outs, ins, splits, stages, warps, hopper=True)


def _splits(programs: int, most: int, processors: int) -> list[int]:
    """Numbers of parts worth trying: those that give work to a third of the processors, and to none for long."""
    fitting = [1, *(n for n in SPLITS if n <= most and programs * n <= 2 * processors + 8)]
    return [n for n in fitting if 3 * programs * n >= processors] or fitting[-1:]


def _pointed(product: Product, width: int, gate: bool, processors: int) -> Iterator[Plan]:
    """For the kernel that every GPU can run."""
    rows = max(16, min(power_of_two(product.rows), 128))
    for outs, ins in itertools.product((32, 64, 128), (64, 128)):
        stages = min(6, (160 << 10) // (((2 if gate else 1) * outs + rows) * ins * 2))
        programs = -(-product.rows // rows) * -(-width // outs)
        if stages < 2 or ins > product.ins or (outs == 32 and programs > 4 * processors):
            continue
        warps = 8 if outs == 128 and rows >= 64 else 4
        for splits in (1,) if gate else (1, 2, 4, 8):
            if splits == 1 or (product.ins // splits >= 4 * ins and programs * splits <= 4 * processors):
                yield Plan(rows, outs, ins, splits, stages, warps)


def fastest(seconds: Mapping[Choice | None, float]) -> Choice | None:
    """The choice of the shortest time, or None, which is cuBLAS as torch calls it, where none is clearly faster."""
    best, shortest = None, seconds[None]
    for choice, taken in seconds.items():
        margin = PLAN_MARGIN if isinstance(choice, Plan) else ALGORITHM_MARGIN
        if choice is not None and taken < min(shortest, margin * seconds[None]):
            best, shortest = choice, taken
    return best


class LinearTable:
    """The choices for one card: None stands for cuBLAS as torch calls it, measured to be as fast."""

    def __init__(self, choices: dict[Product, Choice | None] | None = None) -> None:
        self.choices = {} if choices is None else choices

    def choices_of(self, outs: int, ins: int, dtype: torch.dtype) -> dict[tuple[str, int], Choice]:
        """(operation, bucket) -> choice, for a weight [outs, ins]."""
        name = str(dtype).removeprefix("torch.")
        return {
            (product.operation, product.rows): choice
            for product, choice in self.choices.items()
            if choice is not None and (product.outs, product.ins, product.dtype) == (outs, ins, name)
        }

    def save(self, path: Path) -> None:
        entries = [
            asdict(product)
            | {
                "plan": asdict(choice) if isinstance(choice, Plan) else None,
                "algorithm": choice.words if isinstance(choice, Algorithm) else None,
            }
            for product, choice in self.choices.items()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(entries, indent=1))
        fresh.replace(path)


def load_table(path: Path) -> LinearTable:
    """The table in `path`; an empty one where there is none, or, with a warning, where it can't be used."""
    try:
        entries = json.loads(path.read_text())
        return LinearTable(dict(_entry(entry) for entry in entries))
    except FileNotFoundError:
        return LinearTable()
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("all products by cuBLAS: %s can't be used (%s: %s)", path, type(error).__name__, error)
        return LinearTable()


def table_path(device: torch.device) -> Path:
    """Where the table of `device`'s card is kept: measurements of other libraries, compilers or kernels don't count."""
    kernels = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in KERNELS)).hexdigest()[:8]
    libraries = f"torch-{torch.__version__}-cublaslt-{cublaslt_version()}-triton-{triton.__version__}"
    name = f"{torch.cuda.get_device_name(device)}-{libraries}-{kernels}"
    return home() / "linear" / (re.sub(r"[^A-Za-z0-9.+-]+", "-", name) + ".json")


def _entry(raw: dict[str, Any]) -> tuple[Product, Choice | None]:
    fields = dict(raw)
    plan, words = fields.pop("plan"), fields.pop("algorithm")
    product = Product(**fields)
    if product.operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {product.operation!r}")
    if words is not None:
        return product, Algorithm(words)
    return product, None if plan is None else Plan(**plan)
