"""An event loop on a thread of its own, for callers that have none or must not block theirs.

Owns the thread and the crossing of results from it; must not know what runs there.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LoopThread:
    """A thread that runs an event loop until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the thread's loop and wait for it, blocking this thread."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # a Ctrl-C here must end the work there
            raise

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the thread's loop and await it in this loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        if self.loop.is_closed():
            return
        self.call(_cancel_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


class Bridge(Generic[T]):
    """A queue from one thread into another thread's event loop: any thread puts, one async reader takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[T] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, item: T) -> None:
        """Add an item."""
        with self._lock:
            self._items.append(item)
            self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more comes; the reader ends, or raises `error`, once it has taken what is there."""
        with self._lock:
            self._closed, self._error = True, error
            self._wake()

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            with self._lock:
                if not self._items and not self._closed:
                    loop = asyncio.get_running_loop()
                    self._waiter = (loop, loop.create_future())
                waiter = self._waiter
            if waiter is not None:
                await waiter[1]
                continue
            if self._items:
                yield self._items.popleft()
            elif self._error is not None:
                raise self._error
            else:
                return

    def _wake(self) -> None:
        if self._waiter is not None:
            loop, future = self._waiter
            self._waiter = None
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # its reader may have been cancelled
        future.set_result(None)
