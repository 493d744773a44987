"""The errors that cross a process or reach a user, as one tree.

    EngineError
    ├── ClientError            the caller's fault; sending it again changes nothing
    │   ├── InvalidRequest     a value is wrong; `param` names the field                   HTTP 400
    │   ├── Unauthorized       no or a wrong API key                                       HTTP 401
    │   └── NotFound           an unknown model or request                                 HTTP 404
    ├── Overloaded             no room now; `retry_after` seconds later there may be       HTTP 503
    ├── DeadlineUnreachable    `deadline_ms` can't be met now; `retry_after`: how late     HTTP 429
    ├── ProtocolError          a frame that this version of the wire cannot read           HTTP 400
    ├── StartupError           the engine can't start; the message says what to do
    └── EngineDead             an actor is gone; requests under way are lost               HTTP 500

Owns the classes and their codes on the wire; must not know sockets or HTTP frameworks.
"""

from __future__ import annotations


class EngineError(Exception):
    """Anything that the engine says went wrong. `code` is the name on the wire, `status` the HTTP status."""

    code = "internal_error"
    status = 500

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class ClientError(EngineError):
    """The request itself is at fault."""

    code = "client_error"
    status = 400


class InvalidRequest(ClientError, ValueError):
    """A field holds a value that it may not hold. The message names the field, the value and the limit."""

    code = "invalid_request"
    status = 400


class Unauthorized(ClientError):
    """The API key is missing or wrong."""

    code = "unauthorized"
    status = 401


class NotFound(ClientError):
    """The named model or request does not exist."""

    code = "not_found"
    status = 404


class Overloaded(EngineError):
    """Admission is refused for now: a queue is full."""

    code = "overloaded"
    status = 503


class DeadlineUnreachable(EngineError):
    """The first token would come after the deadline that the request names; `retry_after` seconds late."""

    code = "deadline_unreachable"
    status = 429


class ProtocolError(EngineError, ValueError):
    """A frame can't be decoded: unknown type, missing field, wrong type or over a size limit."""

    code = "protocol_error"
    status = 400


class StartupError(EngineError):
    """The engine can't start. One line that says why and what to do; shown without a traceback."""

    code = "startup_error"
    status = 500


class EngineDead(EngineError):
    """An actor has died; what was in flight can't be finished."""

    code = "engine_dead"
    status = 500


_BY_CODE: dict[str, type[EngineError]] = {
    cls.code: cls
    for cls in (
        EngineError,
        ClientError,
        InvalidRequest,
        Unauthorized,
        NotFound,
        Overloaded,
        DeadlineUnreachable,
        ProtocolError,
        StartupError,
        EngineDead,
    )
}


def error_from_code(code: str, message: str, param: str | None = None, retry_after: float | None = None) -> EngineError:
    """Rebuild an error that arrived as (code, message); an unknown code becomes a plain `EngineError`."""
    return _BY_CODE.get(code, EngineError)(message, param=param, retry_after=retry_after)


def status_of_code(code: str) -> int:
    """HTTP status for a code from the wire."""
    return _BY_CODE.get(code, EngineError).status
