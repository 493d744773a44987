"""Which products go to this project's kernel, and cut how: what was fastest on this card.

Owns the plans worth trying, the choice among measured ones, and the file that keeps it; must not know clocks (the
measurement is `benchmarks/tune_linear.py`) or models. Products that are not in the table are cuBLAS's.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from ....protocol.endpoints import home
from .linear import Plan

log = logging.getLogger(__name__)

Operation = Literal["linear", "linear_silu_mul", "linear_add_norm"]
OPERATIONS: tuple[Operation, ...] = ("linear", "linear_silu_mul", "linear_add_norm")
MOST_ROWS = 256
SHARED_BYTES = 160 << 10  # of the tiles under way in one program
MARGIN = 0.97  # of cuBLAS's time that a plan may take: what is closer is noise


@dataclass(frozen=True, slots=True)
class Product:
    """A kind of call: `rows` as `bucket` rounds them, a weight [outs, ins] of `dtype` (torch's name for it)."""

    operation: Operation
    rows: int
    outs: int
    ins: int
    dtype: str


def bucket(rows: int) -> int:
    """`rows` (at least 1) rounded up to a power of two: what is measured at that size serves all below."""
    return 1 << (rows - 1).bit_length()


def buckets() -> list[int]:
    """Those that a table covers."""
    return [1 << i for i in range(MOST_ROWS.bit_length())]


def candidates(product: Product, processors: int) -> list[Plan]:
    """Plans worth measuring on a card with so many `processors`: sums are cut into parts while that gives work to idle
    ones, and not into parts so short that adding them up would cost more."""
    gate = product.operation == "linear_silu_mul"
    rows = max(16, min(product.rows, 128))
    width = product.outs // 2 if gate else product.outs
    plans = []
    for outs, ins in itertools.product((32, 64, 128), (64, 128)):
        stages = min(6, SHARED_BYTES // (((2 if gate else 1) * outs + rows) * ins * 2))
        programs = -(-product.rows // rows) * -(-width // outs)
        if stages < 2 or ins > product.ins or (outs == 32 and programs > 4 * processors):
            continue
        warps = 8 if outs == 128 and rows >= 64 else 4
        plans.append(Plan(rows, outs, ins, 1, stages, warps))
        for splits in (2, 4, 8):
            if not gate and product.ins // splits >= 4 * ins and programs * splits <= 4 * processors:
                plans.append(Plan(rows, outs, ins, splits, stages, warps))
    return plans


def fastest(seconds: Mapping[Plan | None, float]) -> Plan | None:
    """The plan of the shortest time, or None, which is cuBLAS, where none is clearly faster than that."""
    plans = {plan: taken for plan, taken in seconds.items() if plan is not None}
    if not plans:
        return None
    best = min(plans, key=lambda plan: plans[plan])
    return best if plans[best] < MARGIN * seconds[None] else None


class LinearTable:
    """The choices for one card. `plans`: None stands for cuBLAS, measured to be faster."""

    def __init__(self, plans: dict[Product, Plan | None] | None = None) -> None:
        self.plans = {} if plans is None else plans

    def plans_of(self, outs: int, ins: int, dtype: torch.dtype) -> dict[tuple[str, int], Plan]:
        """(operation, bucket) -> plan, for a weight [outs, ins]."""
        name = str(dtype).removeprefix("torch.")
        return {
            (product.operation, product.rows): plan
            for product, plan in self.plans.items()
            if plan is not None and (product.outs, product.ins, product.dtype) == (outs, ins, name)
        }

    def save(self, path: Path) -> None:
        entries = [asdict(product) | {"plan": plan and asdict(plan)} for product, plan in self.plans.items()]
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
    """Where the table of `device`'s card is kept: measurements of other versions of the compiler don't count."""
    name = f"{torch.cuda.get_device_name(device)}-torch-{torch.__version__}-triton-{triton.__version__}"
    return home() / "linear" / (re.sub(r"[^A-Za-z0-9.+-]+", "-", name) + ".json")


def _entry(raw: dict[str, Any]) -> tuple[Product, Plan | None]:
    fields = dict(raw)
    plan = fields.pop("plan")
    product = Product(**fields)
    if product.operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {product.operation!r}")
    return product, None if plan is None else Plan(**plan)
