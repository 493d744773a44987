"""`/v1/chat/completions`: a conversation in, the next message out.

Owns the route's JSON; must not know sockets or templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from ..protocol.errors import InvalidRequest
from .answer import Answer
from .chat_messages import plain_messages
from .generation import (
    Api,
    Call,
    check_request_id,
    check_room,
    clamp,
    prompt_logprobs_json,
    prompt_records,
    start,
)
from .logprobs import TokenLogprobs
from .schemas import ChatBody, sampling_params
from .sse import EventStream, event, json_bytes, json_string
from .stream import Piece
from .submission import Request, shortened


async def create_chat_completion(api: Api, call: Call, body: ChatBody) -> Response:
    """Answer one request. Raises an `EngineError` for what can't be done."""
    api.check_model(body.model)
    info = api.link.engine()
    call.request_id = check_request_id(body.request_id) or call.request_id
    param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens = getattr(body, param)
    params = sampling_params(
        body,
        api.defaults,
        max_tokens=max_tokens,
        logprobs=_logprobs(body),
        prompt_logprobs=body.prompt_logprobs,
    )
    ids = shortened(await encode_messages(api, body), params, info)
    check_room([ids], max_tokens, info, param)
    request = Request(
        request_id=f"chatcmpl-{call.request_id}",
        prompts=[ids],
        params=params,
        priority=body.priority or 0,
        client=body.user or call.client,
        cache_salt=body.cache_salt or "",
        deadline_ms=body.deadline_ms,
    )
    answer = _Answer(api, body, request)
    stream, pieces = await start(api, call, request, whole=not body.stream)
    if body.stream:
        return EventStream(answer.stream(stream, pieces), lambda: api.link.cancel(stream))
    return Response(json_bytes(answer.whole(pieces)), media_type="application/json")


async def encode_messages(api: Api, body: Any) -> list[int]:
    """Token ids of `body.messages`, put through the chat template as the body says."""
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message can't both be true", param="continue_final_message"
        )
    tokenizer = api.need_tokenizer("a conversation")
    messages = plain_messages(body.messages)
    return await tokenizer.encode_chat(
        messages,
        add_special_tokens=bool(body.add_special_tokens),
        add_generation_prompt=body.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
        kwargs=body.chat_template_kwargs,
        room=None if getattr(body, "truncate_prompt_tokens", None) is not None else api.link.engine().max_model_len,
    )


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest(f"top_logprobs ({body.top_logprobs}) needs logprobs: true", param="top_logprobs")
    return None


class _Answer(Answer):
    """A `chat.completion`."""

    def __init__(self, api: Api, body: ChatBody, request: Request) -> None:
        super().__init__(api, body, request, "chat.completion.chunk", '"delta":{"content"')
        self._body = body
        self._plain = not (body.logprobs or body.return_token_ids or self._usage_always)

    # ---- in one piece ------------------------------------------------------------------------------------------

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The answer to a request that was not streamed."""
        pieces = sorted(pieces, key=lambda p: p.index)
        choices = []
        for piece in pieces:
            self._tally.add(piece)
            choice: dict[str, Any] = {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                **self._rest(piece),
            }
            choices.append(choice)
        out = {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}
        self._about_prompt(out, pieces[0])
        return out

    def _rest(self, piece: Piece) -> dict[str, Any]:
        """What a choice says beside its text."""
        end = piece.end
        rest: dict[str, Any] = {
            "logprobs": self._logprobs(piece.logprobs) if self._body.logprobs else None,
            "finish_reason": None if end is None else end.reason,
            "stop_reason": None if end is None else end.stop_reason,
        }
        if self._body.return_token_ids:
            rest["token_ids"] = piece.token_ids
        return rest

    def _about_prompt(self, out: dict[str, Any], piece: Piece) -> None:
        ids = self._request.prompts[0]
        if self._body.prompt_logprobs is not None:
            out["prompt_logprobs"] = prompt_logprobs_json(prompt_records(self._api, ids, piece))
        if self._body.return_token_ids:
            out["prompt_token_ids"] = list(ids)

    def _logprobs(self, records: Sequence[TokenLogprobs]) -> dict[str, Any]:
        count = self._body.top_logprobs or 0
        return {
            "content": [
                {**_token(*record.chosen()), "top_logprobs": [_token(*entry) for entry in record.top(count)]}
                for record in records
            ]
        }

    # ---- in chunks ---------------------------------------------------------------------------------------------

    def _chunk(self, piece: Piece) -> bytes:
        self._tally.add(piece)
        opening = b"" if piece.index in self._begun else self._opening(piece)
        text = piece.text
        if self._plain and piece.end is None:
            if not text:
                return opening
            prefix = self._prefixes[piece.index]
            return opening + f'{prefix}{json_string(text)}}},"logprobs":null,"finish_reason":null}}]}}\n\n'.encode()
        if not text and piece.end is None and not piece.logprobs and not piece.token_ids:
            return opening
        choice = {"index": piece.index, "delta": {"content": text} if text else {}, **self._rest(piece)}
        return opening + self._chunk_of(choice)

    def _opening(self, piece: Piece) -> bytes:
        """A sequence's first chunk, which names the role."""
        self._begun.add(piece.index)
        choice = {
            "index": piece.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        value = {**self._head(self._chunk_kind), "choices": [choice]}
        if piece.index == 0:  # the one that was asked to score the prompt
            self._about_prompt(value, piece)
        return event(value)


def _token(token_id: int, text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": clamp(value), "bytes": list(text.encode("utf-8", errors="replace"))}
