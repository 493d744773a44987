"""`/v1/completions`: text or token ids in, text out.

Owns the route's JSON; must not know sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from ..protocol.errors import InvalidRequest
from ..protocol.messages import EngineInfo
from ..protocol.sampling import SamplingParams
from .answer import Answer
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
from .schemas import CompletionBody, sampling_params, split_prompts
from .sse import EventStream, json_bytes, json_string
from .stream import Piece
from .submission import MAX_SEQUENCES_PER_REQUEST, Request, shortened


async def create_completion(api: Api, call: Call, body: CompletionBody) -> Response:
    """Answer one request. Raises an `EngineError` for what can't be done."""
    api.check_model(body.model)
    info = api.link.engine()
    call.request_id = check_request_id(body.request_id) or call.request_id
    # max_tokens 0 with echo is how evaluations ask for the prompt's log-probabilities: one token is made and dropped
    no_text = bool(body.echo) and body.max_tokens == 0
    max_tokens = 1 if no_text else body.max_tokens
    params = sampling_params(
        body,
        api.defaults,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=_prompt_logprobs(body),
    )
    texts, prompts = await _tokenize(api, body, params, info)
    check_room(prompts, max_tokens, info, "max_tokens")
    request = Request(
        request_id=f"cmpl-{call.request_id}",
        prompts=prompts,
        params=params,
        priority=body.priority or 0,
        client=body.user or call.client,
        cache_salt=body.cache_salt or "",
        deadline_ms=body.deadline_ms,
    )
    answer = _Answer(api, body, request, texts, no_text)
    stream, pieces = await start(api, call, request, whole=not body.stream)
    if body.stream:
        return EventStream(answer.stream(stream, pieces), lambda: api.link.cancel(stream))
    return Response(json_bytes(answer.whole(pieces)), media_type="application/json")


def _prompt_logprobs(body: CompletionBody) -> int | None:
    if body.prompt_logprobs is not None:
        return body.prompt_logprobs
    return body.logprobs if body.echo else None


async def _tokenize(
    api: Api, body: CompletionBody, params: SamplingParams, info: EngineInfo
) -> tuple[list[str | None], list[Sequence[int]]]:
    """Texts (None where ids were given and no text is needed) and token ids of the prompts."""
    given = split_prompts(body.prompt)
    if len(given) > MAX_SEQUENCES_PER_REQUEST:
        raise InvalidRequest(
            f"prompt may hold at most {MAX_SEQUENCES_PER_REQUEST} prompts, got {len(given)}", param="prompt"
        )
    whole = params.truncate_prompt_tokens is None
    room = info.max_model_len if whole else None
    special = body.add_special_tokens is not False
    texts: list[str | None] = []
    prompts: list[list[int]] = []
    for one in given:
        if isinstance(one, str):
            tokenizer = api.need_tokenizer("a prompt of text")
            texts.append(one if whole else None)
            prompts.append(await tokenizer.encode_prompt(one, room, add_special_tokens=special))
        else:
            texts.append(None)
            prompts.append(one)
    return texts, [shortened(ids, params, info) for ids in prompts]


class _Answer(Answer):
    """A `text_completion`."""

    def __init__(
        self, api: Api, body: CompletionBody, request: Request, texts: Sequence[str | None], no_text: bool
    ) -> None:
        super().__init__(api, body, request, "text_completion", '"text"')
        self._body = body
        self._texts = texts
        self._no_text = no_text
        self._offsets: dict[int, int] = {}  # by sequence: length of the text before the next token
        self._records: dict[int, list[TokenLogprobs | None]] = {}  # by prompt: its log-probabilities
        self._held: list[Piece] = []
        self._plain = not (
            body.echo or body.logprobs is not None or body.return_token_ids or self._usage_always
            or request.params.prompt_logprobs is not None
        )  # fmt: skip

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The answer to a request that was not streamed."""
        for piece in pieces:
            self._tally_piece(piece)
        choices = [self._choice(piece) for piece in sorted(pieces, key=lambda p: p.index)]
        return {**self._head("text_completion"), "choices": choices, "usage": self._usage()}

    def _ready(self, pieces: list[Piece]) -> list[Piece]:
        """Only a prompt's first sequence brings the prompt's log-probabilities; its siblings, which show them too,
        wait for it."""
        n = self._request.params.n
        if n == 1 or self._request.params.prompt_logprobs is None:
            return pieces
        pieces = sorted([*self._held, *pieces], key=lambda p: p.index)
        known = {*self._records, *(piece.index // n for piece in pieces if piece.index % n == 0)}
        self._held = [piece for piece in pieces if piece.index // n not in known]
        return [piece for piece in pieces if piece.index // n in known]

    def _tally_piece(self, piece: Piece) -> None:
        if self._no_text:
            piece.texts, piece.count, piece.token_ids, piece.logprobs = [], 0, [], []
        self._tally.add(piece)

    def _chunk(self, piece: Piece) -> bytes:
        self._tally_piece(piece)
        if self._plain and piece.end is None:
            text = piece.text
            if not text:
                return b""
            prefix = self._prefixes[piece.index]
            return f'{prefix}{json_string(text)},"logprobs":null,"finish_reason":null}}]}}\n\n'.encode()
        choice = self._choice(piece)
        if not choice["text"] and piece.end is None and not choice["logprobs"] and not piece.token_ids:
            return b""
        return self._chunk_of(choice)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        """One entry of `choices`: all that `piece` holds, with the prompt before a sequence's first piece."""
        body, which = self._body, piece.index // self._request.params.n
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        end = piece.end
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": None if end is None else "length" if self._no_text else end.reason,
            "stop_reason": None if end is None else end.stop_reason,
        }
        ids = self._request.prompts[which]
        if first and self._request.params.prompt_logprobs is not None:
            if which not in self._records:
                self._records[which] = prompt_records(self._api, ids, piece)
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs_json(self._records[which])
        echoed = self._echo(which) if first and body.echo else ""
        choice["text"] = echoed + choice["text"]
        if body.logprobs is not None:
            before = self._records[which] if first and body.echo else []
            choice["logprobs"] = self._logprobs(piece, before, ids)
        if body.return_token_ids:
            choice["token_ids"] = piece.token_ids
            if first:
                choice["prompt_token_ids"] = list(ids)
        return choice

    def _echo(self, which: int) -> str:
        text = self._texts[which]
        if text is None:
            text = self._api.need_tokenizer("echo").decode(self._request.prompts[which])
        return text

    def _logprobs(self, piece: Piece, before: Sequence[TokenLogprobs | None], prompt: Sequence[int]) -> dict[str, Any]:
        """OpenAI's columns for the echoed prompt's tokens (`before`) and the new ones."""
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(piece.index, 0)
        count = self._body.logprobs or 0
        for position, record in enumerate([*before, *piece.logprobs]):
            if record is None:  # the first token of a prompt has nothing before it
                word = self._api.tokenizer.token_text(prompt[position]) if self._api.tokenizer else ""
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
            else:
                _, word, value = record.chosen()
                out["token_logprobs"].append(clamp(value))
                top = {text: clamp(v) for _, text, v in record.top(count)}
                top.setdefault(word, clamp(value))
                out["top_logprobs"].append(top)
            out["tokens"].append(word)
            out["text_offset"].append(offset)
            offset += len(word)
        self._offsets[piece.index] = offset
        return out
