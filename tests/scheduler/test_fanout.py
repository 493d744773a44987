"""`Fanout`: each detokenizer gets what its frontend's streams have to say, in order, and waits for no other."""

from __future__ import annotations

import numpy as np
from fast_inference.protocol.memory import MemorySocket, MemoryWire
from fast_inference.protocol.messages import Deliver, OpenStream, StreamEnd, StreamPromptLogprobs, TopLogprobs
from fast_inference.protocol.names import frontend
from fast_inference.protocol.sampling import SamplingParams
from fast_inference.scheduler.fanout import Fanout, Homes
from hypothesis import given, settings
from hypothesis import strategies as st


def opened(number: int, name: str) -> OpenStream:
    return OpenStream(
        number=number, frontend=name, key=number, params=SamplingParams(), context_token_ids=np.empty(0, np.int32)
    )


def delivery(numbers: list[int], *, new: dict[int, str] | None = None, ended: tuple[int, ...] = ()) -> Deliver:
    """A step: stream n says token 10 n, with one log-probability record a token."""
    tokens = np.array(numbers, np.int32) * 10
    return Deliver(
        opened=tuple(opened(number, name) for number, name in (new or {}).items()),
        numbers=np.array(numbers, np.int64),
        tokens=tokens,
        logprobs=TopLogprobs(
            rows=np.arange(len(numbers), dtype=np.int32),
            counts=np.ones(len(numbers), np.int32),
            ranks=np.ones(len(numbers), np.int32),
            token_ids=tokens,
            values=np.zeros(len(numbers), np.float32),
        ),
        prompt_logprobs=tuple(StreamPromptLogprobs(key=number, top=TopLogprobs()) for number in new or {}),
        ended=tuple(StreamEnd(key=number, reason="length") for number in ended),
    )


def test_one_detokenizer_gets_every_message_as_it_is() -> None:
    message = delivery([1, 2], new={1: "frontend-0", 2: "frontend-0"})
    assert Homes(1).part(message) == [(0, message)]


# (which frontend, the step it comes with, how many steps it stays, in which of them it is silent)
LIVES = st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 4), st.sets(st.integers(0, 9), max_size=3))


@settings(deadline=None)
@given(st.lists(LIVES, max_size=8))
def test_every_row_reaches_the_detokenizer_of_its_frontend_once_and_in_order(
    lives: list[tuple[int, int, int, set[int]]],
) -> None:
    split = Homes(3)
    home = {number: life[0] for number, life in enumerate(lives)}
    for step in range(10):
        coming = [n for n, (_, first, _, _) in enumerate(lives) if first == step]
        rows = [
            n for n, (_, first, stay, mute) in enumerate(lives) if first <= step < first + stay and step not in mute
        ]
        leaving = tuple(n for n, (_, first, stay, _) in enumerate(lives) if first + stay - 1 == step)
        message = delivery(rows, new={n: frontend(home[n]) for n in coming}, ended=leaving)
        parts = dict(split.part(message))
        for place in range(3):
            part = parts.get(place, Deliver())
            mine = [n for n in rows if home[n] == place]
            assert part.numbers.tolist() == mine
            assert part.tokens.tolist() == [10 * n for n in mine]
            if mine:
                assert part.logprobs is not None
                assert part.logprobs.rows.tolist() == list(range(len(mine)))
                assert part.logprobs.token_ids.tolist() == part.tokens.tolist()
            assert [o.number for o in part.opened] == [n for n in coming if home[n] == place]
            assert [p.key for p in part.prompt_logprobs] == [n for n in coming if home[n] == place]
            assert [e.key for e in part.ended] == [n for n in leaving if home[n] == place]


def test_a_frontend_that_has_no_detokenizer_of_its_own_gets_the_first() -> None:
    parts = Homes(2).part(delivery([1, 2], new={1: "frontend-9", 2: "a stranger"}))
    assert [(place, part.numbers.tolist()) for place, part in parts] == [(0, [1, 2])]


def numbers_of(socket: MemorySocket) -> list[list[int]]:
    out = []
    while (received := socket.receive()) is not None:
        assert isinstance(received[1], Deliver)
        out.append(received[1].numbers.tolist())
    return out


def test_a_full_link_keeps_its_own_part_and_holds_up_no_other() -> None:
    wire = MemoryWire()
    readers = [wire.bind_pull("tokens", hwm=1), wire.bind_pull("tokens-1", hwm=100)]
    fanout = Fanout([wire.push("tokens", hwm=0), wire.push("tokens-1", hwm=100)])
    fanout.deliver(delivery([1, 2], new={1: "frontend-0", 2: "frontend-1"}))
    for _ in range(3):
        fanout.deliver(delivery([1, 2]))
    assert fanout.holds_back
    assert numbers_of(readers[1]) == [[2]] * 4
    assert numbers_of(readers[0]) == [[1]]
    fanout.flush()
    assert not fanout.holds_back
    assert numbers_of(readers[0]) == [[1, 1, 1]]
