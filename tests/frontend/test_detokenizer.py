"""The detokenizer's core by messages, its outbox by a scripted socket, its process by real sockets on a thread."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fast_inference.frontend import detokenizer
from fast_inference.frontend.detokenizer_core import DetokenizerCore, Effect, Send
from fast_inference.frontend.outbox import BACKLOG_WEIGHT, CONNECT_SECONDS, MESSAGE_WEIGHT, Outbox, merged, weight
from fast_inference.frontend.vocabulary import from_tokenizer
from fast_inference.protocol.actor import Control
from fast_inference.protocol.channel import PeerGone, Wire
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.endpoints import Endpoints
from fast_inference.protocol.errors import ProtocolError, StartupError
from fast_inference.protocol.messages import (
    Deliver,
    Heartbeat,
    OpenStream,
    Ready,
    Shutdown,
    StopFound,
    StreamEnd,
    StreamPromptLogprobs,
    TextBatch,
    TopLogprobs,
)
from fast_inference.protocol.sampling import SamplingParams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import made_tokenizers as made

TOKENIZER = made.byte_level()
VOCABULARY = from_tokenizer(TOKENIZER)
FRONTEND = "frontend-0"
SLOW_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def opened(number: int, *, frontend: str = FRONTEND, context: list[int] | None = None, **params: object) -> OpenStream:
    """A stream whose key is its number plus 1,000."""
    return OpenStream(
        number=number,
        frontend=frontend,
        key=number + 1000,
        params=SamplingParams(**params),
        context_token_ids=np.array(context or [], np.int32),
        prompt_tokens=7,
        arrival=5.0,
    )


def deliver(rows: list[tuple[int, int]], **fields: object) -> Deliver:
    numbers, tokens = zip(*rows, strict=True) if rows else ((), ())
    return Deliver(numbers=np.array(numbers, np.int64), tokens=np.array(tokens, np.int32), **fields)


def end(number: int, reason: str = "length", **fields: object) -> StreamEnd:
    return StreamEnd(key=number, reason=reason, **fields)


class Reader:
    """Puts effects together as a frontend would."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, int], str] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], StreamEnd] = {}
        self.stopped: list[int] = []

    def take(self, effects: list[Effect]) -> Reader:
        for effect in effects:
            if isinstance(effect, StopFound):
                self.stopped += effect.numbers
            else:
                self.take_batch(effect.frontend, effect.batch)
        return self

    def take_batch(self, frontend: str, batch: TextBatch) -> None:
        assert len(batch.keys) == len(batch.indexes) == len(batch.texts) == len(batch.counts)
        assert batch.counts.sum() == len(batch.token_ids)
        starts = np.cumsum(batch.counts) - batch.counts
        for key, text, count, start in zip(batch.keys.tolist(), batch.texts, batch.counts, starts, strict=True):
            assert (frontend, key) not in self.ends, "text after the end"
            self.texts[frontend, key] = self.texts.get((frontend, key), "") + text
            self.tokens.setdefault((frontend, key), []).extend(batch.token_ids[start : start + count].tolist())
        for one in batch.ended:
            assert (frontend, one.key) not in self.ends, "a second end"
            self.ends[frontend, one.key] = one


def test_a_stream_gets_its_text_its_tokens_and_its_one_end_under_the_frontends_key():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    ids = ids_of("日本 is far away")
    reader.take(core.handle(Deliver(opened=(opened(1),))))
    for token in ids[:-1]:
        reader.take(core.handle(deliver([(1, token)])))
    last = end(1, prompt_tokens=3, completion_tokens=len(ids))
    reader.take(core.handle(deliver([(1, ids[-1])], ended=(last,))))
    assert reader.texts == {(FRONTEND, 1001): "日本 is far away"}
    assert reader.tokens == {(FRONTEND, 1001): ids}
    assert reader.ends == {(FRONTEND, 1001): dataclasses.replace(last, key=1001)}
    assert len(core) == 0


def test_a_stop_string_ends_the_stream_and_tells_the_scheduler_and_the_schedulers_own_end_is_passed_over():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    ids = ids_of("one two STOP three")
    reader.take(core.handle(Deliver(opened=(opened(1, stop=["STOP"]),))))
    for i, token in enumerate(ids):
        reader.take(core.handle(deliver([(1, token)]), now=100.0 + i))
    reader.take(core.handle(Deliver(ended=(end(1, "abort"),))))
    needed = next(n for n in range(len(ids)) if "STOP" in TOKENIZER.decode(ids[:n]))
    (ended,) = reader.ends.values()
    assert reader.texts[FRONTEND, 1001] == "one two "
    assert reader.tokens[FRONTEND, 1001] == ids[:needed]
    assert (ended.reason, ended.stop_reason, ended.completion_tokens) == ("stop", "STOP", needed)
    assert (ended.prompt_tokens, ended.arrival, ended.first_token) == (7, 5.0, 100.0)
    assert ended.finished == 100.0 + needed - 1
    assert reader.stopped == [1]


def test_tokens_behind_a_stop_string_in_the_same_step_are_dropped_with_their_logprobs():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    ids = ids_of("aSTOPb")
    rows = [(1, token) for token in ids] + [(2, ids[0])]
    count = len(rows)
    top = TopLogprobs(
        rows=np.arange(count, dtype=np.int32),
        counts=np.full(count, 2, np.int32),
        ranks=np.arange(count, dtype=np.int32) + 1,
        token_ids=np.array([t for _, token in rows for t in (token, 65)], np.int32),
        values=np.arange(2 * count, dtype=np.float32),
    )
    effects = core.handle(deliver(rows, opened=(opened(1, stop=["STOP"]), opened(2)), logprobs=top))
    reader.take(effects)
    (send,) = [effect for effect in effects if isinstance(effect, Send)]
    kept = reader.tokens[FRONTEND, 1001]
    assert kept == ids[: len(kept)] and len(kept) < len(ids)
    assert send.batch.token_ids.tolist() == [*kept, ids[0]]
    logprobs = send.batch.logprobs
    assert logprobs is not None
    assert logprobs.rows.tolist() == list(range(len(kept) + 1))
    assert logprobs.ranks.tolist() == [*range(1, len(kept) + 1), count]
    assert logprobs.token_ids[::2].tolist() == send.batch.token_ids.tolist()
    assert send.batch.logprob_texts == [VOCABULARY.text_of(t) for t in logprobs.token_ids.tolist()]
    assert logprobs.values[-2:].tolist() == [2 * count - 2, 2 * count - 1]


def test_a_stop_token_is_no_text_unless_asked_for_but_is_among_the_tokens():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    (a,), (b,) = ids_of("a"), ids_of("b")
    ends = (end(1, "stop", stop_reason=b), end(2, "stop", stop_reason=b), end(3, "length"))
    streams = (opened(1), opened(2, include_stop_str_in_output=True), opened(3))
    reader.take(core.handle(Deliver(opened=streams)))
    reader.take(core.handle(deliver([(1, a), (2, a), (3, a)])))
    reader.take(core.handle(deliver([(1, b), (2, b), (3, b)], ended=ends)))
    assert [reader.texts[FRONTEND, key] for key in (1001, 1002, 1003)] == ["a", "ab", "ab"]
    assert reader.tokens[FRONTEND, 1001] == [a, b]
    assert reader.ends[FRONTEND, 1001].stop_reason == b


def test_text_held_back_is_flushed_before_an_end_of_another_reason():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    crab = ids_of("🦀")
    rows = [(1, token) for token in ids_of("ab\nUs")] + [(2, crab[0])]
    reader.take(core.handle(deliver(rows, opened=(opened(1, stop=["\nUser:"]), opened(2)))))
    assert reader.texts[FRONTEND, 1001] == "ab"
    reader.take(core.handle(Deliver(ended=(end(1), end(2, "abort")))))
    assert reader.texts == {(FRONTEND, 1001): "ab\nUs", (FRONTEND, 1002): "�"}


def test_without_a_tokenizer_tokens_pass_as_they_came():
    core = DetokenizerCore(None)
    core.handle(Deliver(opened=tuple(opened(n) for n in range(4))))
    message = deliver([(n, n + 70_000) for n in range(4)])
    (send,) = core.handle(message)
    assert isinstance(send, Send)
    assert send.batch.token_ids is message.tokens
    assert send.batch.texts == [""] * 4 and send.batch.keys.tolist() == [1000, 1001, 1002, 1003]


def test_a_request_without_text_gets_tokens_only_beside_one_with_text():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    (a,) = ids_of("a")
    reader.take(core.handle(deliver([(1, a), (2, a)], opened=(opened(1, detokenize=False), opened(2)))))
    assert reader.texts == {(FRONTEND, 1001): "", (FRONTEND, 1002): "a"}
    assert reader.tokens == {(FRONTEND, 1001): [a], (FRONTEND, 1002): [a]}


def test_rows_of_several_frontends_are_parted_and_their_logprobs_renumbered():
    core = DetokenizerCore(VOCABULARY)
    (a,), (b,) = ids_of("a"), ids_of("b")
    streams = (opened(1, frontend="frontend-0"), opened(2, frontend="frontend-1"), opened(3, frontend="frontend-0"))
    top = TopLogprobs(
        rows=np.array([2], np.int32),
        counts=np.array([1], np.int32),
        ranks=np.array([9], np.int32),
        token_ids=np.array([b], np.int32),
        values=np.array([-0.5], np.float32),
    )
    effects = core.handle(deliver([(1, a), (2, a), (3, b)], opened=streams, logprobs=top))
    by_frontend = {effect.frontend: effect.batch for effect in effects if isinstance(effect, Send)}
    assert by_frontend["frontend-0"].texts == ["a", "b"]
    assert by_frontend["frontend-0"].logprobs is not None
    assert by_frontend["frontend-0"].logprobs.rows.tolist() == [1]
    assert by_frontend["frontend-0"].logprob_texts == ["b"]
    assert by_frontend["frontend-1"].texts == ["a"] and by_frontend["frontend-1"].logprobs is None


def test_prompt_logprobs_come_under_the_frontends_key_with_their_texts():
    core = DetokenizerCore(VOCABULARY)
    ids = np.array(ids_of("ab")[:1], np.int32)
    top = TopLogprobs(
        rows=np.array([1], np.int32),
        counts=np.array([1], np.int32),
        ranks=np.array([1], np.int32),
        token_ids=ids,
        values=np.zeros(1, np.float32),
    )
    part = StreamPromptLogprobs(key=1, top=top)
    (send,) = core.handle(Deliver(opened=(opened(1),), prompt_logprobs=(part,)))
    assert isinstance(send, Send)
    (out,) = send.batch.prompt_logprobs
    assert (out.key, out.texts) == (1001, [VOCABULARY.text_of(int(ids[0]))])


def test_a_rejected_request_gets_its_end():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    refusal = end(1, "rejected", code="overloaded", message="the queue is full", retry_after=1.0)
    reader.take(core.handle(Deliver(opened=(opened(1),), ended=(refusal,))))
    assert reader.ends == {(FRONTEND, 1001): dataclasses.replace(refusal, key=1001)}


def test_ids_beyond_the_vocabulary_say_nothing():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    (a,) = ids_of("a")
    reader.take(core.handle(deliver([(1, 2**31 - 1), (2, a), (3, -5)], opened=(opened(1), opened(2), opened(3)))))
    assert [reader.texts[FRONTEND, key] for key in (1001, 1002)] == ["", "a"]


def test_tokens_of_streams_that_have_ended_are_passed_over():
    core = DetokenizerCore(VOCABULARY)
    assert core.handle(deliver([(5, 1), (6, 2)], ended=(end(5),))) == []


def test_columns_that_do_not_fit_are_refused_and_change_nothing():
    core = DetokenizerCore(VOCABULARY)
    core.handle(Deliver(opened=(opened(1),)))
    one = np.zeros(1, np.int32)
    odd = TopLogprobs(rows=one, counts=one + 5, ranks=one, token_ids=one, values=np.zeros(1, np.float32))
    outside = TopLogprobs(rows=one + 7, counts=one + 1, ranks=one, token_ids=one, values=np.zeros(1, np.float32))
    for wrong in (
        Deliver(numbers=np.ones(2, np.int64), tokens=one, ended=(end(1),)),
        deliver([(1, 65)], logprobs=odd, ended=(end(1),)),
        deliver([(1, 65)], logprobs=outside, ended=(end(1),)),
        Deliver(prompt_logprobs=(StreamPromptLogprobs(key=1, top=odd),), ended=(end(1),)),
    ):
        with pytest.raises(ProtocolError):
            core.handle(wrong)
    assert len(core) == 1


@pytest.mark.parametrize("tokenizer", [made.byte_level, made.byte_fallback, made.word_piece, made.metaspace])
def test_ids_that_no_tokenizer_has_do_no_harm(tokenizer):
    core, reader = DetokenizerCore(from_tokenizer(tokenizer())), Reader()
    rows = [(1, -1), (1, 2**31 - 1), (1, -(2**31))]
    reader.take(core.handle(deliver(rows, opened=(opened(1),), ended=(end(1),))))
    assert reader.texts[FRONTEND, 1001] == ""


def test_a_frontend_that_is_gone_loses_its_streams_and_the_scheduler_hears_of_it():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    core.handle(Deliver(opened=(opened(1), opened(2, frontend="frontend-1"), opened(3))))
    assert core.drop(FRONTEND) == [StopFound(numbers=(1, 3), reason="abort")]
    assert core.drop(FRONTEND) == []
    (a,) = ids_of("a")
    reader.take(core.handle(deliver([(1, a), (2, a), (3, a)])))
    assert reader.texts == {("frontend-1", 1002): "a"}


def test_a_frontend_that_does_not_read_has_its_streams_ended_with_an_error():
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    core.handle(Deliver(opened=(opened(1), opened(2))))
    reader.take(core.fail(FRONTEND, "does not read", now=9.0))
    assert {e.reason for e in reader.ends.values()} == {"error"} and len(reader.ends) == 2
    assert reader.stopped == [1, 2] and len(core) == 0


@given(data=st.data())
@settings(SLOW_MACHINE, max_examples=150)
def test_whatever_mix_of_streams_and_steps_each_text_is_its_tokens_decoded_at_once(data):
    """Against one text per stream, with random grouping of tokens into steps, stops and early ends."""
    core, reader = DetokenizerCore(VOCABULARY), Reader()
    wanted: dict[int, tuple[str, list[int], str]] = {}
    queues: dict[int, list[int]] = {}
    streams = []
    for number in range(data.draw(st.integers(1, 6))):
        ids = data.draw(
            st.one_of(
                st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=12),
                st.text("ab🦀é日S", max_size=8).map(ids_of),
            )
        )
        stop = data.draw(st.sampled_from([(), ("ab",), ("S", "🦀")]))
        text, skip = "", data.draw(st.booleans())
        reason = "length"
        for count in range(1, len(ids) + 1):
            text = TOKENIZER.decode(ids[:count], skip_special_tokens=skip)
            ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
            if ends:
                ids, text, reason = ids[:count], text[: min(ends)[1]], "stop"
                break
        wanted[number] = (text if ids else "", ids, reason)
        queues[number] = [*ids, 65, 66] if reason == "stop" else list(ids)
        streams.append(opened(number, stop=list(stop), skip_special_tokens=skip, frontend=f"frontend-{number % 2}"))
    reader.take(core.handle(Deliver(opened=tuple(streams))))
    while queues:
        rows, ends_now = [], []
        for number in data.draw(st.permutations(sorted(queues))):
            taken = data.draw(st.integers(0, 3))
            rows += [(number, token) for token in queues[number][:taken]]
            del queues[number][:taken]
            if not queues[number]:
                ends_now.append(end(number))
                del queues[number]
        reader.take(core.handle(deliver(rows, ended=tuple(ends_now))))
    for number, (text, ids, reason) in wanted.items():
        at = (f"frontend-{number % 2}", number + 1000)
        assert reader.texts.get(at, "") == text
        assert reader.tokens.get(at, []) == ids
        assert reader.ends[at].reason == reason
    assert len(core) == 0


# ---- outbox ------------------------------------------------------------------------------------------------------


def batch_of(key: int, tokens: list[int], texts: list[str] | None = None, logprobs: bool = False) -> TextBatch:
    count = len(tokens)
    top = TopLogprobs(
        rows=np.arange(count, dtype=np.int32),
        counts=np.ones(count, np.int32),
        ranks=np.ones(count, np.int32),
        token_ids=np.array(tokens, np.int32),
        values=np.zeros(count, np.float32),
    )
    return TextBatch(
        keys=np.full(count, key, np.int64),
        indexes=np.zeros(count, np.int32),
        texts=texts or [str(token) for token in tokens],
        counts=np.ones(count, np.int32),
        token_ids=np.array(tokens, np.int32),
        logprobs=top if logprobs else None,
        logprob_texts=[str(token) for token in tokens] if logprobs else [],
    )


class ScriptedSocket:
    """Takes what `room` allows; `gone` names have no connection."""

    def __init__(self) -> None:
        self.room = 10**9
        self.gone: set[str] = set()
        self.sent: list[tuple[str, TextBatch]] = []

    def send(self, batch: TextBatch, to: str) -> bool:
        if to in self.gone:
            raise PeerGone(to)
        if self.room == 0:
            return False
        self.room -= 1
        self.sent.append((to, batch))
        return True


def test_what_a_full_frontend_could_not_take_is_merged_into_its_next_batch_in_order():
    socket = ScriptedSocket()
    outbox, reader = Outbox(socket.send), Reader()
    socket.room = 0
    for step in range(5):
        outbox.add(FRONTEND, batch_of(1, [step, step + 10], logprobs=step in (1, 3)))
        assert outbox.flush(0.0) == []
    assert outbox
    socket.room = 1
    outbox.flush(0.0)
    ((_, batch),) = socket.sent
    reader.take_batch(FRONTEND, batch)
    assert reader.tokens[FRONTEND, 1] == [0, 10, 1, 11, 2, 12, 3, 13, 4, 14]
    assert batch.logprobs is not None and batch.logprobs.rows.tolist() == [2, 3, 6, 7]
    assert batch.logprobs.token_ids.tolist() == batch.token_ids[batch.logprobs.rows].tolist()
    assert batch.logprob_texts == ["1", "11", "3", "13"]
    assert not outbox


def test_one_message_and_one_backlog_are_bounded():
    socket = ScriptedSocket()
    outbox = Outbox(socket.send)
    socket.room = 0
    big = batch_of(1, list(range(MESSAGE_WEIGHT // 4)), ["x"] * (MESSAGE_WEIGHT // 4))
    while not outbox.overfull():
        outbox.add(FRONTEND, big)
    assert outbox.overfull() == [FRONTEND]
    socket.room = 10**9
    assert outbox.flush(0.0) == [] and not outbox
    assert max(weight(batch) for _, batch in socket.sent) <= MESSAGE_WEIGHT
    assert BACKLOG_WEIGHT < sum(weight(batch) for _, batch in socket.sent) <= BACKLOG_WEIGHT + weight(big)


def test_a_frontend_once_reached_is_gone_at_once_and_one_still_connecting_is_waited_for():
    socket = ScriptedSocket()
    outbox = Outbox(socket.send)
    socket.gone = {FRONTEND}
    outbox.add(FRONTEND, batch_of(1, [1]))
    assert outbox.flush(10.0) == [] and outbox
    socket.gone = set()
    assert outbox.flush(11.0) == [] and len(socket.sent) == 1
    socket.gone = {FRONTEND}
    outbox.add(FRONTEND, batch_of(1, [2]))
    assert outbox.flush(12.0) == [FRONTEND] and not outbox
    outbox.add("frontend-9", batch_of(1, [2]))
    socket.gone = {"frontend-9"}
    assert outbox.flush(20.0) == []
    assert outbox.flush(20.0 + CONNECT_SECONDS) == ["frontend-9"]


def test_merging_one_batch_is_that_batch():
    batch = batch_of(1, [1])
    assert merged([batch]) is batch


# ---- the process -------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path):
    """A detokenizer on a thread, with the test as scheduler, frontend and supervisor."""
    (tmp_path / "model").mkdir()
    TOKENIZER.save(str(tmp_path / "model" / "tokenizer.json"))
    endpoints, wire, inner = Endpoints(str(tmp_path)), Wire(), Wire()
    supervisor = wire.bind_router(endpoints.control, hwm=1000)
    scheduler = wire.bind_router(endpoints.requests, hwm=1000)
    config = EngineConfig(model=str(tmp_path / "model"))
    control = Control(inner, endpoints, "detokenizer")
    thread = threading.Thread(target=detokenizer.run, args=(config, endpoints, inner, control))
    thread.start()
    tokens = wire.push(endpoints.tokens_of(0), hwm=1000)
    frontend = wire.dealer(endpoints.text_of(0), FRONTEND, hwm=1000)
    yield wire, supervisor, scheduler, tokens, frontend
    supervisor.send(Shutdown(), "detokenizer")
    thread.join(10)
    assert not thread.is_alive()
    inner.close()
    wire.close()


def next_message(wire: Wire, socket, kind: type, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        received = socket.receive()
        if received is not None and isinstance(received[1], kind):
            return received
        if received is None:
            wire.wait([socket], 0.2)
    raise AssertionError(f"no {kind.__name__} came")


def test_the_process_turns_tokens_into_text_and_finds_stops(engine):
    wire, supervisor, scheduler, tokens, frontend = engine
    next_message(wire, supervisor, Ready)
    ids = ids_of("hello STOP")
    assert tokens.send(deliver([(1, t) for t in ids], opened=(opened(1, stop=["STOP"]),)))
    reader = Reader()
    reader.take_batch(FRONTEND, next_message(wire, frontend, TextBatch)[1])
    assert reader.texts == {(FRONTEND, 1001): "hello "}
    assert reader.ends[FRONTEND, 1001].stop_reason == "STOP"
    assert next_message(wire, scheduler, StopFound) == ("detokenizer", StopFound(numbers=(1,)))
    next_message(wire, supervisor, Heartbeat)


def test_the_process_survives_frames_that_are_no_messages(engine):
    wire, supervisor, _scheduler, tokens, frontend = engine
    next_message(wire, supervisor, Ready)
    tokens.raw.send(b"\xc1 no message")
    tokens.raw.send_multipart([b"two", b"frames"])
    tokens.send(Deliver(numbers=np.ones(2, np.int64)))
    tokens.send(Shutdown())
    frontend.raw.send(b"nobody asked")
    tokens.send(deliver([(1, ids_of("a")[0])], opened=(opened(1),)))
    assert next_message(wire, frontend, TextBatch)[1].texts == ["a"]


def test_the_process_tells_the_scheduler_when_a_frontend_is_gone(engine):
    wire, supervisor, scheduler, tokens, frontend = engine
    next_message(wire, supervisor, Ready)
    (a,) = ids_of("a")
    tokens.send(deliver([(1, a)], opened=(opened(1),)))
    next_message(wire, frontend, TextBatch)
    frontend.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # until the router has noticed
        tokens.send(deliver([(1, a)]))
        wire.wait([scheduler], 0.05)
        received = scheduler.receive()
        if received is not None:
            assert received[1] == StopFound(numbers=(1,), reason="abort")
            return
    raise AssertionError("nobody told the scheduler")


@pytest.mark.parametrize("model", ["class:Tiny", "live"])
def test_a_model_without_a_tokenizer_is_refused_with_what_to_do(model):
    with pytest.raises(StartupError, match="--skip-tokenizer-init"):
        detokenizer._load(EngineConfig(model=model))
