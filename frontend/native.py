"""The ROUTER that native clients (`async_client.py`) speak to.

Owns who the clients are and what waits to be sent to them; must not know HTTP. Requests go through `EngineLink`;
text comes back as whole batches, one message per client and step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from ..protocol.channel import PeerGone
from ..protocol.errors import EngineError, InvalidRequest, ProtocolError
from ..protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    ClientHello,
    Generate,
    GetFigures,
    GetStats,
    Message,
    Refused,
    ServerHello,
    Stats,
    TextBatch,
)
from .chat_messages import plain_messages
from .engine_link import EngineLink
from .submission import Request, shortened
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

CLIENT_HWM = 10_000  # messages on their way to one client
BACKLOG = 10_000  # more kept here while a client does not read; over this it is taken for gone
STATS_SECONDS = 2.0
IDLE_SECONDS = 600.0


@dataclass(slots=True)
class Peer:
    """One connected client."""

    name: str  # its identity on the socket
    number: int
    starting: dict[int, asyncio.Task[None]] = field(default_factory=dict)  # by key: requests still being tokenized
    backlog: deque[Message] = field(default_factory=deque)
    heard: float = 0.0  # time.monotonic() of its last message


class NativeServer:
    """`send(message, identity)`: as `Socket.send` of the ROUTER."""

    def __init__(self, link: EngineLink, tokenizer: Tokenizer | None, send: Callable[[Message, str], bool]) -> None:
        self._link = link
        self._tokenizer = tokenizer
        self._send = send
        self._peers: dict[str, Peer] = {}
        self._by_number: dict[int, Peer] = {}
        self._numbers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        link.outgoing = self.on_text

    # ---- from clients ------------------------------------------------------------------------------------------

    def on_message(self, sender: str, message: Message | ProtocolError) -> None:
        """Handler of the client socket. Whatever comes, it answers and does not raise."""
        peer = self._peer(sender)
        if isinstance(message, ProtocolError):
            self._refuse(peer, -1, message)
        elif isinstance(message, ClientHello):
            if message.version_major != PROTOCOL_VERSION[0]:
                text = f"the server speaks protocol {PROTOCOL_VERSION[0]}, the client {message.version_major}"
                self._refuse(peer, -1, ProtocolError(text))
            else:
                self._start(self._welcome(peer))
        elif isinstance(message, Generate):
            self._on_generate(peer, message)
        elif isinstance(message, Cancel):
            for key in message.keys:
                self._cancel(peer, key)
        elif isinstance(message, GetStats):
            self._start(self._answer_stats(peer, message.token))
        elif isinstance(message, GetFigures):
            self._to(peer, self._link.metrics.figures(len(self._link.table), message.token))
        else:
            self._refuse(peer, -1, ProtocolError(f"a client may not send {type(message).__name__}"))

    def _peer(self, sender: str) -> Peer:
        peer = self._peers.get(sender)
        if peer is None:
            self._numbers += 1
            peer = self._peers[sender] = self._by_number[self._numbers] = Peer(sender, self._numbers)
        peer.heard = time.monotonic()
        return peer

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _welcome(self, peer: Peer) -> None:
        await self._link.ready.wait()
        assert self._link.info is not None
        hello = ServerHello(
            info=self._link.info,
            eos_token_ids=self._link.eos_token_ids,
            has_tokenizer=self._tokenizer is not None,
        )
        self._to(peer, hello)

    async def _answer_stats(self, peer: Peer, token: int) -> None:
        stats: Stats = await self._link.stats(STATS_SECONDS)
        self._to(peer, replace(stats, token=token))

    def _on_generate(self, peer: Peer, ask: Generate) -> None:
        if ask.key in peer.starting or self._link.table.keys_of_request(peer.number, ask.key):
            self._refuse(peer, ask.key, InvalidRequest(f"key {ask.key} is in use", param="key"))
        elif sum(given is not None for given in (ask.prompt, ask.prompt_token_ids, ask.chat)) != 1:
            text = "exactly one of prompt, prompt_token_ids and chat must be given"
            self._refuse(peer, ask.key, InvalidRequest(text, param="prompt"))
        elif ask.prompt_token_ids is not None:
            # An array is as good as a list from here on, and far quicker where a prompt is long.
            self._submit(peer, ask, cast("Sequence[int]", ask.prompt_token_ids))
        elif self._tokenizer is None:
            text = "the engine has no tokenizer: give prompt_token_ids"
            self._refuse(peer, ask.key, InvalidRequest(text, param="prompt"))
        else:
            peer.starting[ask.key] = self._start(self._tokenize(peer, ask, self._tokenizer))

    async def _tokenize(self, peer: Peer, ask: Generate, tokenizer: Tokenizer) -> None:
        try:
            room = self._link.engine().max_model_len if ask.params.truncate_prompt_tokens is None else None
            if ask.chat is not None:
                ids = await tokenizer.encode_chat(plain_messages(ask.chat), room)
            else:
                ids = await tokenizer.encode_prompt(ask.prompt or "", room)
        except EngineError as error:
            self._refuse(peer, ask.key, error)
        except Exception:  # the task's outermost frame: its client must not wait for ever
            log.exception("request %.200s could not be tokenized", ask.request_id)
            self._refuse(peer, ask.key, EngineError("internal error: the server's log says more"))
        else:
            self._submit(peer, ask, ids)
        finally:
            peer.starting.pop(ask.key, None)

    def _submit(self, peer: Peer, ask: Generate, ids: Sequence[int]) -> None:
        try:
            ids = shortened(ids, ask.params, self._link.engine())
            request = Request(
                request_id=ask.request_id,
                prompts=[ids],
                params=ask.params,
                priority=ask.priority,
                client=ask.client or peer.name,
                cache_salt=ask.cache_salt,
                deadline_ms=ask.deadline_ms,
            )
            self._link.submit_native(request, peer.number, ask.key)
        except EngineError as error:
            self._refuse(peer, ask.key, error)
        else:  # no text can come before this: that takes another turn of the loop
            self._to(peer, Accepted(key=ask.key, prompt_token_ids=np.asarray(ids, np.int32)))

    def _cancel(self, peer: Peer, key: int) -> None:
        task = peer.starting.pop(key, None)
        if task is not None:
            task.cancel()
            text = "the request was cancelled before it ran"
            self._to(peer, Refused(key=key, code="cancelled", message=text))
        self._link.abort(self._link.table.keys_of_request(peer.number, key))

    def _refuse(self, peer: Peer, key: int, error: EngineError) -> None:
        self._to(
            peer,
            Refused(key=key, code=error.code, message=error.message, param=error.param, retry_after=error.retry_after),
        )

    # ---- to clients --------------------------------------------------------------------------------------------

    def on_text(self, owner: int, batch: TextBatch) -> None:
        """One client's share of the text."""
        peer = self._by_number.get(owner)
        if peer is None:
            return
        if batch.prompt_logprobs and self._tokenizer is not None:
            word = self._tokenizer.token_text
            items = tuple(
                replace(item, texts=[word(t) for t in item.top.token_ids.tolist()]) for item in batch.prompt_logprobs
            )
            batch = replace(batch, prompt_logprobs=items)
        self._to(peer, batch)

    def tick(self) -> None:
        """Send what could not be sent before."""
        for peer in [p for p in self._peers.values() if p.backlog]:
            self._flush(peer)

    def prune(self) -> None:
        """Forget clients that have been silent for long and wait for nothing: the socket does not tell of their
        leaving. One that speaks again is simply new."""
        limit = time.monotonic() - IDLE_SECONDS
        for peer in [p for p in self._peers.values() if p.heard < limit]:
            if not peer.backlog and not peer.starting and not self._link.table.keys_of_owner(peer.number):
                del self._peers[peer.name], self._by_number[peer.number]

    def _to(self, peer: Peer, message: Message) -> None:
        if peer.name not in self._peers:
            return
        peer.backlog.append(message)
        self._flush(peer)

    def _flush(self, peer: Peer) -> None:
        try:
            while peer.backlog and self._send(peer.backlog[0], peer.name):
                peer.backlog.popleft()
        except PeerGone:
            self._drop(peer, "has gone")
            return
        if len(peer.backlog) > BACKLOG:
            self._drop(peer, f"does not read: {len(peer.backlog)} messages wait for it")

    def _drop(self, peer: Peer, why: str) -> None:
        keys = self._link.table.keys_of_owner(peer.number)
        log.info("native client %s %s; its %d sequences are aborted", peer.name, why, len(keys))
        for task in peer.starting.values():
            task.cancel()
        del self._peers[peer.name], self._by_number[peer.number]
        self._link.abort(keys)
