"""The house rules: who may import whom, what starts light, what is packaged, and that each file says what it is."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("protocol", "frontend", "scheduler", "executor", "simulator", "launch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    done = run_python(f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_import_contracts_hold(tmp_path: Path):
    package = tmp_path / "fast_inference"  # the linter finds a package by its folder: lay it out as installed
    shutil.copytree(ROOT / "launch" / "public", package)
    for room in ROOMS:
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("public", "*.md", "*.c", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    contracts = len(PROJECT["tool"]["importlinter"]["contracts"])
    assert f"Contracts: {contracts} kept, 0 broken." in done.stdout


def test_the_packaged_folders_are_those_that_hold_code():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in FILES}
    assert set(SETUPTOOLS["package-dir"].values()) == folders
    assert set(SETUPTOOLS["package-dir"]) == set(SETUPTOOLS["packages"])
    for name, folder in SETUPTOOLS["package-dir"].items():
        inside = name.removeprefix("fast_inference").lstrip(".").replace(".", "/")
        assert folder in (inside, f"launch/public/{inside}".rstrip("/"))


def test_files_that_are_no_python_are_packaged_with_their_folder():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"][package]
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"nothing in {folder} matches {pattern}"
    packaged = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / SETUPTOOLS["package-dir"][package]).glob(pattern)
    }
    others = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout.split()
    left_out = {ROOT / name for name in others if not name.endswith(".py")} - packaged
    assert {path for path in left_out if path.exists()} == set()


def test_the_package_by_itself_is_light():
    assert not modules_after("import fast_inference") & {"torch", "transformers", "zmq", "fastapi", "numpy"}


@pytest.mark.parametrize("room", ["protocol", "scheduler", "simulator"])
def test_protocol_scheduler_and_simulator_start_without_torch_or_transformers(room):
    files = [path.stem for path in (ROOT / room).glob("*.py") if path.stem not in ("__init__", "__main__")]
    held = modules_after("\n".join(f"import fast_inference.{room}.{name}" for name in files))
    assert not held & {"torch", "transformers", "tokenizers", "fastapi", "uvicorn"}


def test_the_frontend_starts_without_torch():
    files = [path.stem for path in (ROOT / "frontend").glob("*.py") if path.stem != "__init__"]
    assert "torch" not in modules_after("\n".join(f"import fast_inference.frontend.{name}" for name in files))


def test_the_detokenizer_starts_without_transformers():
    assert not modules_after("import fast_inference.frontend.detokenizer") & {"torch", "transformers"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_file_opens_by_saying_what_it_is(path):
    source = path.read_text()
    assert source == "" or ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no docstring"


def test_the_public_names_are_those_of_the_list():
    import fast_inference

    for name in fast_inference.__all__:
        assert getattr(fast_inference, name) is not None
    assert len(set(fast_inference.__all__)) == len(fast_inference.__all__)
    public = {name for name in dir(fast_inference) if not name.startswith("_")}
    assert set(fast_inference.__all__) <= public
    named_in_the_design = {
        "LLM",
        "AsyncEngine",
        "Client",
        "AsyncClient",
        "SamplingParams",
        "SchedulerPolicy",
        "EngineConfig",
        "register_model",
        "create_vllm_style_engine",
    }
    assert named_in_the_design <= set(fast_inference.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fast_inference.no_such_name


def test_every_public_name_is_what_a_checker_sees():
    """The lazy names and the imports under TYPE_CHECKING are the same list."""
    import fast_inference

    tree = ast.parse((ROOT / "launch" / "public" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(fast_inference.__all__) - {"__version__"}
