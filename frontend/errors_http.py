"""The one map from the engine's errors to HTTP: status, and the body in OpenAI's shape.

Pure. Owns statuses, type names and what may be said to a client; must not know routes.
"""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any

from pydantic import ValidationError

from ..protocol.errors import ClientError, EngineError, InvalidRequest

TYPE_OF_STATUS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "PayloadTooLargeError",
    429: "TooManyRequestsError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
INTERNAL = EngineError("internal error: the server's log says more")

# absolute paths and object addresses say nothing to a client and much to an attacker
_PRIVATE = re.compile(r"(?:(?<=\s)|(?<=['\"(:])|^)/(?:[\w.@+-]+/)+[\w.@+-]*|0x[0-9a-fA-F]{6,}")


class PayloadTooLarge(ClientError):
    """The request's body is over the limit."""

    code = "payload_too_large"
    status = 413


class MethodNotAllowed(ClientError):
    """The route exists, but not for this method."""

    code = "method_not_allowed"
    status = 405


def error_object(error: EngineError) -> dict[str, Any]:
    """The body of an error: `{"error": {"message", "type", "param", "code"}}`."""
    message = error.message if isinstance(error, ClientError) else _PRIVATE.sub("<...>", error.message)
    return {
        "error": {
            "message": message,
            "type": TYPE_OF_STATUS[error.status],
            "param": error.param,
            "code": error.status,
        }
    }


def error_headers(error: EngineError) -> dict[str, str]:
    """Headers that go with an error."""
    headers = {}
    if error.status in (429, 503):  # whole seconds, and not too soon
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 1.0)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first thing wrong with a body, naming the field and the value."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or "body"
    param = str(first["loc"][0]) if first["loc"] else None
    text = f"{path}: {first['msg']}, got {reprlib.repr(first['input'])}"
    return InvalidRequest(text, param=param)
