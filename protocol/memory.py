"""The in-memory twin of `channel.py`: the same sockets as queues in one process, for tests and simulation.

Messages go through the codec, so that what passes here passes on the wire. Owns queues; must not know time.
"""

from __future__ import annotations

from collections import deque

from .channel import PeerGone, Received
from .codec import decode, encode
from .errors import ProtocolError
from .messages import Message


class MemorySocket:
    """One end of a link: reads its own queue, writes to those of its peers."""

    def __init__(self, hwm: int, name: str = "", routes: bool = False) -> None:
        self.hwm = hwm
        self.name = name
        self.queue: deque[tuple[str, bytes]] = deque()
        self.peers: dict[str, MemorySocket] = {}
        self._routes = routes

    def send(self, message: Message, to: str = "") -> bool:
        peer = self.peers.get(to) if self._routes else next(iter(self.peers.values()), None)
        if peer is None:
            if self._routes:
                raise PeerGone(f"no peer {to!r} is connected")
            return False
        if len(peer.queue) >= peer.hwm:
            return False
        peer.queue.append((self.name, encode(message)))
        return True

    def receive(self) -> Received | None:
        if not self.queue:
            return None
        name, frame = self.queue.popleft()
        sender = name if self._routes else ""
        try:
            return sender, decode(frame)
        except ProtocolError as error:
            return sender, error

    def close(self) -> None:
        for peer in self.peers.values():
            peer.peers.pop(self.name, None)
        self.peers.clear()


class MemoryWire:
    """Makes connected `MemorySocket`s by endpoint name. A bind must come before its connects."""

    def __init__(self) -> None:
        self._bound: dict[str, MemorySocket] = {}
        self._pushes = 0

    def bind_router(self, endpoint: str, *, hwm: int) -> MemorySocket:
        return self._bound.setdefault(endpoint, MemorySocket(hwm, endpoint, routes=True))

    def bind_pull(self, endpoint: str, *, hwm: int) -> MemorySocket:
        return self._bound.setdefault(endpoint, MemorySocket(hwm, endpoint))

    def dealer(self, endpoint: str, identity: str, *, hwm: int) -> MemorySocket:
        return self._connect(endpoint, MemorySocket(hwm, identity))

    def push(self, endpoint: str, *, hwm: int) -> MemorySocket:
        self._pushes += 1
        return self._connect(endpoint, MemorySocket(hwm, f"push-{self._pushes}"))

    def _connect(self, endpoint: str, socket: MemorySocket) -> MemorySocket:
        bound = self._bound[endpoint]
        socket.peers[bound.name] = bound
        bound.peers[socket.name] = socket
        return socket
