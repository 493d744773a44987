"""The HTTP server's routes and what stands before them all: key, request id, access log, errors.

Owns the FastAPI application; the two generating routes are in `completions.py` and `chat.py`. Must not know sockets.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.config import EngineConfig
from ..protocol.errors import EngineError, InvalidRequest, NotFound, Unauthorized
from .chat import create_chat_completion, encode_messages
from .completions import create_completion
from .engine_link import EngineLink
from .errors_http import INTERNAL, MethodNotAllowed, PayloadTooLarge, error_headers, error_object
from .generation import Api, Call, check_request_id, new_request_id
from .schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse_body
from .siblings import Siblings
from .sse import ClientGone, json_bytes
from .timelines import names_of, timeline_object
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)
access = logging.getLogger("fast_inference.access")

MAX_BODY_BYTES = 32 << 20
SCRAPE_SECONDS = 0.5  # how long /metrics waits for the scheduler and for the other frontends
CLIENT_HEADER = "x-client-id"  # who asks, where the body has no `user`
TIMELINE_SECONDS = 5.0  # how long a timeline is waited for: there are no last figures to show instead
OPEN_PATHS = ("/health", "/ping")  # without a key: probes have none
CLIENT_CLOSED = 499  # what the access log says of a client that left; it is never sent

B = TypeVar("B", bound=Body)


def make_app(
    config: EngineConfig,
    link: EngineLink,
    tokenizer: Tokenizer | None,
    defaults: dict[str, float | int],
    siblings: Siblings,
) -> ASGIApp:
    """The application. `defaults`: sampling values for what a request leaves open; `siblings`: the other frontends of
    the port."""
    app = FastAPI(title="fast_inference", version=version("fast-inference"))
    api = Api(config, link, tokenizer, defaults, siblings)
    _add_errors(app)
    _add_generation(app, api)
    _add_text(app, api)
    _add_state(app, api)
    return Gate(app, config.api_key)


# ---- before every route ------------------------------------------------------------------------------------------


class Gate:
    """Checks the key, gives the request its id, and writes the access log. No prompt is ever logged."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        try:
            state["request_id"] = check_request_id(headers.get(b"x-request-id", b"").decode("latin-1") or None)
        except InvalidRequest:
            state["request_id"] = None  # a header that can't be an id gets a new one
        state["request_id"] = state["request_id"] or new_request_id()
        began = time.monotonic()
        status = CLIENT_CLOSED

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = state["request_id"].encode()
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name)]}
            await send(message)

        try:
            if self._allowed(scope, headers):
                await self._app(scope, receive, send_on)
            else:
                await error_response(Unauthorized("no or a wrong API key"))(scope, receive, send_on)
        finally:
            if scope["path"] not in OPEN_PATHS:
                seconds = time.monotonic() - began
                shown = CLIENT_CLOSED if state.get("gone") else status
                access.info(
                    "%s %s %d %.3fs request_id=%s", scope["method"], scope["path"], shown, seconds, state["request_id"]
                )

    def _allowed(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return True
        return secrets.compare_digest(headers.get(b"authorization", b""), self._expected)


def error_response(error: EngineError) -> Response:
    """An error as an HTTP response."""
    return Response(json_bytes(error_object(error)), error.status, error_headers(error), "application/json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(EngineError)
    async def engine_error(request: Request, error: EngineError) -> Response:
        if error.status >= 500:
            log.warning("request %s: %s", request.state.request_id, error.message)
        return error_response(error)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        request.state.gone = True
        return Response(status_code=CLIENT_CLOSED)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return error_response(MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}"))
        if error.status_code == 404:
            return error_response(NotFound(f"no route {request.url.path}"))
        return error_response(InvalidRequest(str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return error_response(INTERNAL)  # starlette raises the error again behind this, and uvicorn logs it


async def read_body(request: Request, kind: type[B]) -> B:
    """The body of a request, checked. Raises `PayloadTooLarge` or `InvalidRequest`."""
    chunks: list[bytes] = []
    size = 0
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) < 20 and int(declared) > MAX_BODY_BYTES:
        raise PayloadTooLarge(f"the body has {declared} bytes, the limit is {MAX_BODY_BYTES}")
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise PayloadTooLarge(f"the body is over the limit of {MAX_BODY_BYTES} bytes")
        chunks.append(chunk)
    return parse_body(kind, b"".join(chunks))


def _documents(kind: type[Body]) -> dict[str, Any]:
    """A route's body, for /openapi.json: the routes read it themselves."""
    return {"requestBody": {"content": {"application/json": {"schema": kind.model_json_schema()}}}}


# ---- routes ------------------------------------------------------------------------------------------------------


def _who_asks(request: Request, api_key: str | None) -> str:
    """A name for fairness, unless the body's `user` gives one: the header, the key, or the address. A key that this
    server itself asks for is everybody's and tells nobody apart; the key's hash stands for it, so that no log or
    message holds the key."""
    named = request.headers.get(CLIENT_HEADER)
    if named:
        return named
    key = request.headers.get("authorization")
    if key and api_key is None:
        return f"key-{hashlib.sha256(key.encode('latin-1')).hexdigest()[:16]}"
    return request.client.host if request.client else ""


def _add_generation(app: FastAPI, api: Api) -> None:
    async def answer(request: Request, kind: type[B], route: Callable[[Api, Call, B], Awaitable[Response]]) -> Response:
        body = await read_body(request, kind)
        call = Call(request.receive, request.state.request_id, _who_asks(request, api.config.api_key))
        try:
            return await route(api, call, body)
        finally:
            request.state.request_id = call.request_id  # the body may have named another

    @app.post("/v1/completions", openapi_extra=_documents(CompletionBody))
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody, create_completion)

    @app.post("/v1/chat/completions", openapi_extra=_documents(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatBody, create_chat_completion)


def _add_text(app: FastAPI, api: Api) -> None:
    @app.post("/tokenize", openapi_extra=_documents(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody)
        api.check_model(body.model)
        info = api.link.engine()
        tokenizer = api.need_tokenizer("/tokenize")
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("exactly one of prompt and messages must be given", param="prompt")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            ids = await tokenizer.off_loop(lambda: tokenizer.encode(body.prompt or "", special))
        else:
            ids = await encode_messages(api, body)
        out: dict[str, Any] = {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids}
        if body.return_token_strs:
            out["token_strs"] = tokenizer.token_strings(ids)
        return _json(out)

    @app.post("/detokenize", openapi_extra=_documents(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody)
        api.check_model(body.model)
        info = api.link.engine()
        tokenizer = api.need_tokenizer("/detokenize")
        for token in body.tokens:
            if not 0 <= token < info.vocab_size:
                raise InvalidRequest(f"tokens must be in [0, {info.vocab_size}), got {token}", param="tokens")
        return _json({"prompt": await tokenizer.off_loop(lambda: tokenizer.decode(body.tokens))})


def _add_state(app: FastAPI, api: Api) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model_card(api)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        api.check_model(name)
        return _json(_model_card(api))

    @app.get("/v1/requests/{request_id}/timeline")
    async def timeline(request_id: str) -> Response:
        return _json(timeline_object(request_id, await api.link.timeline(names_of(request_id), TIMELINE_SECONDS)))

    @app.get("/version")
    async def show_version() -> Response:
        return _json({"version": version("fast-inference")})

    @app.get("/load")
    async def load() -> Response:
        others = await api.siblings.figures(SCRAPE_SECONDS)
        return _json({"server_load": len(api.link.table) + sum(figures.live for figures in others)})

    @app.get("/metrics")
    async def metrics() -> Response:
        stats, others = await asyncio.gather(api.link.stats(SCRAPE_SECONDS), api.siblings.figures(SCRAPE_SECONDS))
        page = api.link.metrics.page(stats, api.link.info, others)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health() -> Response:
        """200 while the engine can serve; 503 with the reason otherwise."""
        complaint = api.link.complaint()
        if complaint is None:
            return Response()
        return Response(complaint, 503, media_type="text/plain")

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ping", health, methods=["GET"])
    app.add_api_route("/ping", health, methods=["POST"], include_in_schema=False)


def _json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")


def _model_card(api: Api) -> dict[str, Any]:
    info = api.link.info
    return {
        "id": api.config.model_name,
        "object": "model",
        "created": api.started,
        "owned_by": "fast_inference",
        "root": api.config.model_name,
        "parent": None,
        "max_model_len": None if info is None else info.max_model_len,
    }
