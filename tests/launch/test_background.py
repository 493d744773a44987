"""Crossing from one event loop to another."""

import asyncio
import threading

import pytest
from fast_inference.launch.background import Bridge, LoopThread


async def test_a_bridge_hands_over_everything_in_order_and_ends() -> None:
    bridge: Bridge[int] = Bridge()

    def feed() -> None:
        for number in range(1000):
            bridge.put(number)
        bridge.close()

    thread = threading.Thread(target=feed)
    thread.start()
    assert [number async for number in bridge] == list(range(1000))
    thread.join()


async def test_a_bridge_raises_its_error_after_what_came_before() -> None:
    bridge: Bridge[int] = Bridge()
    bridge.put(1)
    bridge.close(ValueError("broken"))
    seen = []
    with pytest.raises(ValueError, match="broken"):
        async for number in bridge:
            seen.append(number)
    assert seen == [1]


def test_a_loop_thread_runs_work_and_cancels_what_is_left() -> None:
    thread = LoopThread("test")
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
