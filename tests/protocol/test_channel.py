"""Sockets and their twin in memory behave alike; the asyncio reader misses nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from fast_inference.protocol import channel
from fast_inference.protocol.channel import AsyncReader, PeerGone, Wire, refuse_open_tcp
from fast_inference.protocol.errors import ProtocolError, StartupError
from fast_inference.protocol.memory import MemoryWire
from fast_inference.protocol.messages import Abort, Attach, GetStats, StopFound

HWM = 5


class Zmq:
    """Real sockets on ipc files; what was sent takes a moment."""

    def __init__(self, tmp_path: Path) -> None:
        self.wire = Wire()
        self.address = f"ipc://{tmp_path}/link.sock"

    def receive(self, socket, seconds: float = 5.0):
        deadline = time.monotonic() + seconds
        while (received := socket.receive()) is None and time.monotonic() < deadline:
            self.wire.wait([socket], 0.05)
        return received

    def settle(self) -> None:
        time.sleep(0.05)

    def raw_send(self, socket, frame: bytes) -> None:
        socket.raw.send(frame)

    def close(self) -> None:
        self.wire.close()


class Memory:
    """The twin."""

    def __init__(self) -> None:
        self.wire = MemoryWire()
        self.address = "link"

    def receive(self, socket, seconds: float = 0.0):
        return socket.receive()

    def settle(self) -> None:
        pass

    def raw_send(self, socket, frame: bytes) -> None:
        (peer,) = socket.peers.values()
        peer.queue.append((socket.name, frame))

    def close(self) -> None:
        pass


@pytest.fixture(params=["zmq", "memory"])
def link(request, tmp_path: Path):
    made = Zmq(tmp_path) if request.param == "zmq" else Memory()
    yield made
    made.close()


def test_a_dealer_and_a_router_speak_both_ways_by_name(link):
    router = link.wire.bind_router(link.address, hwm=HWM)
    one = link.wire.dealer(link.address, "one", hwm=HWM)
    two = link.wire.dealer(link.address, "two", hwm=HWM)
    assert one.send(GetStats(token=1)) and two.send(GetStats(token=2))
    came = {link.receive(router), link.receive(router)}
    assert came == {("one", GetStats(token=1)), ("two", GetStats(token=2))}
    assert router.send(GetStats(token=10), "one") and router.send(GetStats(token=20), "two")
    assert link.receive(two) == ("", GetStats(token=20))
    assert link.receive(one) == ("", GetStats(token=10))
    assert one.receive() is None


def test_a_push_reaches_its_pull_in_order_and_without_a_sender(link):
    pull = link.wire.bind_pull(link.address, hwm=HWM)
    push = link.wire.push(link.address, hwm=HWM)
    for token in range(HWM):
        assert push.send(GetStats(token=token))
    assert [link.receive(pull) for _ in range(HWM)] == [("", GetStats(token=token)) for token in range(HWM)]
    assert pull.receive() is None


def test_a_full_queue_says_so_and_takes_more_once_read(link):
    pull = link.wire.bind_pull(link.address, hwm=HWM)
    push = link.wire.push(link.address, hwm=HWM)
    link.settle()
    sent = 0
    while push.send(StopFound(numbers=tuple(range(20_000)))):  # large, so that the kernel's buffer does not hide it
        sent += 1
        assert sent < 1000
        link.settle()
    assert sent >= HWM
    for _ in range(sent):
        assert link.receive(pull) is not None
    link.settle()
    assert push.send(GetStats(token=1))


def test_a_full_peer_of_a_router_says_so_and_does_not_hold_up_another(link):
    router = link.wire.bind_router(link.address, hwm=HWM)
    slow = link.wire.dealer(link.address, "slow", hwm=HWM)
    quick = link.wire.dealer(link.address, "quick", hwm=HWM)
    slow.send(Attach(frontend="slow"))
    quick.send(Attach(frontend="quick"))
    assert link.receive(router) and link.receive(router)
    sent = 0
    while router.send(StopFound(numbers=tuple(range(20_000))), "slow"):
        sent += 1
        assert sent < 1000
        link.settle()
    assert sent >= HWM
    assert router.send(GetStats(token=3), "quick")
    assert link.receive(quick) == ("", GetStats(token=3))


def test_a_peer_that_never_was_or_has_left_is_gone(link):
    router = link.wire.bind_router(link.address, hwm=HWM)
    with pytest.raises(PeerGone, match="nobody"):
        router.send(GetStats(token=1), "nobody")
    dealer = link.wire.dealer(link.address, "one", hwm=HWM)
    dealer.send(Attach(frontend="one"))
    assert link.receive(router) is not None
    dealer.close()
    for _ in range(100):
        link.settle()
        try:
            router.send(GetStats(token=1), "one")
        except PeerGone:
            return
    raise AssertionError("a peer that left must be noticed")


def test_a_restarted_peer_takes_its_name_over(link):
    router = link.wire.bind_router(link.address, hwm=HWM)
    old = link.wire.dealer(link.address, "one", hwm=HWM)
    old.send(Attach(frontend="old"))
    assert link.receive(router) == ("one", Attach(frontend="old"))
    new = link.wire.dealer(link.address, "one", hwm=HWM)
    new.send(Attach(frontend="new"))
    assert link.receive(router) == ("one", Attach(frontend="new"))
    assert router.send(GetStats(token=1), "one")
    assert link.receive(new) == ("", GetStats(token=1))


def test_a_malformed_frame_comes_out_as_a_value_with_its_sender(link):
    router = link.wire.bind_router(link.address, hwm=HWM)
    dealer = link.wire.dealer(link.address, "one", hwm=HWM)
    link.raw_send(dealer, b"\xc1\x00")
    dealer.send(Abort(keys=(1,)))
    sender, error = link.receive(router)
    assert sender == "one" and isinstance(error, ProtocolError)
    assert link.receive(router) == ("one", Abort(keys=(1,)))


def test_a_malformed_frame_in_a_pipe_has_no_sender(link):
    pull = link.wire.bind_pull(link.address, hwm=HWM)
    push = link.wire.push(link.address, hwm=HWM)
    link.raw_send(push, b"")
    sender, error = link.receive(pull)
    assert sender == "" and isinstance(error, ProtocolError)


# ---- what only real sockets have ---------------------------------------------------------------------------------


@pytest.fixture
def wire():
    made = Wire()
    yield made
    made.close()


def test_a_message_in_several_frames_is_refused(wire, tmp_path: Path):
    pull = wire.bind_pull(f"ipc://{tmp_path}/a.sock", hwm=HWM)
    push = wire.push(f"ipc://{tmp_path}/a.sock", hwm=HWM)
    push.raw.send_multipart([b"a", b"b"])
    wire.wait([pull], 5)
    received = pull.receive()
    assert received is not None and isinstance(received[1], ProtocolError) and "got 2" in received[1].message


def test_an_identity_that_is_no_text_is_still_a_name(wire, tmp_path: Path):
    router = wire.bind_router(f"ipc://{tmp_path}/a.sock", hwm=HWM)
    dealer = wire.dealer(f"ipc://{tmp_path}/a.sock", "x", hwm=HWM)
    dealer.raw.close()
    raw = wire._socket(channel.zmq.DEALER, HWM)
    raw.setsockopt(channel.zmq.IDENTITY, b"\xff\xfe")
    raw.connect(f"ipc://{tmp_path}/a.sock")
    raw.send(b"")
    wire.wait([router], 5)
    received = router.receive()
    assert received is not None and received[0] == "\\xff\\xfe"


@pytest.mark.parametrize("endpoint", ["tcp://*:0", "tcp://0.0.0.0:5555", "tcp://10.0.0.1:5555", "tcp://example.org:1"])
def test_an_open_tcp_address_is_refused(endpoint, wire):
    with pytest.raises(StartupError, match="without authentication"):
        wire.bind_router(endpoint, hwm=HWM)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://localhost:5555", "tcp://[::1]:5555", "ipc:///x"])
def test_a_private_address_is_not_refused(endpoint):
    refuse_open_tcp(endpoint)


def test_a_router_can_be_bound_twice_and_tells_the_port_that_the_system_chose(wire, tmp_path: Path):
    router = wire.bind_router(f"ipc://{tmp_path}/a.sock", hwm=HWM)
    wire.also_bind(router, "tcp://127.0.0.1:*")
    assert router.endpoint.startswith("tcp://127.0.0.1:")
    dealer = wire.dealer(router.endpoint, "far", hwm=HWM)
    dealer.send(GetStats(token=4))
    wire.wait([router], 5)
    assert router.receive() == ("far", GetStats(token=4))


def test_an_address_that_cannot_be_bound_is_one_clear_line(wire, tmp_path: Path):
    with pytest.raises(StartupError, match="can't listen on ipc:"):
        wire.bind_pull(f"ipc://{tmp_path}/no/such/folder/a.sock", hwm=HWM)


async def test_the_asyncio_reader_gets_everything_while_both_sides_send(tmp_path: Path):
    count = 3000
    wire = Wire()
    router = wire.bind_router(f"ipc://{tmp_path}/a.sock", hwm=100_000)
    dealer = wire.dealer(f"ipc://{tmp_path}/a.sock", "one", hwm=100_000)
    to_router: list[int] = []
    to_dealer: list[int] = []
    done = asyncio.Event()

    def check() -> None:
        if len(to_router) == len(to_dealer) == count:
            done.set()

    def at_router(sender: str, message: object) -> None:
        assert isinstance(message, GetStats)
        to_router.append(message.token)
        check()

    def at_dealer(sender: str, message: object) -> None:
        assert isinstance(message, GetStats)
        to_dealer.append(message.token)
        check()

    one, many = AsyncReader(dealer, at_dealer), AsyncReader(router, at_router)

    async def send(reader: AsyncReader, to: str, pause: int) -> None:
        for token in range(count):
            assert reader.send(GetStats(token=token), to)
            if token % pause == 0:
                await asyncio.sleep(0.0005 if token % (3 * pause) else 0)

    assert one.send(GetStats(token=0))
    while not to_router:
        await asyncio.sleep(0.001)
    to_router.clear()
    await asyncio.gather(send(one, "", 7), send(many, "one", 11))
    await asyncio.wait_for(done.wait(), 20)
    assert to_router == to_dealer == list(range(count))
    one.close()
    many.close()
    wire.close()


async def test_a_handler_that_raises_does_not_stop_the_reader(tmp_path: Path):
    wire = Wire()
    pull = wire.bind_pull(f"ipc://{tmp_path}/a.sock", hwm=100)
    push = wire.push(f"ipc://{tmp_path}/a.sock", hwm=100)
    seen: list[object] = []
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context["exception"]))

    def handler(sender: str, message: object) -> None:
        seen.append(message)
        if len(seen) == 1:
            raise ValueError("first")

    reader = AsyncReader(pull, handler)
    for token in range(3):
        push.send(GetStats(token=token))
    for _ in range(500):
        if len(seen) == 3:
            break
        await asyncio.sleep(0.01)
    assert len(seen) == 3 and [str(problem) for problem in problems] == ["first"]
    reader.close()
    wire.close()
