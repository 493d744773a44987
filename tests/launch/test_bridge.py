"""Crossing from a thread into an event loop."""

import threading

import pytest
from fast_inference.launch.bridge import Bridge


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
