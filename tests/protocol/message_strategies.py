"""Hypothesis strategies for every message, derived from the dataclass annotations."""

from __future__ import annotations

import dataclasses
import types
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from fast_inference.protocol import messages
from fast_inference.protocol.sampling import MAX_LOGPROBS, MAX_N, SamplingParams
from hypothesis import strategies as st

TYPES: tuple[type, ...] = get_args(messages.Message)
INT64 = st.integers(-(2**63), 2**63 - 1)
TOKEN = st.integers(0, 2**31 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

SAMPLING = st.builds(
    SamplingParams,
    n=st.integers(1, MAX_N),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=st.none() | INT64,
    stop=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
    stop_token_ids=st.lists(TOKEN, max_size=3).map(tuple),
    include_stop_str_in_output=st.booleans(),
    ignore_eos=st.booleans(),
    max_tokens=st.none() | st.integers(100, 2**31 - 1),
    min_tokens=st.integers(0, 100),
    logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
    prompt_logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
    truncate_prompt_tokens=st.none() | st.just(-1) | st.integers(1, 2**31 - 1),
    skip_special_tokens=st.booleans(),
    spaces_between_special_tokens=st.booleans(),
    logit_bias=st.dictionaries(TOKEN, st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | st.lists(TOKEN, min_size=1, max_size=3).map(tuple),
    output_kind=st.integers(0, 2),
)


def array(dtype: str) -> st.SearchStrategy[Any]:
    kind = np.dtype(dtype)
    return st.binary(max_size=5 * kind.itemsize).map(
        lambda raw: np.frombuffer(raw[: len(raw) // kind.itemsize * kind.itemsize], kind)
    )


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that fit an annotation."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return array(args[1])
    if origin in (Union, types.UnionType):
        return st.one_of(*[st.none() if a is type(None) else of(a) for a in args])
    if origin is tuple:
        return st.lists(of(args[0]), max_size=3).map(tuple)
    if origin is list:
        return st.lists(of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(of(args[0]), of(args[1]), max_size=3)
    if hint is SamplingParams:
        return SAMPLING
    if dataclasses.is_dataclass(hint):
        return struct(hint)
    return {int: INT64, float: st.floats(allow_nan=False), str: st.text(max_size=8), bool: st.booleans(), Any: PLAIN}[
        hint
    ]


def struct(cls: type) -> st.SearchStrategy[Any]:
    """Instances of a dataclass: each field given, or left at its default where it has one."""
    hints = get_type_hints(cls, include_extras=True)
    required, optional = {}, {}
    for field in dataclasses.fields(cls):
        bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        (required if bare else optional)[field.name] = of(hints[field.name])
    return st.fixed_dictionaries(required, optional=optional).map(lambda given: cls(**given))


ANY_MESSAGE = st.one_of(*[st.deferred(lambda cls=cls: struct(cls)) for cls in TYPES])


def same(a: Any, b: Any) -> bool:
    """Equality with arrays inside; types count."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)
