"""The only file that imports zmq: non-blocking sockets that carry messages.

Owns socket options (high-water marks, linger, identities) and frames; must not know what a message means or who
its reader is. `memory.py` is its twin without sockets. A `Wire` belongs to one process; a socket to one thread.

Every socket here is non-blocking both ways: what cannot be sent now is the caller's to keep, refuse or merge
(WIRE.md says which, link by link). A malformed frame comes out of `receive` as a `ProtocolError` value, so that no
peer can make a loop raise.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections.abc import Callable, Sequence
from typing import Protocol, cast
from urllib.parse import urlsplit

import zmq

from .codec import MAX_FRAME_BYTES, decode, encode
from .errors import EngineError, ProtocolError, StartupError
from .messages import Message

LINGER_MS = 1000  # time for last words (Fatal, StreamEnd) to leave before the process does

# As plain integers: on the way of every message the enums' own arithmetic would cost more than the call.
_NOW = int(zmq.DONTWAIT)
_NAME = int(zmq.DONTWAIT | zmq.SNDMORE)
_MORE = int(zmq.RCVMORE)
_EVENTS = int(zmq.EVENTS)
_READABLE = int(zmq.POLLIN)

Received = tuple[str, Message | ProtocolError]


class PeerGone(EngineError):
    """A ROUTER has no connection from the named peer."""

    code = "peer_gone"


class Socket(Protocol):
    """One end of a link. The sender of a received message is "" unless the socket is a ROUTER."""

    def send(self, message: Message, to: str = "") -> bool:
        """Hand a message over; False when the queue is full. `to` names the peer of a ROUTER, which raises
        `PeerGone` if it isn't connected."""

    def receive(self) -> Received | None:
        """The next message with its sender, or None."""

    def close(self) -> None: ...


class ZmqSocket:
    """A `Socket` on ZeroMQ."""

    def __init__(self, raw: zmq.Socket[bytes]) -> None:
        self.raw = raw
        self._routes = raw.socket_type == zmq.ROUTER

    def send(self, message: Message, to: str = "") -> bool:
        frame = encode(message)
        try:
            if self._routes:
                self.raw.send(to.encode(), _NAME)  # a full or absent peer is refused here, not at the frame
            self.raw.send(frame, _NOW)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGone(f"no peer {to!r} is connected") from None
            raise
        return True

    def receive(self) -> Received | None:
        # Asked first, since most looks find nothing, and an exception costs more than the question.
        if not cast(int, self.raw.getsockopt(_EVENTS)) & _READABLE:
            return None
        try:
            frames = [self.raw.recv(_NOW)]
            while self.raw.getsockopt(_MORE):
                frames.append(self.raw.recv(_NOW))
        except zmq.Again:
            return None
        # backslashreplace: an identity that is no UTF-8 must still be a name, if only one to refuse
        sender = frames.pop(0).decode(errors="backslashreplace") if self._routes else ""
        if len(frames) != 1:
            return sender, ProtocolError(f"a message is one frame, got {len(frames)}")
        try:
            return sender, decode(frames[0])
        except ProtocolError as error:
            return sender, error

    @property
    def endpoint(self) -> str:
        """The address last bound, with the port that the system chose for `tcp://host:*`."""
        return self.raw.get_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        self.raw.close()


class Wire:
    """Makes the sockets of one process and waits on them."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._context.linger = LINGER_MS
        self._sockets: list[zmq.Socket[bytes]] = []  # so that `close` closes them, not the garbage collector
        self._watched: tuple[ZmqSocket, ...] = ()  # what `_poller` waits on: a loop waits on the same ones each turn
        self._poller = zmq.Poller()

    def bind_router(self, endpoint: str, *, hwm: int) -> ZmqSocket:
        """For an actor that many speak to: replies go by name."""
        raw = self._socket(zmq.ROUTER, hwm)
        raw.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unknown peer is an error, not a silent drop
        raw.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a restarted peer takes its name over from its dead self
        self._bind(raw, endpoint)
        return ZmqSocket(raw)

    def dealer(self, endpoint: str, identity: str, *, hwm: int) -> ZmqSocket:
        """One of the many, under its own name."""
        raw = self._socket(zmq.DEALER, hwm)
        raw.setsockopt_string(zmq.IDENTITY, identity)
        raw.connect(endpoint)
        return ZmqSocket(raw)

    def bind_pull(self, endpoint: str, *, hwm: int) -> ZmqSocket:
        """The reading end of a one-way pipe."""
        raw = self._socket(zmq.PULL, hwm)
        self._bind(raw, endpoint)
        return ZmqSocket(raw)

    def push(self, endpoint: str, *, hwm: int) -> ZmqSocket:
        """The writing end of a one-way pipe."""
        raw = self._socket(zmq.PUSH, hwm)
        raw.connect(endpoint)
        return ZmqSocket(raw)

    def also_bind(self, socket: ZmqSocket, endpoint: str) -> None:
        """Give a bound socket a second address."""
        self._bind(socket.raw, endpoint)

    def wait(self, sockets: Sequence[ZmqSocket], timeout: float) -> list[ZmqSocket]:
        """Sleep until one of `sockets` can be read, or for `timeout` seconds. Returns those that can."""
        if sockets != self._watched:
            self._watched = tuple(sockets)
            self._poller = zmq.Poller()
            for socket in sockets:
                self._poller.register(socket.raw, zmq.POLLIN)
        readable = dict(self._poller.poll(math.ceil(timeout * 1000)))
        return [socket for socket in sockets if socket.raw in readable]

    def close(self) -> None:
        """Close everything; waits at most `LINGER_MS` for what is still to be sent."""
        self._context.destroy()

    def _socket(self, kind: int, hwm: int) -> zmq.Socket[bytes]:
        raw = self._context.socket(kind)
        self._sockets.append(raw)
        raw.setsockopt(zmq.SNDHWM, hwm)
        raw.setsockopt(zmq.RCVHWM, hwm)
        raw.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        return raw

    def _bind(self, raw: zmq.Socket[bytes], endpoint: str) -> None:
        refuse_open_tcp(endpoint)
        try:
            raw.bind(endpoint)
        except zmq.ZMQError as error:
            raw.close()
            raise StartupError(f"can't listen on {endpoint}: {error.strerror}") from None


def refuse_open_tcp(endpoint: str) -> None:
    """An unauthenticated `tcp://` address may only be a loopback one."""
    if not endpoint.startswith("tcp://"):
        return
    host = urlsplit(endpoint.replace("*", "0")).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise StartupError(f"{endpoint} would be open to the network without authentication: use a loopback address")


class AsyncReader:
    """Feeds an asyncio loop from a socket: `handler(sender, message)` for each message that comes.

    ZeroMQ's file descriptor is edge-triggered and speaks for both directions, so it is looked at again after each
    send, and drained in bounded portions so that one busy link does not starve the others.
    """

    PORTION = 64

    def __init__(self, socket: ZmqSocket, handler: Callable[[str, Message | ProtocolError], None]) -> None:
        self._socket = socket
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._fd = socket.raw.fileno()
        self._closed = False
        self._due = False  # a drain is already on its way
        self._loop.add_reader(self._fd, self._drain)
        self._drain_soon()

    def send(self, message: Message, to: str = "") -> bool:
        """As `Socket.send`."""
        sent = self._socket.send(message, to)
        if cast(int, self._socket.raw.getsockopt(_EVENTS)) & _READABLE:
            self._drain_soon()
        return sent

    def close(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def _drain_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._due = False
        more = True
        try:
            for _ in range(self.PORTION):
                received = None if self._closed else self._socket.receive()
                if received is None:
                    more = False
                    return
                self._handler(*received)
        finally:  # also when the handler raises: the descriptor would not speak again of what is still queued
            if more:
                self._drain_soon()
