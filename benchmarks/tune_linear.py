"""Measures which products this card does faster by the project's kernel than by cuBLAS, and writes the table of them.

Owns the command; the plans and the file are `executor/kernels/gpu/linear_table.py`'s, the clock `device_timing.py`'s.
An engine on this card reads the table at its next start. What other models had measured before stays in it. Needs a
CUDA device; takes some minutes, most of them the compiler's.

    python benchmarks/tune_linear.py [--model NAME] [--rows N ...]
"""

from __future__ import annotations

import argparse
import sys

import torch
from device_timing import largest_difference, seconds_per_launch
from fast_inference.executor.backends.check import TOLERANCE
from fast_inference.executor.kernels.gpu.linear import Plan
from fast_inference.executor.kernels.gpu.linear_table import (
    LinearTable,
    Product,
    buckets,
    candidates,
    fastest,
    load_table,
    table_path,
)
from kernels_linear import MODELS, Layer, make_case
from report import console
from triton.errors import TritonError

DTYPE = torch.bfloat16


def measure(layer: Layer, product: Product, device: torch.device) -> dict[Plan | None, float]:
    """Seconds of the operation by cuBLAS (None) and by every plan that runs on this card and is right."""
    seconds: dict[Plan | None, float] = {}
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for plan in (None, *candidates(product, processors)):
        case = make_case("", layer, product.rows, LinearTable({product: plan}), device, DTYPE)
        try:
            difference = largest_difference(case)
            if difference <= TOLERANCE[DTYPE]:
                seconds[plan] = seconds_per_launch(case.launches)
            else:
                console.print(f"  {plan} is wrong by {difference:.2g}")
        except TritonError as error:  # no room for its tiles
            console.print(f"  {plan} does not run: {error}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one of them; by default both")
    parser.add_argument("--rows", type=int, nargs="+", choices=buckets(), default=buckets(), help="of these sizes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        console.print("no CUDA device: what is fastest can only be measured on a GPU")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    path = table_path(device)
    table = load_table(path)
    with torch.inference_mode():
        for model, layers in MODELS.items():
            for name, layer in layers.items() if arguments.model in (None, model) else ():
                for rows in arguments.rows:
                    dtype = str(DTYPE).removeprefix("torch.")
                    product = Product(layer.operation, rows, layer.outs, layer.ins, dtype)
                    seconds = measure(layer, product, device)
                    best = table.plans[product] = fastest(seconds)
                    console.print(
                        f"{model} {name}, {rows} rows: cuBLAS {seconds[None] * 1e6:.1f} us, "
                        f"best {min(seconds.values()) * 1e6:.1f} us, chosen: {best or 'cuBLAS'}"
                    )
                    table.save(path)
    console.print(f"Written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
