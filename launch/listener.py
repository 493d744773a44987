"""The HTTP server's listening sockets, taken before anything else starts.

Owns binding and the words for what can go wrong with it; must not know HTTP.
"""

from __future__ import annotations

import errno
import socket

from ..protocol.errors import StartupError

BACKLOG = 2048


def listen(host: str, port: int, count: int = 1) -> list[socket.socket]:
    """Listen on `host`:`port` (0: a free port) with `count` sockets, among which the kernel shares out connections.
    Raises `StartupError` if the port can't be had.

    Listening, not only binding: that is what keeps a second engine off the port while this one loads. Who connects
    meanwhile waits for the frontends.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise StartupError(f"can't listen on host {host!r}: {error.strerror}") from None
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(family, kind)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an engine just stopped linger
            if len(sockets) > 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            if len(sockets) == 1 < count:
                # Shared only once it is bound: so a port that any other engine holds is refused, shared or not.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                address = sock.getsockname()
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise StartupError(_reason(error, host, port)) from None
    return sockets


def url_of(sock: socket.socket, host: str) -> str:
    """Where a client on this machine reaches the socket."""
    port = sock.getsockname()[1]
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    name = everywhere.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _reason(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use: choose another with --port, or --port 0 for a free one"
    if error.errno == errno.EACCES:
        return f"port {port} may not be opened by this user: choose one above 1023 with --port"
    return f"can't listen on {host}:{port}: {error.strerror}"
