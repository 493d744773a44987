"""The whole state of a core as plain data, and back: where a journal that was rotated begins.

A walk over the objects of this package: whatever rooms the core has, their attributes are taken as they are, so that
nothing is to be told here when one is added. Shared objects stay shared. Thawing runs no code of what it reads: it
makes objects of this package's classes (and of the policy's module, which the core has loaded already) and sets
their attributes; anything else is refused. Must not know files.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from enum import Enum
from importlib import import_module
from typing import Any

import numpy as np

from ..protocol.config import EngineConfig
from ..protocol.errors import EngineError
from .core import SchedulerCore

Plain = Any  # nil, bool, int, float, str, bytes, and lists of such
_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_PACKAGE = __name__.rpartition(".scheduler")[0]
_ROOMS = (f"{_PACKAGE}.scheduler.", f"{_PACKAGE}.protocol.")
_OWN = frozenset({"config", "_handlers"})  # what a new core has by itself


class SnapshotError(EngineError):
    """State that has no plain form, or plain data that is no state."""


def freeze_core(core: SchedulerCore) -> Plain:
    """The state of `core`. Raises `SnapshotError` naming the attribute that can't be taken."""
    state = {name: value for name, value in vars(core).items() if name not in _OWN}
    return _Freezer(type(core.policy).__module__).freeze(state, "core")


def thaw_core(core: SchedulerCore, data: Plain) -> None:
    """Give a new `core` the state that `freeze_core` took of one with the same settings. Raises `SnapshotError`."""
    try:
        state = _Thawer(type(core.policy).__module__, core.config).thaw(data)
        attributes = {str(name): value for name, value in state.items()}
    except (AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"the snapshot can't be read: {type(error).__name__}: {error}") from error
    expected = vars(core).keys() - _OWN
    if attributes.keys() != expected:
        different = ", ".join(sorted(attributes.keys() ^ expected))
        raise SnapshotError(f"the snapshot is of another version of the scheduler: {different}")
    vars(core).update(attributes)


def _slots_of(cls: type) -> list[str]:
    return [name for base in cls.__mro__ for name in getattr(base, "__slots__", ()) if name != "__weakref__"]


class _Freezer:
    """One walk. Each mutable object gets the next number at first sight; seen again, it is that number."""

    def __init__(self, policy_module: str) -> None:
        self._policy_module = policy_module
        self._numbers: dict[int, int] = {}
        self._seen: list[object] = []  # alive to the end of the walk, so that no id is used twice

    def freeze(self, value: Any, path: str) -> Plain:
        kind = type(value)
        if kind in _SCALARS:
            return value
        if isinstance(value, EngineConfig):
            return ["settings"]  # the thawed core has them, and a journal must not hold the API key
        if kind is tuple:
            return ["tuple", [self.freeze(item, path) for item in value]]
        if isinstance(value, tuple):
            return ["named", self._name(kind, path), [self.freeze(item, path) for item in value]]
        if isinstance(value, Enum):
            return ["enum", self._name(kind, path), value.value]
        if isinstance(value, np.generic):
            return ["number", value.dtype.str, value.tobytes()]
        if id(value) in self._numbers:
            return ["again", self._numbers[id(value)]]
        self._numbers[id(value)] = len(self._seen)
        self._seen.append(value)
        if kind is list:
            if _SCALARS.issuperset(map(type, value)):
                return ["scalars", list(value)]
            return ["list", [self.freeze(item, f"{path}[]") for item in value]]
        if kind in (dict, OrderedDict):
            return self._freeze_dict(value, path)
        if kind is set or kind is frozenset:
            return [kind.__name__, [self.freeze(item, path) for item in value]]
        if kind is deque:
            return ["deque", value.maxlen, [self.freeze(item, f"{path}[]") for item in value]]
        if kind is np.ndarray:
            if value.dtype.hasobject:
                raise SnapshotError(f"{path} is an array of objects")
            return ["array", value.dtype.str, list(value.shape), value.tobytes()]
        return self._freeze_object(value, path)

    def _freeze_dict(self, value: dict[Any, Any], path: str) -> Plain:
        keys, items = list(value), list(value.values())
        kind = type(value).__name__
        if _SCALARS.issuperset(map(type, keys)) and _SCALARS.issuperset(map(type, items)):
            return [kind, keys, items]
        return [
            kind,
            [self.freeze(key, path) for key in keys],
            [self.freeze(item, f"{path}[{key!r}]") for key, item in value.items()],
        ]

    def _freeze_object(self, value: object, path: str) -> Plain:
        cls = type(value)
        name = self._name(cls, path)
        names = [*_slots_of(cls), *getattr(value, "__dict__", ())]
        fields = {n: self.freeze(getattr(value, n), f"{path}.{n}") for n in names if hasattr(value, n)}
        return ["object", name, list(fields), list(fields.values())]

    def _name(self, cls: type, path: str) -> str:
        if not cls.__module__.startswith(_ROOMS) and cls.__module__ != self._policy_module:
            raise SnapshotError(f"{path} is a {cls.__module__}.{cls.__qualname__}, which a snapshot can't hold")
        return f"{cls.__module__.removeprefix(_PACKAGE)}:{cls.__qualname__}"


class _Thawer:
    """The walk back; objects get the same numbers in the same order."""

    def __init__(self, policy_module: str, config: EngineConfig) -> None:
        self._policy_module = policy_module
        self._config = config
        self._made: list[Any] = []

    def thaw(self, data: Plain) -> Any:
        if type(data) in _SCALARS:
            return data
        kind, *rest = data
        if kind == "settings":
            return self._config
        if kind == "tuple":
            return tuple(self.thaw(item) for item in rest[0])
        if kind == "named":
            return tuple.__new__(self._class(rest[0]), [self.thaw(item) for item in rest[1]])
        if kind == "enum":
            return self._class(rest[0])(rest[1])
        if kind == "number":
            return np.frombuffer(rest[1], rest[0])[0]
        if kind == "again":
            return self._made[rest[0]]
        return self._thaw_shared(kind, rest)

    def _thaw_shared(self, kind: str, rest: list[Any]) -> Any:
        made: Any
        if kind == "array":
            made = np.frombuffer(rest[2], rest[0]).reshape(rest[1]).copy()
            self._made.append(made)
        elif kind == "scalars":
            made = rest[0]
            self._made.append(made)
        elif kind == "list":
            made = []
            self._made.append(made)
            made.extend(self.thaw(item) for item in rest[0])
        elif kind in ("dict", "OrderedDict"):
            made = {} if kind == "dict" else OrderedDict()
            self._made.append(made)
            keys = [self.thaw(key) for key in rest[0]]
            made.update(zip(keys, (self.thaw(item) for item in rest[1]), strict=True))
        elif kind == "deque":
            made = deque(maxlen=rest[0])
            self._made.append(made)
            made.extend(self.thaw(item) for item in rest[1])
        elif kind in ("set", "frozenset"):
            number = len(self._made)
            self._made.append(None)  # its members can't hold it
            made = {self.thaw(item) for item in rest[0]}
            self._made[number] = made = made if kind == "set" else frozenset(made)
        elif kind == "object":
            cls = self._class(rest[0])
            made = object.__new__(cls)
            self._made.append(made)
            for name, item in zip(rest[1], rest[2], strict=True):
                object.__setattr__(made, name, self.thaw(item))  # also of a frozen dataclass
        else:
            raise SnapshotError(f"unknown kind {kind!r:.40}")
        return made

    def _class(self, name: str) -> type:
        module, _, qualname = name.partition(":")
        if module.startswith("."):
            module = _PACKAGE + module
        if module.startswith(_ROOMS):
            found: Any = import_module(module)
        elif module == self._policy_module:
            found = sys.modules[module]
        else:
            raise SnapshotError(f"{name:.80} is no class of the scheduler")
        for part in qualname.split("."):
            found = getattr(found, part)
        if not isinstance(found, type):
            raise SnapshotError(f"{name:.80} is no class")
        return found
