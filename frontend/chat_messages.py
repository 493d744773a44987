"""Chat messages as a template wants them: content parts joined into one string, shapes checked.

Pure. Must not know templates or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..protocol.errors import InvalidRequest

MAX_MESSAGES = 10_000


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with string content. Raises `InvalidRequest` naming the message and what is wrong with it."""
    if not messages:
        raise InvalidRequest("messages must hold at least one message, got none", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages may hold at most {MAX_MESSAGES}, got {len(messages)}", param="messages")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: dict[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{path} must be an object, got {message!r:.60}", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{path}.role must be a string, got {role!r:.60}", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{path}.content[{i}]") for i, part in enumerate(content))
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise InvalidRequest(f"{path}.content must be a string or a list, got {content!r:.60}", param="messages")
    out = {"role": role, "content": content}
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            out[name] = message[name]
    return out


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text"):
        raise InvalidRequest(f"{path}.type must be 'text', got {kind!r:.60}", param="messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{path}.text must be a string, got {text!r:.60}", param="messages")
    return text
