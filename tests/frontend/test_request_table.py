"""The request table: sharing out text, exactly one end, nothing late."""

from __future__ import annotations

import numpy as np
import pytest
from fast_inference.frontend.stream import Stream
from fast_inference.frontend.table import RequestTable
from fast_inference.protocol.errors import EngineDead, InvalidRequest
from fast_inference.protocol.messages import StreamEnd, StreamPromptLogprobs, TextBatch, TopLogprobs
from hypothesis import given, settings
from hypothesis import strategies as st


def batch(
    keys: list[int], counts: list[int] | None = None, ended: tuple[StreamEnd, ...] = (), **more: object
) -> TextBatch:
    counts = counts or [1] * len(keys)
    return TextBatch(
        keys=np.array(keys, np.int64),
        indexes=np.zeros(len(keys), np.int32),
        texts=[f"t{i}" for i in range(len(keys))],
        counts=np.array(counts, np.int32),
        token_ids=np.arange(sum(counts), dtype=np.int32),
        ended=ended,
        **more,  # type: ignore[arg-type]
    )


async def test_a_batch_of_one_client_passes_with_only_its_names_changed() -> None:
    table = RequestTable()
    a = table.open_native(1, 70, 2, 0.0)
    b = table.open_native(1, 71, 1, 0.0)
    sent = batch([a[1], b[0], a[0]])
    [(owner, got)] = table.deliver(sent, 1.0).outgoing
    assert owner == 1
    assert got.keys.tolist() == [70, 71, 70]
    assert got.indexes.tolist() == [1, 0, 0]
    assert got.texts is sent.texts
    assert got.token_ids is sent.token_ids


async def test_a_mixed_batch_is_split_by_owner_with_its_logprobs_renumbered() -> None:
    table = RequestTable()
    [a] = table.open_native(1, 10, 1, 0.0)
    [b] = table.open_native(2, 20, 1, 0.0)
    stream = table.open_local(1, 0.0)
    top = TopLogprobs(
        rows=np.array([0, 1, 2, 3], np.int32),
        counts=np.array([1, 2, 1, 2], np.int32),
        ranks=np.array([1, 2, 3, 4], np.int32),
        token_ids=np.array([5, 6, 7, 8, 9, 10], np.int32),
        values=np.array([-1, -2, -3, -4, -5, -6], np.float32),
    )
    sent = batch([a, b, stream.keys[0]], [1, 2, 1], logprobs=top, logprob_texts=["a", "b", "c", "d", "e", "f"])
    out = table.deliver(sent, 1.0)
    parts = dict(out.outgoing)
    assert parts[1].token_ids.tolist() == [0]
    assert parts[2].token_ids.tolist() == [1, 2]
    assert parts[2].logprobs is not None
    assert parts[2].logprobs.rows.tolist() == [0, 1]
    assert parts[2].logprobs.token_ids.tolist() == [6, 7, 8]
    assert parts[2].logprobs.ranks.tolist() == [2, 3]
    assert parts[2].logprob_texts == ["b", "c", "d"]
    [piece] = await stream.take()
    assert piece.text == "t2"
    assert piece.token_ids == [3]
    assert [(r.token_ids, r.rank, r.texts) for r in piece.logprobs] == [([9, 10], 4, ["e", "f"])]


async def test_a_row_for_a_sequence_that_has_ended_is_dropped() -> None:
    table = RequestTable()
    stream = table.open_local(1, 0.0)
    [key] = stream.keys
    table.deliver(batch([key], ended=(StreamEnd(key=key, reason="stop"),)), 1.0)
    late = table.deliver(batch([key], ended=(StreamEnd(key=key, reason="length"),)), 2.0)
    assert not late.woken and not late.ended and not late.outgoing
    [piece] = await stream.take()
    assert piece.end is not None and piece.end.reason == "stop" and piece.count == 1
    again = table.open_local(1, 3.0)
    assert again.keys != stream.keys


async def test_prompt_logprobs_alone_do_not_wake_the_reader() -> None:
    table = RequestTable()
    stream = table.open_local(1, 0.0)
    part = StreamPromptLogprobs(key=stream.keys[0], top=TopLogprobs(), texts=[])
    assert not table.deliver(TextBatch(prompt_logprobs=(part,)), 1.0).woken
    table.deliver(batch(stream.keys), 2.0)
    [piece] = await stream.take()
    assert len(piece.prompt_logprobs) == 1 and piece.count == 1


async def test_rows_merge_until_the_reader_takes_them() -> None:
    table = RequestTable()
    stream = table.open_local(2, 0.0)
    for _ in range(3):
        table.deliver(batch([stream.keys[1], stream.keys[0]]), 1.0)
    pieces = {p.index: p for p in await stream.take()}
    assert pieces[1].text == "t0t0t0"
    assert pieces[0].text == "t1t1t1"
    assert pieces[0].count == 3


async def test_a_failed_sequence_raises_its_own_error_in_the_reader() -> None:
    table = RequestTable()
    stream = table.open_local(2, 0.0)
    end = StreamEnd(key=stream.keys[1], reason="rejected", code="invalid_request", message="too long", param="prompt")
    [woken] = table.deliver(TextBatch(ended=(end,)), 1.0).woken
    assert woken is stream
    with pytest.raises(InvalidRequest, match="too long") as caught:
        await stream.take()
    assert caught.value.param == "prompt"


async def test_end_all_ends_every_owner_once() -> None:
    table = RequestTable()
    stream = table.open_local(1, 0.0)
    table.open_native(4, 9, 2, 0.0)
    keys, out = table.end_all("engine_dead", "gone", 5.0)
    assert len(keys) == 3 and len(table) == 0
    [(owner, part)] = out.outgoing
    assert owner == 4
    assert sorted((e.key, e.index, e.code) for e in part.ended) == [(9, 0, "engine_dead"), (9, 1, "engine_dead")]
    with pytest.raises(EngineDead):
        await stream.take()
    assert table.end_all("engine_dead", "gone", 6.0)[0] == []


async def test_waits_and_gaps_are_measured_from_the_rows() -> None:
    table = RequestTable()
    stream = table.open_local(1, 10.0)
    first = table.deliver(batch(stream.keys), 10.5)
    assert first.first_waits.tolist() == [0.5] and first.token_gaps.size == 0
    second = table.deliver(batch(stream.keys), 10.75)
    assert second.first_waits.size == 0 and second.token_gaps.tolist() == [0.25]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["local", "one", "two", "row", "end", "stale"]), st.integers(0, 10**6)), max_size=60
    )
)
async def test_every_token_reaches_its_owner_once_and_every_sequence_ends_once(actions: list[tuple[str, int]]) -> None:
    table = RequestTable()
    live: dict[int, tuple[object, int]] = {}  # key -> (owner, client key or index)
    dead: list[int] = []
    sent: dict[int, int] = {}
    got: dict[tuple[object, int], int] = {}
    ends: list[tuple[object, int]] = []
    streams: list[Stream] = []
    names: dict[tuple[object, int], int] = {}
    for serial, (action, pick) in enumerate(actions):
        if action == "local":
            stream = table.open_local(1 + pick % 3, 0.0)
            streams.append(stream)
            for index, key in enumerate(stream.keys):
                live[key] = names_key = (stream, index)
                names[names_key] = key
        elif action in ("one", "two"):
            owner = 1 if action == "one" else 2
            [key] = table.open_native(owner, serial, 1, 0.0)
            live[key] = (owner, serial)
            names[owner, serial] = key
        elif action == "stale" and dead:
            key = dead[pick % len(dead)]
            out = table.deliver(batch([key], ended=(StreamEnd(key=key, reason="stop"),)), 1.0)
            assert not out.woken and not out.outgoing and not out.ended
        elif action in ("row", "end") and live:
            keys = [k for k in live if pick >> (k % 13) & 1] or list(live)
            ended = tuple(StreamEnd(key=k, reason="stop") for k in keys[: 1 + pick % 2]) if action == "end" else ()
            out = table.deliver(batch(keys, ended=ended), 1.0)
            for key in keys:
                sent[key] = sent.get(key, 0) + 1
            for owner, part in out.outgoing:
                for client_key in part.keys.tolist():
                    got[owner, client_key] = got.get((owner, client_key), 0) + 1
                ends += [(owner, e.key) for e in part.ended]
            for end in ended:
                del live[end.key]
                dead.append(end.key)
    for stream in streams:
        if stream.changed:
            for piece in await stream.take():
                got[stream, piece.index] = got.get((stream, piece.index), 0) + piece.count
                if piece.end is not None:
                    ends.append((stream, piece.index))
    assert len(table) == len(live)
    assert {names[name]: count for name, count in got.items()} == sent
    assert sorted(names[name] for name in ends) == sorted(dead)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["native", "local", "late"]), st.integers(0, 3)), max_size=8))
def test_a_row_alone_is_shared_out_as_it_is_among_others(history: list[tuple[str, int]]) -> None:
    alone, among = RequestTable(), RequestTable()
    keys: dict[str, list[int]] = {"late": [12345]}
    streams: list[Stream] = []
    for table in (alone, among):
        keys["native"] = table.open_native(3, 9, 2, 1.0)[1:]
        streams.append(table.open_local(1, 1.0))
        keys["local"] = streams[-1].keys
    for now, (kind, count) in enumerate(history, start=2):
        (key,) = keys[kind]
        one = alone.deliver(batch([key], [count]), float(now))
        many = among.deliver(batch([key, 54321], [count, 0]), float(now))
        assert one.first_waits.tolist() == many.first_waits.tolist()
        assert one.token_gaps.tolist() == many.token_gaps.tolist()
        assert [_named(part) for part in one.outgoing] == [_named(part) for part in many.outgoing]
        assert (one.woken, many.woken) == (([streams[0]], [streams[1]]) if kind == "local" else ([], []))
    pieces = [stream.piece(0) for stream in streams]
    assert pieces[0].texts == pieces[1].texts and pieces[0].token_ids == pieces[1].token_ids
    assert pieces[0].count == pieces[1].count


def _named(part: tuple[int, TextBatch]) -> tuple[object, ...]:
    owner, got = part
    columns = (got.keys, got.indexes, got.counts, got.token_ids)
    return owner, got.texts, *((column.dtype, column.tolist()) for column in columns)
