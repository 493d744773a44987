"""From what the user calls a model to a folder, with the child process that fetches replaced by a line of Python."""

import json
import sys
import threading
from pathlib import Path

import pytest
from fast_inference.launch import models
from fast_inference.launch.models import DEFAULT_MODEL, ModelFinder
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import EngineDead, StartupError
from fast_inference.protocol.messages import Progress


def find(model: str, **settings: object) -> tuple[EngineConfig, list[Progress]]:
    events: list[Progress] = []
    config = EngineConfig(model=model, **settings)  # type: ignore[arg-type]
    return ModelFinder().find(config, events.append), events


def replace_child(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Run `script` in place of the process that downloads or converts."""
    monkeypatch.setattr(models, "fetch_command", lambda model, revision: [sys.executable, "-c", script])


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config, events = find(str(tmp_path))
    assert config.model == str(tmp_path) and config.model_name == str(tmp_path) and not events


def test_a_served_name_of_the_users_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find(str(tmp_path), served_model_name="mine")[0].model_name == "mine"


def test_the_default_model_once_converted_needs_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_INFERENCE_HOME", str(tmp_path))
    folder = tmp_path / "models" / DEFAULT_MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    replace_child(monkeypatch, "raise SystemExit(9)")
    config, _ = find("")
    assert config.model == str(folder) and config.model_name == DEFAULT_MODEL


def test_what_the_child_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"phase": "downloading", "done": 1, "total": 2}, {"folder": "/somewhere"}]
    replace_child(monkeypatch, f"print('noise')\nfor line in {[json.dumps(line) for line in lines]!r}: print(line)")
    config, events = find("owner/name")
    assert config.model == "/somewhere" and config.model_name == "owner/name"
    assert events == [Progress(actor="model", phase="downloading", done=1, total=2)]


def test_the_childs_error_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"error": "startup_error", "message": "no such model"})
    replace_child(monkeypatch, f"print({line!r}); raise SystemExit(1)")
    with pytest.raises(StartupError, match=r"^no such model$"):
        find("owner/name")


def test_a_child_that_crashes_is_told_with_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_child(monkeypatch, "raise MemoryError('all gone')")
    with pytest.raises(StartupError, match=r"could not prepare the model owner/name: MemoryError: all gone"):
        find("owner/name")


@pytest.mark.parametrize("model", ["/no/such", "./such", "a/b/c", "x.gguf"])
def test_a_path_without_a_model_needs_no_network_to_be_refused(model: str) -> None:
    with pytest.raises(StartupError, match="there is no model at"):
        find(model)


def test_registered_classes_and_live_modules_stay() -> None:
    assert find("live", served_model_name="Net")[0].model == "live"
    config, _ = find("class:Mini")
    assert (config.model, config.model_name) == ("class:Mini", "Mini")
    config, _ = find("Mini", model_classes={"Mini": "mini.py:Mini"})
    assert (config.model, config.model_name) == ("class:Mini", "Mini")


def test_cancelling_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_child(monkeypatch, "import time; time.sleep(60)")
    finder = ModelFinder()
    timer = threading.Timer(0.3, finder.cancel)
    timer.start()
    with pytest.raises(EngineDead, match="stopped"):
        finder.find(EngineConfig(model="owner/name"), lambda event: None)
    timer.join()
