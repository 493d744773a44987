"""What must be settled before any test module is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples in every run: a test passes or fails by what was changed, not by luck. Whoever hunts for rare cases
# raises max_examples for a while.
settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")

# Before anything loads OpenMP: tests share their cores, and a thread that spins takes them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure(config: pytest.Config) -> None:
    """Without a CUDA device Triton kernels run in its interpreter, which is chosen when triton is first imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: small tensors gain nothing from more, and the other core is another worker's."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
