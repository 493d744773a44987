"""From what a user calls a model to a folder on this disk that holds it as config.json and safetensors.

Owns folders, hub names (local cache first, then a download) and the files that a complete model has; GGUF files are
`gguf.py`'s. Must not know tensors: imports neither torch nor transformers, so that a model that is already there is
found at once.

Run as `python -m fast_inference.executor.checkpoint MODEL [--revision R]` it prints JSON lines: progress as
`{"phase", "done", "total"}`, then `{"folder"}` or `{"error", "message"}`. The launcher runs it so, because a
conversion needs gigabytes and libraries that the launcher itself must not keep.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..protocol.errors import EngineError, StartupError

Progress = Callable[[str, int, int], None]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
SHOWN = 5  # file names listed in an error


def resolve_checkpoint(model: str, revision: str | None, progress: Progress) -> Path:
    """The local folder of `model`: a folder, a GGUF file, a folder with one GGUF file, or a hub name.

    `model` "" is the default model. `revision`: branch, tag or commit of a hub name. `progress(phase, done, total)`
    counts bytes or tensors; total 0 is unknown. Raises `StartupError` saying what to do.
    """
    from .gguf import convert_gguf, find_default_gguf

    if not model:
        return convert_gguf(find_default_gguf(), progress)
    path = Path(model).expanduser()
    if path.is_dir():
        files = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise StartupError(f"{path} holds {len(files)} GGUF files: name one of them")
        return convert_gguf(files[0], progress) if files else path.resolve()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise StartupError(f"there is no GGUF file {model!r}")
        return convert_gguf(path, progress)
    if path.is_file():
        raise StartupError(f"{model} is a file: name the model's folder, or a .gguf file")
    if is_path(model):
        raise StartupError(f"there is no model folder {model!r}")
    return _from_hub(model, revision, progress)


def is_path(model: str) -> bool:
    """Whether `model` can only be a place on this disk, not a hub name ("owner/name" or "name")."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf")


def safetensors_files(folder: Path) -> list[Path]:
    """The files that hold the tensors of the model in `folder`, sharded or not. Raises `StartupError` naming what
    is missing, and how to convert a model that has only PyTorch pickles."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise StartupError(f"{folder / INDEX} is damaged: fetch the model again") from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            shown = ", ".join(absent[:SHOWN]) + (" and more" if len(absent) > SHOWN else "")
            raise StartupError(f"{folder} lacks {shown}: fetch the model again")
        return [folder / name for name in names]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth")):
        raise StartupError(
            f"{folder} holds PyTorch pickles, which can run code: convert it once with transformers "
            "(from_pretrained, then save_pretrained writes safetensors)"
        )
    raise StartupError(f"{folder} has no safetensors weights ({SINGLE} or {INDEX})")


def _from_hub(name: str, revision: str | None, progress: Progress) -> Path:
    """The snapshot of hub model `name` in the local cache, downloaded if it is not there or not whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=HUB_FILES))
        if _is_whole(cached):
            return cached
    except LocalEntryNotFoundError:
        pass  # not in the cache: the download below is the answer
    except HFValidationError:
        raise StartupError(f"{name!r} is neither a folder, a GGUF file nor a hub name (owner/name)") from None
    bar = _progress_bar(progress)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, tqdm_class=bar))
    except GatedRepoError:
        raise StartupError(f"{name} is gated: accept its terms on huggingface.co and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise StartupError(f"{name} has no revision {revision!r} on huggingface.co") from None
    except RepositoryNotFoundError:
        raise StartupError(
            f"huggingface.co has no model {name!r} (or it is private: set HF_TOKEN), and there is no such folder here"
        ) from None
    except (OSError, _http_error()) as error:
        raise StartupError(
            f"{name} is not in the local hub cache and can't be downloaded ({type(error).__name__}): connect to the "
            "network, set HF_ENDPOINT to a mirror, or give the path of a local folder"
        ) from None
    safetensors_files(folder)  # says what is missing, if the repository has no safetensors
    return folder


def _http_error() -> type[Exception]:
    """What huggingface_hub's HTTP client raises when there is no network."""
    import httpx

    return httpx.HTTPError


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file() and bool(safetensors_files(folder))
    except StartupError:
        return False


def _progress_bar(progress: Progress) -> type:
    """A tqdm class that draws nothing and reports the bytes that arrive."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Reporter(tqdm):  # type: ignore[misc]
        def display(self, *_: object, **__: object) -> None:
            if self.unit == "B":
                progress("downloading", int(self.n), int(self.total or 0))

    return Reporter


def _print_line(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Resolve one model and print JSON lines. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fast_inference.executor.checkpoint")
    parser.add_argument("model", help='folder, GGUF file or hub name; "" is the default model')
    parser.add_argument("--revision")
    options = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"  # the libraries' own bars would mix with the launcher's
    try:
        folder = resolve_checkpoint(
            options.model,
            options.revision,
            lambda phase, done, total: _print_line(phase=phase, done=done, total=total),
        )
    except EngineError as error:
        _print_line(error=error.code, message=str(error))
        return 1
    _print_line(folder=str(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
