"""What the kernels in Gluon share: instructions of Hopper cards, by one name in every version of Triton.

Owns those names; must not know any kernel.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# By the names that these have now, else by those that they had in Triton 3.6.
copy_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
all_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def control(INSTRUCTION: gl.constexpr):
    """An instruction without operands, as `griddepcontrol`'s (`overlap.py`)."""
    gl.inline_asm_elementwise(INSTRUCTION + " // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers that let pass when `ARRIVALS` have come."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(NUMBER):
        mbarrier.init(made.index(number), count=ARRIVALS)
    return made
