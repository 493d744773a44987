"""The codec: an exact inverse for every message, and `ProtocolError`, nothing else, for anything that is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fast_inference.protocol
import msgpack
import numpy as np
import pytest
from fast_inference.protocol import codec
from fast_inference.protocol.codec import decode, encode
from fast_inference.protocol.errors import ProtocolError
from fast_inference.protocol.messages import Abort, Attach, Deliver, Generate, GetStats, Submit, TextBatch
from fast_inference.protocol.sampling import SamplingParams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .message_strategies import ANY_MESSAGE, TYPES, same, struct

SLOW_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def decodes_or_refuses(frame: bytes) -> None:
    """Anything but a message or a `ProtocolError` fails the test."""
    try:
        message = decode(frame)
    except ProtocolError:
        return
    assert type(message) in TYPES


def pack(name: object, fields: object) -> bytes:
    return msgpack.packb([name, fields])


SUBMIT = Submit(key=1, request_id="r", prompt_token_ids=np.arange(3, dtype=np.int32), params=SamplingParams(), seed=1)


@pytest.mark.parametrize("cls", TYPES, ids=lambda cls: cls.__name__)
@given(data=st.data())
@settings(SLOW_MACHINE, max_examples=30)
def test_every_message_survives_a_round_trip(cls, data):
    message = data.draw(struct(cls))
    assert same(decode(encode(message)), message)


@given(st.binary(max_size=300))
@settings(SLOW_MACHINE)
def test_random_bytes_are_refused(frame):
    decodes_or_refuses(frame)


@given(ANY_MESSAGE, st.data())
@settings(SLOW_MACHINE, max_examples=200)
def test_mutated_frames_are_read_or_refused(message, data):
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(frame))


@given(ANY_MESSAGE, st.data())
@settings(SLOW_MACHINE)
def test_truncated_frames_are_refused(message, data):
    frame = encode(message)
    with pytest.raises(ProtocolError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


def _values(depth: int = 2) -> st.SearchStrategy[object]:
    scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4)
    extension = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=12))
    leaves = scalars | st.binary(max_size=9) | extension
    keys = st.text(max_size=4) | st.integers(0, 9) | st.binary(max_size=3) | st.none()
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5
    )


def _paths(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    inner: list[tuple[object, object]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(deeper for key, item in inner for deeper in _paths(item, (*path, key)))]


@given(ANY_MESSAGE, st.data())
@settings(SLOW_MACHINE, max_examples=200)
def test_a_value_of_another_type_anywhere_is_read_or_refused(message, data):
    tree = msgpack.unpackb(encode(message), strict_map_key=False)
    path = data.draw(st.sampled_from(_paths(tree)))
    value = data.draw(_values())
    if not path:
        tree = value
    else:
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
    decodes_or_refuses(msgpack.packb(tree))


def test_an_unknown_field_is_ignored():
    assert decode(pack("Attach", {"frontend": "frontend-0", "since_version_1_9": [1, {}]})) == Attach(
        frontend="frontend-0"
    )


def test_an_unknown_type_is_refused_by_name():
    with pytest.raises(ProtocolError, match="unknown message type 'Teleport'"):
        decode(pack("Teleport", {}))


@pytest.mark.parametrize("cls", TYPES, ids=lambda cls: cls.__name__)
def test_a_missing_field_is_named(cls):
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if not required:
        assert type(decode(pack(cls.__name__, {}))) is cls
        return
    with pytest.raises(ProtocolError) as caught:
        decode(pack(cls.__name__, {}))
    assert caught.value.param in {f"{cls.__name__}.{name}" for name in required}
    assert "is missing" in caught.value.message


def test_a_wrong_type_deep_inside_is_named_by_its_path():
    tree = msgpack.unpackb(encode(SUBMIT))
    tree[1]["params"] = {"top_k": "many"}
    with pytest.raises(ProtocolError, match=r"Submit\.params\.top_k must be a 64-bit int, got str 'many'"):
        decode(msgpack.packb(tree))


def test_sampling_parameters_out_of_range_are_refused_by_name():
    tree = msgpack.unpackb(encode(SUBMIT))
    tree[1]["params"] = {"top_p": 7.0}
    with pytest.raises(ProtocolError, match=r"Submit\.params .*top_p must be in \(0, 1\], got 7\.0"):
        decode(msgpack.packb(tree))


def test_a_bool_is_no_int_and_bytes_are_no_text():
    for fields in ({"keys": [True]}, {"keys": [2**63]}, {"keys": "12"}):
        with pytest.raises(ProtocolError, match=r"Abort\.keys"):
            decode(pack("Abort", fields))
    with pytest.raises(ProtocolError, match=r"Attach\.frontend"):
        decode(pack("Attach", {"frontend": b"frontend-0"}))
    with pytest.raises(ProtocolError, match=r"TextBatch\.texts"):
        decode(pack("TextBatch", {"texts": ["a", b"b"]}))


def test_an_array_must_be_whole():
    with pytest.raises(ProtocolError, match=r"Deliver\.tokens has 7 bytes, no multiple of 4"):
        decode(pack("Deliver", {"tokens": b"1234567"}))


def test_arrays_are_read_only_after_decoding_and_taken_from_any_layout():
    message = decode(encode(Deliver(tokens=np.arange(10, dtype=np.int64)[::2], numbers=np.arange(5))))
    assert isinstance(message, Deliver)
    assert message.tokens.dtype == np.int32 and message.tokens.tolist() == [0, 2, 4, 6, 8]
    assert not message.tokens.flags.writeable


def test_a_default_is_left_out_of_the_frame():
    assert msgpack.unpackb(encode(Deliver())) == ["Deliver", {}]
    assert len(encode(TextBatch())) < 60


def test_sizes_over_their_limits_are_refused(monkeypatch):
    with pytest.raises(ProtocolError, match="over the limit"):
        decode(b"\x00" * (codec.MAX_FRAME_BYTES + 1))
    monkeypatch.setattr(codec, "MAX_ITEMS", 10)
    monkeypatch.setattr(codec, "MAX_STRING_BYTES", 10)
    with pytest.raises(ProtocolError):
        decode(encode(Abort(keys=tuple(range(11)))))
    with pytest.raises(ProtocolError):
        decode(encode(Attach(frontend="x" * 11)))


def test_what_no_frame_can_hold_is_refused_by_its_sender():
    with pytest.raises(ProtocolError, match="Attach can't be sent"):
        encode(Attach(frontend="\ud800"))
    with pytest.raises(ProtocolError, match="Abort can't be sent"):
        encode(Abort(keys=(2**64,)))
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(Deliver(numbers=np.zeros(codec.MAX_FRAME_BYTES // 8, np.int64)))


def test_a_chat_nested_too_deep_is_refused():
    deep: object = "x"
    for _ in range(codec.MAX_DEPTH + 2):
        deep = [deep]
    message = Generate(key=1, request_id="", params=SamplingParams(), chat=[{"content": deep}])
    with pytest.raises(ProtocolError, match=rf"Generate\.chat is nested deeper than {codec.MAX_DEPTH}"):
        decode(encode(message))
    with pytest.raises(ProtocolError):
        decode(b"\x91" * 100_000)


def test_the_wire_page_names_every_message_with_all_its_fields():
    page = (Path(fast_inference.protocol.__file__).parent / "WIRE.md").read_text()
    for cls in TYPES:
        assert f"`{cls.__name__}`" in page, f"WIRE.md does not tell of {cls.__name__}"
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in page, f"WIRE.md does not tell of {cls.__name__}.{field.name}"


def test_a_kept_frame_is_for_the_same_object_only() -> None:
    first, second = GetStats(token=1), GetStats(token=1)
    frame = encode(first, keep=True)
    assert encode(first) is frame
    assert encode(second) == frame and encode(second) is not frame
    assert encode(GetStats(token=2)) != frame
