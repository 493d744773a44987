"""Times the GPU kernels, one shape a line: achieved bytes/s or FLOP/s against the measured ceiling of the card.

Owns the command and its report; the cases are in `kernels_*.py`, the clock in `device_timing.py`. Needs a CUDA device.

    python benchmarks/kernels.py [--only SECTION] [--check] [--tune] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from device_timing import LAUNCHES, Case, Ceilings, figures, largest_difference, measure_ceilings
from fast_inference.executor.backends.check import TOLERANCE
from fast_inference.executor.backends.launch_clock import seconds_per_launch
from report import console, machine, write_json

DTYPE = torch.bfloat16


def sections() -> dict[str, Callable[[torch.device, torch.dtype, bool], Iterator[Case]]]:
    """Name -> what makes its cases on a device, in a dtype, with or without other tile shapes. Imports triton."""
    from kernels_attention import attention_cases
    from kernels_linear import linear_cases
    from kernels_pointwise import pointwise_cases
    from kernels_sampling import sampling_cases

    return {
        "attention": attention_cases,
        "linear": linear_cases,
        "pointwise": pointwise_cases,
        "sampling": sampling_cases,
    }


def run(case: Case, ceilings: Ceilings, check: bool) -> dict[str, Any]:
    """Measure one case, print its line and return its figures; of a tile that the card has no room for, only say so."""
    from triton.runtime.errors import OutOfResources

    try:
        seconds = seconds_per_launch(case.launches, LAUNCHES)
    except OutOfResources as error:
        print(f"{case.name:50} does not fit: {error}", flush=True)
        return {"name": case.name, "does_not_fit": str(error)}
    line = figures(case, seconds, ceilings)
    text = (
        f"{line['name']:50} {line['microseconds']:10.1f} us {line['bytes_per_second'] / 1e12:6.2f} TB/s "
        f"{line['operations_per_second'] / 1e12:6.0f} TFLOP/s {line['share']:6.1%} of {line['bound']}"
    )
    if check:
        line["difference"] = largest_difference(case)
        line["correct"] = line["difference"] <= TOLERANCE[DTYPE]
        text += f"  {'ok' if line['correct'] else 'WRONG'} ({line['difference']:.2g})"
    print(text, flush=True)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one section of it: attention, linear, pointwise or sampling")
    parser.add_argument("--check", action="store_true", help="compare each result with the torch reference")
    parser.add_argument("--tune", action="store_true", help="every shape with other tile shapes too")
    parser.add_argument("--json", type=Path, help="write the measurements to this file as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        console.print("no CUDA device: these kernels can only be measured on a GPU")
        return 1
    known = sections()
    if arguments.only not in (None, *known):
        parser.error(f"--only must be one of {', '.join(known)}; got {arguments.only!r}")
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    lines = []
    with torch.inference_mode():
        ceilings = measure_ceilings(device)
        print(
            f"{card}: copy {ceilings.copy / 1e12:.2f} TB/s, bfloat16 product {ceilings.product / 1e12:.0f} TFLOP/s, "
            f"torch {torch.__version__}"
        )
        for name, cases in known.items():
            if arguments.only in (None, name):
                lines += [run(case, ceilings, arguments.check) for case in cases(device, DTYPE, arguments.tune)]
    report = {"card": card, "copy": ceilings.copy, "product": ceilings.product, "lines": lines}
    write_json(arguments.json, {"machine": machine()} | report)
    return 0 if all(line.get("correct", True) for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
