"""Native clients over real sockets: `AsyncClient` and `Client` against the frontend's ROUTER and an engine double."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fast_inference.frontend import native as native_room
from fast_inference.frontend.client import AsyncClient, Client
from fast_inference.frontend.engine_link import EngineLink
from fast_inference.frontend.metrics import Metrics
from fast_inference.frontend.native import NativeServer
from fast_inference.frontend.tokenizer import Tokenizer, load_tokenizer
from fast_inference.protocol.channel import AsyncReader, PeerGone, Wire
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import EngineDead, EngineError, InvalidRequest, Overloaded, ProtocolError
from fast_inference.protocol.messages import (
    Accepted,
    Cancel,
    ClientHello,
    Generate,
    GetStats,
    Message,
    Refused,
    ServerHello,
    Stats,
    StreamEnd,
    Submit,
)
from fast_inference.protocol.sampling import RequestOutputKind, SamplingParams

from .engine_double import EngineDouble
from .made_models import make_model_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    loaded = load_tokenizer(EngineConfig(model=make_model_folder(tmp_path_factory.mktemp("model"))))
    assert loaded is not None
    yield loaded
    loaded.close()


@dataclass
class Frontend:
    endpoint: str
    link: EngineLink
    native: NativeServer
    engine: EngineDouble
    paused: bool = False

    def turn(self) -> None:
        while self.engine.replies:
            self.link.on_scheduler("", self.engine.replies.popleft())
        batch = None if self.paused else self.engine.step()
        if batch is not None:
            self.link.on_text("", batch)


@asynccontextmanager
async def frontend(folder: Path, tokenizer: Tokenizer | None) -> AsyncIterator[Frontend]:
    """A frontend's native half on real sockets, with an engine double behind it."""
    wire = Wire()
    engine = EngineDouble()
    endpoint = f"ipc://{folder}/client.sock"
    link = EngineLink("frontend-0", engine.send, Metrics(EngineConfig()), (1,))
    native = NativeServer(link, tokenizer, lambda message, to: reader.send(message, to))
    reader = AsyncReader(wire.bind_router(endpoint, hwm=1000), native.on_message)
    running = Frontend(endpoint, link, native, engine)
    link.tick()

    async def drive() -> None:
        while True:
            running.turn()
            native.tick()
            await asyncio.sleep(0.0005)

    task = asyncio.ensure_future(drive())
    try:
        yield running
    finally:
        task.cancel()
        reader.close()
        wire.close()


async def until(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.001)


# ---- AsyncClient -------------------------------------------------------------------------------------------------


async def test_each_output_kind_carries_what_it_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        assert client.info == server.engine.info and client.eos_token_ids == (1,)
        for kind in RequestOutputKind:
            params = SamplingParams(max_tokens=4, output_kind=kind)
            outputs = [o async for o in client.generate("hello world", params)]
            assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
            last = outputs[-1].outputs[0]
            assert last.finish_reason == "length"
            texts = [o.outputs[0].text for o in outputs]
            ids = [o.outputs[0].token_ids for o in outputs]
            if kind == RequestOutputKind.DELTA:
                assert "".join(texts) == " w7 w8 w9 w10" and [t for part in ids for t in part] == [7, 8, 9, 10]
            else:
                assert texts[-1] == " w7 w8 w9 w10" and ids[-1] == [7, 8, 9, 10]
                assert all(texts[-1].startswith(text) for text in texts)
            if kind == RequestOutputKind.FINAL_ONLY:
                assert len(outputs) == 1


async def test_a_prompt_is_shortened_as_over_http(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        for keep, left in ((2, 2), (-1, 126)):
            params = SamplingParams(max_tokens=2, truncate_prompt_tokens=keep, output_kind=RequestOutputKind.FINAL_ONLY)
            for prompt in ("hello world " * 1000, list(range(5, 205))):
                [out] = [o async for o in client.generate(prompt, params)]
                whole = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                assert out.prompt_token_ids == whole[-left:]


async def test_the_last_output_tells_prompt_times_and_cache_hits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        params = SamplingParams(max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY)
        terms = {"priority": 2, "client": "me", "deadline_ms": 900}
        [out] = [o async for o in client.generate("hello world", params, request_id="mine", **terms)]
        assert out.request_id == "mine" and out.prompt == "hello world"
        assert out.prompt_token_ids == tokenizer.encode("hello world") and out.num_prompt_tokens == 2
        assert out.num_cached_tokens == 3
        assert out.metrics is not None and out.metrics.first_token_time == 101.0
        submit = server.engine.submits[0]
        assert submit.request_id == "mine"
        assert {name: getattr(submit, name) for name in terms} == terms


async def test_n_sequences_and_their_logprobs_come_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        params = SamplingParams(n=3, seed=5, max_tokens=2, logprobs=1, prompt_logprobs=1, output_kind=2)
        [out] = [o async for o in client.generate([268, 267], params)]
        assert [c.index for c in out.outputs] == [0, 1, 2]
        assert [s.seed for s in server.engine.submits] == [5, 6, 7]
        for completion in out.outputs:
            assert completion.cumulative_logprob == -1.0 and completion.logprobs is not None
            first = completion.logprobs[0]
            assert list(first) == [7, 1]
            assert (first[7].logprob, first[7].rank, first[7].decoded_token) == (-0.5, 1, " w7")
        assert out.prompt_logprobs is not None and out.prompt_logprobs[0] is None
        assert out.prompt_logprobs[1] is not None
        assert out.prompt_logprobs[1][267].decoded_token == tokenizer.token_text(267)


@pytest.mark.parametrize("prompt", ["hello", [5, 6], {"prompt_token_ids": [5, 6]}, {"prompt": "hello"}, np.array([5])])
async def test_a_prompt_has_four_forms(tmp_path: Path, tokenizer: Tokenizer, prompt: object) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        async for out in client.generate(prompt, SamplingParams(max_tokens=1)):  # type: ignore[arg-type]
            assert out.finished
        assert server.engine.submits


@pytest.mark.parametrize("prompt", [[[1]], ["x"], {"text": "x"}, [], [300], 5.5, [5] * 200])
async def test_a_bad_prompt_raises_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, prompt: object) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        with pytest.raises(InvalidRequest, match="prompt"):
            async for _ in client.generate(prompt):  # type: ignore[arg-type]
                pass
        assert not server.engine.submits and not client._live


async def test_a_conversation_goes_through_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        async for out in client.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=1)):
            assert tokenizer.decode(out.prompt_token_ids) == "<|im|>user: hello\n<|im|>assistant: "
        with pytest.raises(InvalidRequest, match="not allowed"):
            async for _ in client.chat([{"role": "forbidden", "content": ""}]):
                pass
        assert len(server.engine.submits) == 1


async def test_leaving_early_cancels_the_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        params = SamplingParams(max_tokens=120, n=2)
        async for _ in client.generate([5], params):
            break
        await until(lambda: len(server.engine.aborted) == 2)
        waiting = asyncio.ensure_future(anext(client.generate([5], SamplingParams(max_tokens=120, output_kind=2))))
        await until(lambda: server.engine.running)
        waiting.cancel()
        await until(lambda: len(server.engine.aborted) == 3)
        await until(lambda: len(server.link.table) == 0)


async def test_abort_by_name_gives_a_last_output(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        outputs = []
        async for out in client.generate([5], SamplingParams(max_tokens=120), request_id="victim"):
            outputs.append(out)
            if len(outputs) == 1:
                await client.abort("victim")
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert outputs[-1].outputs[0].text.startswith(" w7")
        await client.abort("nobody")
        await until(lambda: len(server.link.table) == 0)


async def test_refusals_and_failures_raise_their_class(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        server.engine.full = True
        with pytest.raises(Overloaded) as full:
            await anext(client.generate([5]))
        assert full.value.retry_after == 1.0
        server.engine.full = False
        end = StreamEnd(key=0, reason="rejected", code="invalid_request", message="needs 99 blocks", param="prompt")
        server.engine.rejecting = end
        with pytest.raises(InvalidRequest, match="99 blocks"):
            await anext(client.generate([5], SamplingParams(n=2)))
        await until(lambda: len(server.link.table) == 0)


async def test_two_clients_share_a_step_without_mixing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with (
        frontend(tmp_path, tokenizer) as server,
        AsyncClient(server.endpoint) as one,
        AsyncClient(server.endpoint) as two,
    ):

        async def ask(client: AsyncClient, length: int) -> str:
            params = SamplingParams(max_tokens=length, output_kind=2, logprobs=1)
            [out] = [o async for o in client.generate([5], params)]
            assert out.outputs[0].logprobs is not None and len(out.outputs[0].logprobs) == length
            return out.outputs[0].text

        lengths = [1 + i % 9 for i in range(40)]
        texts = await asyncio.gather(*[ask(one if i % 2 else two, n) for i, n in enumerate(lengths)])
        assert texts == ["".join(f" w{7 + i}" for i in range(n)) for n in lengths]


async def test_stats_and_no_server(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        assert (await client.get_stats()).num_blocks == 64
    nobody = AsyncClient(f"ipc://{tmp_path}/nobody.sock", connect_timeout=0.1)
    with pytest.raises(EngineDead, match="nobody answered"):
        await nobody.connect()
    with pytest.raises(EngineDead):
        await anext(nobody.generate([5]))
    with pytest.raises(EngineDead):
        _ = nobody.info


async def test_a_server_of_another_version_is_refused_at_the_hello(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_room, "PROTOCOL_VERSION", (99, 0))
    async with frontend(tmp_path, tokenizer) as server:
        client = AsyncClient(server.endpoint)
        with pytest.raises(ProtocolError, match="99"):
            await client.connect()
        with pytest.raises(ProtocolError, match="99"):
            await client.get_stats()


async def test_a_tokenizer_that_breaks_fails_the_request_alone(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(text: str, add_special_tokens: bool = True) -> list[int]:
        raise RuntimeError("broken")

    monkeypatch.setattr(tokenizer, "encode", broken)
    async with frontend(tmp_path, tokenizer) as server, AsyncClient(server.endpoint) as client:
        with pytest.raises(EngineError, match="internal error"):
            await anext(client.generate("hello"))
        async for out in client.generate([5], SamplingParams(max_tokens=1)):
            assert out.finished


async def test_fail_all_and_close_raise_in_every_waiting_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for how in ("fail_all", "close"):
        async with frontend(tmp_path, tokenizer) as server:
            client = AsyncClient(server.endpoint)
            server.paused = True
            waiting = [asyncio.ensure_future(anext(client.generate([5]))) for _ in range(3)]
            await until(lambda s=server: len(s.engine.running) == 3)
            if how == "fail_all":
                client.fail_all(EngineDead("the executor died"))
            else:
                await client.close()
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(outcome, EngineDead)
            if how == "close":
                await until(lambda s=server: len(s.engine.aborted) == 3)
            await client.close()


async def test_a_server_that_falls_silent_is_noticed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fast_inference.frontend.async_client.QUIET_SECONDS", 0.02)
    async with frontend(tmp_path, tokenizer) as server:
        client = AsyncClient(server.endpoint, lost_timeout=0.1)
        await client.connect()
        server.engine.silent = True
        server.link.stats = lambda timeout: asyncio.sleep(60)  # type: ignore[assignment, method-assign]
        with pytest.raises(EngineDead, match="no word"):
            await asyncio.wait_for(anext(client.generate([5])), 5)
        await client.close()


# ---- Client ------------------------------------------------------------------------------------------------------


def served(folder: Path, tokenizer: Tokenizer) -> tuple[threading.Thread, threading.Event, list[Frontend]]:
    """A frontend on a thread of its own, until the event is set."""
    stop, up, made = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with frontend(folder, tokenizer) as server:
            made.append(server)
            up.set()
            while not stop.is_set():
                await asyncio.sleep(0.005)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    up.wait(10)
    return thread, stop, made


def test_the_blocking_client_does_lists_streams_and_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    thread, stop, [server] = served(tmp_path, tokenizer)
    try:
        with Client(server.endpoint) as client:
            assert client.info.vocab_size == 300
            params = [SamplingParams(max_tokens=1 + i % 3) for i in range(50)]
            outs = client.generate(["hello"] * 50, params)
            assert [len(o.outputs[0].token_ids) for o in outs] == [1 + i % 3 for i in range(50)]
            [one] = client.generate([5, 6], SamplingParams(max_tokens=2), use_tqdm=True)
            assert one.prompt_token_ids == [5, 6]
            assert len(client.generate([[5, 6], [7]], SamplingParams(max_tokens=1))) == 2
            assert client.generate([], None) == []
            [talk] = client.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=1))
            assert talk.outputs[0].text == " w7"
            texts = [o.outputs[0].text for o in client.stream("hello", SamplingParams(max_tokens=3, output_kind=1))]
            assert "".join(texts) == " w7 w8 w9"
            for _ in client.stream("hello", SamplingParams(max_tokens=100)):
                break
            assert client.get_stats().num_blocks == 64
            with pytest.raises(InvalidRequest, match="2 for 1"):
                client.generate("x", [SamplingParams(), SamplingParams()])
            with pytest.raises(InvalidRequest, match="token id"):
                client.generate([[5], [999], [6]], SamplingParams(max_tokens=100))
            with pytest.raises(InvalidRequest):
                list(client.stream([999]))
        client.fail_all(EngineDead("gone"))
        with pytest.raises(EngineDead, match="closed"):
            client.generate("x")
    finally:
        stop.set()
        thread.join(10)


def test_a_list_waits_for_room_instead_of_failing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    thread, stop, [server] = served(tmp_path, tokenizer)
    try:
        server.engine.full = True
        threading.Timer(0.2, setattr, (server.engine, "full", False)).start()
        with Client(server.endpoint) as client:
            assert len(client.generate(["hello"] * 3, SamplingParams(max_tokens=1))) == 3
    finally:
        stop.set()
        thread.join(10)


# ---- the server's half, without sockets --------------------------------------------------------------------------


class Ear:
    """What a `NativeServer` sends, by client."""

    def __init__(self) -> None:
        self.engine = EngineDouble()
        self.link = EngineLink("frontend-0", self.engine.send, Metrics(EngineConfig()), (1,))
        self.link.tick()
        self.link.on_scheduler("", self.engine.replies.popleft())
        self.heard: list[tuple[str, Message]] = []
        self.gone = False
        self.stuffed = False
        self.native = NativeServer(self.link, None, self.send)

    def send(self, message: Message, to: str) -> bool:
        if self.gone:
            raise PeerGone(f"no peer {to!r} is connected")
        if self.stuffed:
            return False
        self.heard.append((to, message))
        return True

    def generate(self, key: int = 0, ids: tuple[int, ...] = (5,), **params: object) -> None:
        params = {"max_tokens": 50, **params}
        message = Generate(
            key=key,
            request_id="r",
            params=SamplingParams(**params),  # type: ignore[arg-type]
            prompt_token_ids=np.array(ids, np.int32),
        )
        self.native.on_message("c", message)


async def test_the_answer_to_a_request_comes_before_its_text() -> None:
    ear = Ear()
    ear.generate(3, max_tokens=1)
    batch = ear.engine.step()
    assert batch is not None
    ear.link.on_text("", batch)
    assert [type(m).__name__ for _, m in ear.heard] == ["Accepted", "TextBatch"]
    assert isinstance(ear.heard[0][1], Accepted) and ear.heard[0][1].prompt_token_ids.tolist() == [5]


async def test_hello_is_answered_and_another_major_version_refused() -> None:
    ear = Ear()
    ear.native.on_message("c", ClientHello())
    await asyncio.sleep(0.01)
    [(name, hello)] = ear.heard
    assert name == "c" and isinstance(hello, ServerHello) and not hello.has_tokenizer
    ear.native.on_message("c", ClientHello(version_major=99))
    assert isinstance(ear.heard[-1][1], Refused) and ear.heard[-1][1].key == -1


async def test_whatever_a_client_sends_is_answered() -> None:
    ear = Ear()
    params = SamplingParams()
    for message in (
        ProtocolError("unknown message type"),
        Submit(key=1, request_id="r", prompt_token_ids=np.array([1], np.int32), params=params, seed=1),
        Generate(key=2, request_id="r", params=params),
        Generate(key=2, request_id="r", params=params, prompt="x", chat=[]),
        Generate(key=2, request_id="r", params=params, prompt="x"),
    ):
        ear.heard.clear()
        ear.native.on_message("c", message)
        [(_, answer)] = ear.heard
        assert isinstance(answer, Refused)
    ear.native.on_message("c", Cancel(keys=(77,)))
    ear.generate(5)
    ear.heard.clear()
    ear.generate(5)
    [(_, answer)] = ear.heard
    assert isinstance(answer, Refused) and "in use" in answer.message


async def test_a_client_that_has_gone_has_its_sequences_aborted() -> None:
    ear = Ear()
    ear.generate(0, n=3)
    ear.gone = True
    batch = ear.engine.step()
    assert batch is not None
    ear.link.on_text("", batch)
    await asyncio.sleep(0)
    assert len(ear.engine.aborted) == 3
    ends = ear.engine.step()
    assert ends is not None
    ear.link.on_text("", ends)
    assert len(ear.link.table) == 0


async def test_what_a_slow_client_cannot_take_waits_in_order_and_too_much_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_room, "BACKLOG", 5)
    ear = Ear()
    ear.stuffed = True
    ear.generate(0)
    for _ in range(3):
        ear.link.on_text("", ear.engine.step())  # type: ignore[arg-type]
    ear.stuffed = False
    ear.native.tick()
    assert [type(m).__name__ for _, m in ear.heard] == ["Accepted", "TextBatch", "TextBatch", "TextBatch"]
    ear.stuffed = True
    for _ in range(7):
        ear.link.on_text("", ear.engine.step())  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert ear.engine.aborted


async def test_clients_that_are_long_silent_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear()
    ear.native.on_message("idle", Cancel(keys=()))
    ear.generate(0)
    monkeypatch.setattr(native_room, "IDLE_SECONDS", -1.0)
    ear.native.prune()
    assert list(ear.native._peers) == ["c"]


async def test_stats_come_back_under_the_clients_own_token() -> None:
    ear = Ear()
    ear.native.on_message("c", GetStats(token=1234))
    await asyncio.sleep(0)
    ear.link.on_scheduler("", ear.engine.replies.popleft())
    await asyncio.sleep(0.01)
    [(_, stats)] = ear.heard
    assert isinstance(stats, Stats) and stats.token == 1234 and stats.num_blocks == 64
