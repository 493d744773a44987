"""The supervisor with stub actors: real processes, no engine."""

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fast_inference.launch import rundir, supervisor
from fast_inference.launch.listener import listen
from fast_inference.launch.supervisor import State, Supervisor
from fast_inference.protocol import names
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import EngineDead, StartupError
from fast_inference.protocol.messages import Ready

STUB = Path(__file__).with_name("stub_actor.py")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FAST_INFERENCE_HOME", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.glob("run/*")), "a run directory was left behind"


def make(lines: list[str], start_timeout: float = 30, frontends: int = 1, **behaviours: str) -> Supervisor:
    """A supervisor whose actors are good, but for the named ones (by kind: "frontend" is every frontend)."""

    def command(role: str, run_dir: Path, http_fd: int | None) -> list[str]:
        return [sys.executable, str(STUB), behaviours.get(role.split("-")[0], "good"), role, str(run_dir)]

    config = EngineConfig(model="/nowhere", port=None, api_server_count=frontends, start_timeout=start_timeout)
    return Supervisor(config, command=command, on_line=lambda role, line: lines.append(line))


def alive(pids: dict[str, int]) -> list[str]:
    return [role for role, pid in pids.items() if psutil.pid_exists(pid)]


def test_start_and_stop_go_in_order_and_leave_nothing(home: Path) -> None:
    lines: list[str] = []
    events = []
    engine = make(lines)
    engine.start()
    engine.wait_ready(events.append)
    assert engine.state is State.READY
    assert engine.facts["executor"] == {"blocks": 7}
    assert {event.actor for event in events if isinstance(event, Ready)} == set(engine.pids)
    assert [card.pid for _, card in rundir.living()] == [os.getpid()]
    assert alive(engine.pids) == list(engine.pids)
    mode = Path(engine.endpoints.run_dir).stat().st_mode
    assert mode & 0o777 == 0o700
    engine.stop(drain_seconds=2.5)
    assert engine.state is State.STOPPED and engine.failure is None
    assert lines == [
        "frontend-0 stops, drain 2.5",
        "scheduler stops, drain 0.0",
        "executor stops, drain 0.0",
        "detokenizer stops, drain 0.0",
    ]
    assert not alive(engine.pids)


def test_all_frontends_drain_together_before_anything_else_stops(home: Path) -> None:
    lines: list[str] = []
    engine = make(lines, frontends=2)
    engine.start()
    engine.wait_ready()
    assert set(engine.pids) == set(names.actors(2))
    engine.stop(drain_seconds=2.5)
    assert sorted(lines[:2]) == ["frontend-0 stops, drain 2.5", "frontend-1 stops, drain 2.5"]
    assert lines[2:4] == ["scheduler stops, drain 0.0", "executor stops, drain 0.0"]
    assert sorted(lines[4:]) == ["detokenizer stops, drain 0.0", "detokenizer-1 stops, drain 0.0"]
    assert not alive(engine.pids)


def test_an_actor_that_dies_at_start_ends_the_engine_with_its_last_line(home: Path) -> None:
    engine = make([], executor="dies")
    engine.start()
    with pytest.raises(StartupError, match=r"executor ended with status 3; its last words: no such thing as a model"):
        engine.wait_ready()
    assert not alive(engine.pids)


def test_last_words_are_shown_as_they_are(home: Path) -> None:
    engine = make([], executor="fatal")
    engine.start()
    with pytest.raises(StartupError, match=r"^the model needs 9 GiB, 1 GiB is free: take a smaller one$"):
        engine.wait_ready()
    assert not alive(engine.pids)


def test_an_actor_that_hangs_at_start_meets_the_deadline(home: Path) -> None:
    engine = make([], start_timeout=2, executor="hangs")
    engine.start()
    with pytest.raises(StartupError, match=r"executor.* not ready within 2 s"):
        engine.wait_ready()
    assert not alive(engine.pids)


def test_an_actor_of_another_wire_version_is_refused(home: Path) -> None:
    engine = make([], scheduler="foreign")
    engine.start()
    with pytest.raises(StartupError, match=r"scheduler speaks version 99"):
        engine.wait_ready()


def test_an_actor_that_dies_later_ends_the_engine_and_tells_the_owner(home: Path) -> None:
    told = []
    engine = make([], detokenizer="dies later")
    engine.on_end(told.append)
    engine.start()
    engine.wait_ready()
    assert engine.wait(10)
    assert isinstance(engine.failure, EngineDead)
    assert "detokenizer ended with status 4; its last words: a wire has come loose" in str(engine.failure)
    assert told == [engine.failure]
    assert not alive(engine.pids)


def test_a_killed_actor_is_named_with_its_signal(home: Path) -> None:
    engine = make([])
    engine.start()
    engine.wait_ready()
    os.kill(engine.pids["scheduler"], signal.SIGKILL)
    assert engine.wait(10)
    assert "scheduler was killed by SIGKILL" in str(engine.failure)


def test_a_deaf_actor_is_killed_after_its_deadline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "TERMINATE_SECONDS", 0.5)
    engine = make([], scheduler="deaf")
    engine.start()
    engine.wait_ready()
    engine.stop()
    assert not alive(engine.pids)


def test_a_second_order_to_stop_skips_the_waiting(home: Path) -> None:
    engine = make([], frontend="deaf")
    engine.start()
    engine.wait_ready()
    began = time.monotonic()
    engine.request_stop(drain_seconds=60)
    time.sleep(0.2)
    engine.request_stop()
    assert engine.wait(10)
    assert time.monotonic() - began < 5
    assert not alive(engine.pids)


def test_a_stop_while_starting_ends_the_wait(home: Path) -> None:
    engine = make([], executor="hangs")
    engine.start()
    engine.request_stop()
    with pytest.raises(EngineDead, match="stopped while it started"):
        engine.wait_ready()
    assert engine.failure is None
    assert not alive(engine.pids)


def test_a_killed_supervisor_takes_its_actors_along(home: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, time
        from fast_inference.launch.supervisor import Supervisor
        from fast_inference.protocol.config import EngineConfig
        engine = Supervisor(
            EngineConfig(model="/nowhere", port=None),
            command=lambda role, run_dir, fd: [sys.executable, {str(STUB)!r}, "good", role, str(run_dir)],
        )
        engine.start()
        engine.wait_ready()
        print(*engine.pids.values(), flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 4
        process.kill()
    _gone, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not left
    assert not rundir.living()
    rundir.remove_dead()  # what the next start does


@pytest.mark.parametrize("taken_by", [1, 3])
@pytest.mark.parametrize("wanted_by", [1, 2])
def test_a_taken_port_is_one_line_and_nothing_starts(home: Path, taken_by: int, wanted_by: int) -> None:
    taken = listen("127.0.0.1", 0, taken_by)
    try:
        port = taken[0].getsockname()[1]
        engine = Supervisor(EngineConfig(model="/nowhere", port=port, api_server_count=wanted_by))
        with pytest.raises(StartupError, match=f"port {port} is in use"):
            engine.start()
    finally:
        for sock in taken:
            sock.close()


def test_frontends_have_a_socket_each_on_one_port(home: Path) -> None:
    sockets = listen("127.0.0.1", 0, 3)
    try:
        assert len({sock.getsockname() for sock in sockets}) == 1
        # The kernel draws lots: that one of three gets none of a hundred connections is out of the question.
        connections = [socket.create_connection(sockets[0].getsockname()) for _ in range(100)]
        accepted: dict[socket.socket, int] = dict.fromkeys(sockets, 0)
        while sum(accepted.values()) < 100:
            ready, _, _ = select.select(sockets, [], [], 30)
            assert ready, f"of 100 connections these were accepted: {list(accepted.values())}"
            for sock in ready:
                sock.accept()[0].close()
                accepted[sock] += 1
        assert all(accepted.values())
        for connection in connections:
            connection.close()
    finally:
        for sock in sockets:
            sock.close()
