"""Compiles the C kernels beside this file at first use and loads them.

Owns the compiler call, the cache of built libraries and the choice of the OpenMP runtime; must not know what a kernel
computes (`executor/backends/cpu.py` does). A library is named by a hash of all that shaped it, so a changed source, a
new compiler or another CPU builds a new one; several processes may build at the same time and the last rename wins.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ....protocol.endpoints import home
from ...backends.base import KernelsUnavailable

SOURCES = Path(__file__).parent
TEMPLATES = ("linear.c", "attention.c", "pointwise.c")  # compiled once for each element type
ELEMENTS = ("BF16", "F32")
# No -ffast-math: infinities and NaNs keep their meaning. The two flags below only free the compiler from errno and
# floating-point traps, which nobody looks at.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)


@functools.cache
def load() -> ctypes.CDLL:
    """The kernel library, built if need be, with as many threads as torch has now.

    Raises `KernelsUnavailable` where there is no compiler, or torch does not run on GNU OpenMP.
    """
    openmp = _openmp_of_torch()
    library = _library(openmp)
    try:
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailable(f"the built kernels do not load: {error}") from error
    if _mapped_openmp() - {openmp} - _openmp_of_others:
        raise KernelsUnavailable("the kernels brought an OpenMP runtime of their own beside torch's")
    kernels.set_kernel_threads(torch.get_num_threads())
    return kernels


_openmp_of_others: set[Path] = set()  # runtimes that were mapped before ours: other packages bring theirs


def _mapped_openmp() -> set[Path]:
    """GNU OpenMP runtimes mapped into this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = (Path(line.split(maxsplit=5)[5]) for line in lines if "/libgomp" in line)
    return {path.resolve() for path in paths}


def _openmp_of_torch() -> Path:
    """The libgomp that torch runs on. A second one would bring a second set of threads, and the two would fight."""
    mapped = _mapped_openmp()
    _openmp_of_others.update(mapped)
    package = Path(torch.__file__).resolve().parent
    homes = (package / "lib", package.with_name("torch.libs"))
    ours = [path for path in mapped if path.parent in homes] or list(mapped)
    if len(ours) != 1:
        found = ", ".join(map(str, sorted(ours))) or "none"
        raise KernelsUnavailable(f"need the one GNU OpenMP runtime of torch, found {found}")
    return ours[0]


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc"):
        if name and (path := shutil.which(name)):
            return path
    raise KernelsUnavailable("no C compiler: neither $CC nor cc nor gcc is on the path")


def _cpu() -> str:
    """What the compiler's -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _library(openmp: Path) -> Path:
    """The path of the built library; builds it if it is not there."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\0".join((version, _cpu(), str(openmp), *FLAGS)).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    library = home() / "kernels" / f"cpu-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            _build(compiler, openmp, library)
        except OSError as error:
            raise KernelsUnavailable(f"cannot build the kernels: {error}") from error
    return library


def _build(compiler: str, openmp: Path, library: Path) -> None:
    """Compile all sources side by side, link them, and move the result into place in one step."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        jobs = {f"{Path(name).stem}.{kind}.o": (name, f"-DELEMENT_{kind}") for name in TEMPLATES for kind in ELEMENTS}
        jobs["runtime.o"] = ("runtime.c", "-DRUNTIME")
        compilers = [
            subprocess.Popen(
                [compiler, *FLAGS, define, "-c", str(SOURCES / name), "-o", f"{folder}/{target}"],
                stderr=subprocess.PIPE,
                text=True,
            )
            for target, (name, define) in jobs.items()
        ]
        for process in compilers:
            _, errors = process.communicate()
            if process.returncode:
                raise KernelsUnavailable(f"{compiler} failed:\n{errors[-2000:]}")
        # Linked by its path, so that the library asks for torch's runtime by the name under which it is loaded.
        objects = [f"{folder}/{target}" for target in jobs]
        link = [compiler, "-shared", *objects, str(openmp), "-lm", "-o", f"{folder}/kernels.so"]
        done = subprocess.run(link, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelsUnavailable(f"{compiler} failed:\n{done.stderr[-2000:]}")
        os.replace(f"{folder}/kernels.so", library)
