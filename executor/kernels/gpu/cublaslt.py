"""Products by cuBLAS, by an algorithm of the caller's choice: cuBLASLt lists those for a product, the likeliest first.

Owns the binding of the library, which torch has loaded already, and the workspace; must not know which algorithm is
taken (`backends/triton_tuning.py` measures). What torch calls takes the first of the list, which follows from a model
of the card and not from the card.

Source: the cuBLASLt API, docs.nvidia.com/cuda/cublas.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 32 << 20  # what torch gives cuBLAS on a Hopper card; sums cut into parts need it
# library_types.h, cublas_api.h, cublasLt.h
TYPES = {torch.float16: 2, torch.bfloat16: 14}
FLOAT32, COMPUTE_FLOAT32 = 0, 68
TRANSPOSE_A, MAX_WORKSPACE, ALIGNMENTS = 3, 1, (5, 6, 7, 8)
ALIGNMENT = 16  # bytes, of all tensors
ALGORITHM_WORDS = 8


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to do a product. `words`: cuBLASLt's own description in hexadecimal, for the same version only."""

    words: str


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", c_uint64 * ALGORITHM_WORDS),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def version() -> int:
    """Of the library; 0 where there is none."""
    library = _load()
    return 0 if library is None else int(library.cublasLtGetVersion())


def algorithms(rows: int, outs: int, ins: int, dtype: torch.dtype, device: torch.device, most: int) -> list[Algorithm]:
    """Up to `most` algorithms for x [rows, ins] @ weight [outs, ins].T in `dtype`, the likeliest to be fast first; none
    where the library can't be had, or has none."""
    library = _load() if device.type == "cuda" else None
    return [] if library is None else _CublasLt.on(device).algorithms(rows, outs, ins, dtype, most)


def multiply(x: Tensor, weight: Tensor, algorithm: Algorithm, residual: Tensor | None = None) -> Tensor:
    """`x` [rows, ins] @ `weight` [outs, ins].T by `algorithm`; with `residual` [rows, outs] that plus the product,
    where it is. All contiguous, of one dtype; sums are float32. Raises `RuntimeError` where it can't be done."""
    out = x.new_empty((x.shape[0], weight.shape[0])) if residual is None else residual
    if not (x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()):
        raise RuntimeError("cuBLASLt is given contiguous tensors only")
    _CublasLt.on(x.device).multiply(x, weight, algorithm, out, add=residual is not None)
    return out


class _CublasLt:
    """The library's handle, descriptors and workspace on one device. Steps run one after the other, so one will do."""

    def __init__(self, library: ctypes.CDLL, device: torch.device) -> None:
        self._library = library
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._handle, self._product, self._preference = c_void_p(), c_void_p(), c_void_p()
        with torch.cuda.device(device):
            self._call("cublasLtCreate", byref(self._handle))
        # The library counts columns first, so it is asked for the transpose: weight.T, transposed, times x.T.
        self._call("cublasLtMatmulDescCreate", byref(self._product), COMPUTE_FLOAT32, FLOAT32)
        yes = c_int(1)
        self._call("cublasLtMatmulDescSetAttribute", self._product, TRANSPOSE_A, byref(yes), c_size_t(4))
        self._call("cublasLtMatmulPreferenceCreate", byref(self._preference))
        most, least = c_uint64(WORKSPACE_BYTES), c_uint32(ALIGNMENT)
        self._call("cublasLtMatmulPreferenceSetAttribute", self._preference, MAX_WORKSPACE, byref(most), c_size_t(8))
        for tensor in ALIGNMENTS:
            self._call("cublasLtMatmulPreferenceSetAttribute", self._preference, tensor, byref(least), c_size_t(4))

    @staticmethod
    @functools.cache
    def on(device: torch.device) -> _CublasLt:
        """The one of `device`. Raises `RuntimeError` where the library can't be had."""
        library = _load()
        if library is None:
            raise RuntimeError("cuBLASLt can't be loaded")
        return _CublasLt(library, device)

    def algorithms(self, rows: int, outs: int, ins: int, dtype: torch.dtype, most: int) -> list[Algorithm]:
        found, count = (_Found * most)(), c_int()
        with self._layouts(rows, outs, ins, dtype) as (weight, x, out):
            status = self._library.cublasLtMatmulAlgoGetHeuristic(
                self._handle, self._product, weight, x, out, out, self._preference, most, found, byref(count)
            )
        if status:
            log.debug("cuBLASLt has nothing for %d rows by %d x %d: status %d", rows, outs, ins, status)
            return []
        return [Algorithm(bytes(one.algorithm).hex()) for one in found[: count.value] if one.status == 0]

    def multiply(self, x: Tensor, weight: Tensor, algorithm: Algorithm, out: Tensor, add: bool) -> None:
        (rows, ins), outs = x.shape, weight.shape[0]
        words = (c_uint64 * ALGORITHM_WORDS).from_buffer_copy(bytes.fromhex(algorithm.words))
        one, before = c_float(1.0), c_float(float(add))
        target, stream = c_void_p(out.data_ptr()), c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        with self._layouts(rows, outs, ins, x.dtype) as (weight_layout, x_layout, out_layout):
            self._call(
                "cublasLtMatmul", self._handle, self._product,
                byref(one), c_void_p(weight.data_ptr()), weight_layout, c_void_p(x.data_ptr()), x_layout,
                byref(before), target, out_layout, target, out_layout,
                words, c_void_p(self._workspace.data_ptr()), c_size_t(WORKSPACE_BYTES), stream,
            )  # fmt: skip

    @contextmanager
    def _layouts(self, rows: int, outs: int, ins: int, dtype: torch.dtype) -> Iterator[tuple[c_void_p, ...]]:
        """Those of weight, x and what comes out."""
        made: list[c_void_p] = []
        try:
            for height, width in ((ins, outs), (ins, rows), (outs, rows)):
                layout = c_void_p()
                size = (c_uint64(height), c_uint64(width), c_int64(height))
                self._call("cublasLtMatrixLayoutCreate", byref(layout), TYPES[dtype], *size)
                made.append(layout)
            yield tuple(made)
        finally:
            for layout in made:
                self._library.cublasLtMatrixLayoutDestroy(layout)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} failed with status {status}")


@functools.cache
def _load() -> ctypes.CDLL | None:
    """The library of torch's CUDA; None, with the reason logged, where it can't be had."""
    if torch.version.cuda is None:
        return None
    name = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        log.warning("cuBLAS chooses its algorithms by itself: %s can't be loaded: %s", name, error)
        return None
    library.cublasLtGetVersion.restype = c_size_t
    return library
