"""Where a model's tensors come from: safetensors files, or random numbers (`--load-format dummy`).

Owns finding, checking and reading tensors, each straight to its place on the device; must not know what a tensor is
for. A model asks by name and shape, several names at once where they are fused; its own packing follows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..protocol.errors import StartupError
from .checkpoint import Progress, safetensors_files

Shape = tuple[int, ...]

DUMMY_STD = 0.02  # the usual initializer_range
SHOWN = 5  # names listed in an error

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Weights(Protocol):
    """Tensors by name."""

    def check(self, expected: Mapping[str, Shape], ignored: Sequence[str] = ()) -> None:
        """Raise one `StartupError` naming what is missing, unexpected or of another shape. A tensor whose name ends
        in one of `ignored` may be there or not."""

    def take(self, *names: str, shapes: Mapping[str, Shape]) -> Tensor:
        """The tensors `names` one above the other (dimension 0), as one new tensor on the device."""


class SafetensorsWeights:
    """Tensors of a folder of safetensors files, memory-mapped.

    `progress(phase, done, total)` counts bytes. Raises `StartupError` when the files are missing or damaged.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress) -> None:
        self._dtype, self._device, self._progress = dtype, device, progress
        self._files: dict[str, Any] = {}  # tensor name -> open file
        for path in safetensors_files(folder):
            try:
                file = safe_open(path, framework="pt", device=str(device))
            except (SafetensorError, OSError) as error:
                raise StartupError(f"{path} can't be read: {error}; fetch or convert the model again") from None
            self._files.update(dict.fromkeys(file.keys(), file))  # type: ignore[no-untyped-call]
        self._folder = folder
        self._done = self._total = 0

    def check(self, expected: Mapping[str, Shape], ignored: Sequence[str] = ()) -> None:
        missing = [name for name in expected if name not in self._files]
        unexpected = [name for name in self._files if name not in expected and not name.endswith(tuple(ignored))]
        wrong = []
        for name, shape in expected.items():
            if name in self._files and (found := self._shape(name)) != shape:
                wrong.append(f"{name} is {list(found)} instead of {list(shape)}")
        problems = [
            f"{label} {_some(names)}"
            for label, names in (("lacks", missing), ("has unexpected", unexpected), ("wrong shapes:", wrong))
            if names
        ]
        if problems:
            raise StartupError(f"{self._folder} does not fit its config.json: {'; '.join(problems)}")
        size = torch.empty((), dtype=self._dtype).element_size()
        self._total = size * sum(_numel(shape) for shape in expected.values())

    def take(self, *names: str, shapes: Mapping[str, Shape]) -> Tensor:
        if len(names) == 1 and self._device.type == "cuda":
            out: Tensor = self._files[names[0]].get_tensor(names[0]).to(self._dtype)
        else:  # on a CPU one tensor too is copied: it would stay a part of the file
            out = self._joined(names, shapes)
        self._done += out.numel() * out.element_size()
        self._progress("loading weights", min(self._done, self._total), self._total)
        return out

    def _joined(self, names: Sequence[str], shapes: Mapping[str, Shape]) -> Tensor:
        """The tensors `names` one above the other; beside the result only one of them is in memory at a time."""
        out = _empty(names, shapes, self._dtype, self._device)
        row = 0
        for name in names:
            rows = shapes[name][0]
            out[row : row + rows].copy_(self._files[name].get_tensor(name))
            row += rows
        return out

    def _shape(self, name: str) -> Shape:
        return tuple(self._files[name].get_slice(name).get_shape())


class DummyWeights:
    """Random tensors, the same for the same seed and name: matrices normal, norms one, biases zero."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device, progress: Progress) -> None:
        self._seed, self._dtype, self._device, self._progress = seed, dtype, device, progress
        self._done = self._total = 0

    def check(self, expected: Mapping[str, Shape], ignored: Sequence[str] = ()) -> None:
        self._total = len(expected)

    def take(self, *names: str, shapes: Mapping[str, Shape]) -> Tensor:
        out = _empty(names, shapes, self._dtype, self._device)
        row = 0
        for name in names:
            rows = shapes[name][0]
            part = out[row : row + rows]
            if name.endswith("bias"):
                part.zero_()
            elif part.dim() == 1:
                part.fill_(1.0)
            else:
                generator = torch.Generator(self._device).manual_seed(
                    self._seed * 1_000_003 + zlib.crc32(name.encode())
                )
                part.normal_(0.0, DUMMY_STD, generator=generator)
            row += rows
        self._done += len(names)
        self._progress("making random weights", min(self._done, self._total), self._total)
        return out


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The type of the first floating-point tensor stored in `folder`, or None."""
    with safe_open(safetensors_files(folder)[0], framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            dtype = TORCH_DTYPES.get(file.get_slice(name).get_dtype())
            if dtype is not None:
                return dtype
    return None


def _empty(names: Iterable[str], shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device) -> Tensor:
    all_shapes = [shapes[name] for name in names]
    return torch.empty((sum(shape[0] for shape in all_shapes), *all_shapes[0][1:]), dtype=dtype, device=device)


def _numel(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
