"""Model classes that a user has registered by name, and where another process finds them again.

Owns `register_model`. Imports no torch: the launcher reads the registry and hands it to the executor as text.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType

from ..protocol.errors import InvalidRequest, StartupError

_registered: dict[str, str] = {}


def register_model(name: str, cls: type) -> None:
    """Make `cls`, a torch.nn.Module class, known as `name`: `AsyncEngine(model="class:NAME", model_config={...})`.

    The executor is another process and imports the class anew: from its module, or from its file where it is defined
    in a script (whose `if __name__ == "__main__"` part does not run then). What the class must have is told in
    `executor/models/custom_model.py`. Raises `InvalidRequest` for a class that cannot be found again.
    """
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"name must be a non-empty string, got {name!r}", param="name")
    if not isinstance(cls, type):
        raise InvalidRequest(f"cls must be a class, got {type(cls).__name__}: register the class, not an instance",
                             param="cls")  # fmt: skip
    _registered[name] = class_spec(cls)


def registered_models() -> dict[str, str]:
    """What has been registered in this process: name -> "module:Class" or "/path/file.py:Class"."""
    return dict(_registered)


def class_spec(cls: type) -> str:
    """Text by which another process finds `cls`. Raises `InvalidRequest` saying what to do if none does."""
    where = f"{cls.__module__}.{cls.__qualname__}"
    if "<locals>" in cls.__qualname__:
        raise InvalidRequest(
            f"{where} is defined inside a function, where another process can't find it: move it to the top level of "
            "a file, or hand over a live instance",
            param="cls",
        )
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if "." in cls.__module__:  # part of an installed package, whose own imports need its name
        return f"{cls.__module__}:{cls.__qualname__}"
    if file is None or not Path(file).is_file():
        raise InvalidRequest(
            f"{where} is defined in no file (a notebook or a prompt), where another process can't find it: put it in "
            "a file and import it, or hand over a live instance",
            param="cls",
        )
    return f"{Path(file).resolve()}:{cls.__qualname__}"


def find_class(name: str, spec: str) -> type:
    """The class that `spec` ("module:Class" or "file.py:Class") names. Raises `StartupError` with the reason."""
    place, colon, qualname = spec.rpartition(":")
    if not colon or not place or not qualname:
        raise StartupError(f"model class {name!r}: {spec!r} must be 'module:Class' or 'path/file.py:Class'")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise StartupError(
            f"model class {name!r}: importing {place} failed ({error}); install it or set PYTHONPATH"
        ) from error
    found: object = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise StartupError(f"model class {name!r}: {place} has no class {qualname}")
    return found


def _load_file(path: Path) -> ModuleType:
    """Run a Python file as a module under a name of ours, so that it does not take itself for the main script."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise StartupError(f"there is no file {path} to load a model class from")
    name = f"_fast_inference_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StartupError(f"{path} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its own imports of files beside it
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # half a module must not be found by the next call
        raise
    return module
