"""An event loop on a thread of its own, for callers that have none or must not block theirs.

Owns the thread and the crossing of results from it; must not know what runs there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from ..protocol.errors import EngineDead

T = TypeVar("T")


class LoopThread:
    """A thread that runs an event loop until `close`. Thread-safe.

    `epitaph`: what is said to whoever hands over work after that.
    """

    def __init__(self, name: str, epitaph: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._epitaph = epitaph
        self._handing_over = threading.Lock()  # nothing is handed to the loop once it is being closed
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._closed

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` on the thread's loop. Raises `EngineDead` once closed."""
        with self._handing_over:
            if self._closed:
                work.close()
                raise EngineDead(self._epitaph)
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the thread's loop and wait for it, blocking this thread. Raises as `start`."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # a Ctrl-C here must end the work there
            raise

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the thread's loop and await it in this loop. Raises as `start`."""
        return await asyncio.wrap_future(self.start(work))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on the thread's loop; once closed there is nothing to do."""
        with self._handing_over:
            if not self._closed:
                self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Cancel what runs and end the thread. A second call does nothing."""
        with self._handing_over:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
