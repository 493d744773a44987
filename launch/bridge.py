"""A queue from one thread into another thread's event loop.

Owns the crossing; must not know what is handed over.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Bridge(Generic[T]):
    """Any thread puts, one async reader takes."""

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
