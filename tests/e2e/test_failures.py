"""What goes wrong ends in one clear line, an exit status, and nothing left behind."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator

import httpx
import pytest

from .engine_process import EngineProcess, run_command, run_dirs_of


def assert_one_line(stderr: str, *words: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    for word in words:
        assert word in errors[0], stderr
    assert "Traceback" not in stderr


def test_a_port_in_use_is_told_before_anything_starts(tiny_folder: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        began = time.monotonic()
        done = run_command("serve", tiny_folder, "--port", str(port))
    assert done.returncode == 1
    assert_one_line(done.stderr, f"port {port} is in use", "--port")
    assert "executor" not in done.stderr
    assert time.monotonic() - began < 5


def test_a_missing_model_is_told(tiny_folder: str) -> None:
    done = run_command("serve", "/no/such/model", "--port", "0")
    assert done.returncode == 1
    assert_one_line(done.stderr, "/no/such/model")


def test_a_folder_without_a_model_is_told(tmp_path: os.PathLike[str]) -> None:
    done = run_command("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert_one_line(done.stderr, str(tmp_path))


def test_too_little_memory_for_keys_and_values_is_told(tiny_folder: str) -> None:
    done = run_command("serve", tiny_folder, "--port", "0", "--kv-cache-memory", "1KiB")
    assert done.returncode == 1
    assert_one_line(done.stderr, "kv_cache_memory")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs must be in [1, 65536], got 0"),
        (["--kv-cache-memory", "4Foo"], "'4Foo' is no size"),
        (["-tp", "2"], "--tensor-parallel-size must be 1"),
        (["--dtype", "int3"], "--dtype must be one of"),
    ],
)
def test_a_flag_out_of_range_is_told_with_status_two(flags: list[str], words: str) -> None:
    done = run_command("serve", *flags)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("role", ["executor", "frontend-0"])
def test_a_killed_actor_ends_the_engine_within_seconds(tiny_folder: str, role: str) -> None:
    with EngineProcess(tiny_folder, "--num-blocks", "64") as engine:
        engine.wait_ready()
        actors = engine.actors()
        actors[role].kill()
        assert engine.wait(10) == 1
        assert_one_line("\n".join(engine.lines), f"{role} was killed by SIGKILL")
        engine.assert_nothing_left(actors)


def test_a_running_request_is_finished_at_sigterm(tiny_folder: str) -> None:
    with EngineProcess(tiny_folder, "--num-blocks", "64") as engine:
        engine.wait_ready()
        actors = engine.actors()
        body = {"prompt": "hello", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{engine.url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            engine.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert engine.wait(20) == 0
        engine.assert_nothing_left(actors)


def test_a_stop_while_starting_leaves_nothing(tiny_folder: str) -> None:
    with EngineProcess(tiny_folder, "--num-blocks", "64") as engine:
        engine.wait_for("executor: importing torch")
        actors = engine.actors()
        assert engine.stop(signal.SIGINT, 15) == 0
        engine.assert_nothing_left(actors)
        assert "Traceback" not in "\n".join(engine.lines)


@pytest.fixture
def own_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run directories apart from other engines', each of which removes at its start what dead ones have left."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


def test_a_killed_supervisor_leaves_no_process(tiny_folder: str, own_runtime: None) -> None:
    with EngineProcess(tiny_folder, "--num-blocks", "64") as engine:
        engine.wait_for("executor: importing torch")
        actors = engine.actors()
        engine.process.kill()
        engine.wait(5)
        left = run_dirs_of(engine.process.pid)
    assert len(left) == 1
    run_command("serve", "/no/such/model")  # does not get far enough to clean up
    assert run_dirs_of(engine.process.pid) == left
    from fast_inference.launch.rundir import remove_dead

    remove_dead()  # what the next engine does
    engine.assert_nothing_left(actors)
