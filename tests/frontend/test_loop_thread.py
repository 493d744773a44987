"""An event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fast_inference.frontend.loop_thread import LoopThread
from fast_inference.protocol.errors import EngineDead


def test_a_loop_thread_runs_work_and_cancels_what_is_left() -> None:
    thread = LoopThread("test", "it is over")
    cancelled = threading.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def begin() -> int:
        thread.keep = asyncio.ensure_future(forever())  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        return 7

    assert thread.call(begin()) == 7
    thread.close()
    assert cancelled.is_set()
    thread.close()


def test_work_for_a_closed_loop_thread_is_refused_and_callbacks_are_dropped() -> None:
    thread = LoopThread("test", "it is over")
    thread.close()
    assert thread.closed
    thread.call_soon(lambda: pytest.fail("nobody is there to call it"))
    with pytest.raises(EngineDead, match="it is over"):
        thread.call(asyncio.sleep(0))
