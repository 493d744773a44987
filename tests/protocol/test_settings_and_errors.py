"""`EngineConfig`, the error tree and the run directory: ranges, JSON, codes, permissions."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from fast_inference.protocol import errors
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.endpoints import Endpoints, make_run_dir
from fast_inference.protocol.errors import EngineError, InvalidRequest, StartupError, error_from_code, status_of_code

WRONG = [
    ("load_format", "pickle"),
    ("dtype", "int8"),
    ("scheduling_policy", "random"),
    ("fair_weights", {"a": 0}),
    ("fair_weights", {"a": float("inf")}),
    ("fair_weights", {"a": "2"}),
    ("attention_backend", "magic"),
    ("log_level", "loud"),
    ("journal", ""),
    ("journal_redact", True),
    ("journal_max_bytes", 1000),
    ("max_model_len", 0),
    ("block_size", 0),
    ("num_blocks", 1),
    ("gpu_memory_utilization", 1.5),
    ("gpu_memory_utilization", "0.9"),
    ("kv_cache_memory", 0),
    ("threads", 0),
    ("max_num_seqs", 0),
    ("max_num_batched_tokens", 0),
    ("max_step_ms", 0),
    ("max_step_ms", 1e6),
    ("run_ahead", 0),
    ("run_ahead", 9),
    ("max_num_queued_reqs", 0),
    ("port", 65536),
    ("port", True),
    ("api_server_count", 0),
    ("api_server_count", 65),
    ("start_timeout", 0),
    ("shutdown_timeout", -1),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_setting_out_of_range_is_refused_with_field_and_value(field, value):
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig(**{field: value})
    assert caught.value.param == field
    wrong = next(iter(value.values())) if isinstance(value, dict) else value
    assert field in caught.value.message and repr(wrong) in caught.value.message


def test_settings_survive_json():
    config = EngineConfig(
        model="m", model_classes={"A": "a:B"}, model_config={"x": [1, {"y": None}]}, port=None, max_model_len=7
    )
    assert EngineConfig.from_json(config.to_json()) == config
    assert EngineConfig.from_json(EngineConfig().to_json()) == EngineConfig()


def test_without_chunked_prefill_a_whole_prompt_must_fit_a_step():
    with pytest.raises(InvalidRequest, match="max_num_batched_tokens"):
        EngineConfig(enable_chunked_prefill=False, max_model_len=4096, max_num_batched_tokens=2048)


def test_a_bound_for_steps_needs_prompts_that_may_be_cut():
    for setting, name in (({"max_step_ms": 5.0}, "max_step_ms"), ({"latency": True}, "latency")):
        with pytest.raises(InvalidRequest, match=rf"{name} needs enable_chunked_prefill"):
            EngineConfig(enable_chunked_prefill=False, **setting)


def test_latency_is_a_bound_for_steps_unless_one_is_given():
    assert EngineConfig().step_bound is None
    assert EngineConfig(latency=True).step_bound == 0.05
    assert EngineConfig(latency=True, max_step_ms=20.0).step_bound == 0.02


def test_the_name_that_clients_use_is_the_served_one_or_the_models():
    assert EngineConfig(model="m").model_name == "m"
    assert EngineConfig(model="m").replace(served_model_name="s").model_name == "s"


def _tree(cls: type[EngineError]) -> list[type[EngineError]]:
    return [
        cls,
        *(deeper for sub in cls.__subclasses__() if sub.__module__ == errors.__name__ for deeper in _tree(sub)),
    ]


@pytest.mark.parametrize("cls", _tree(EngineError), ids=lambda cls: cls.__name__)
def test_every_error_is_rebuilt_from_its_code(cls):
    error = error_from_code(cls.code, "why", param="p", retry_after=2.0)
    assert type(error) is cls
    assert (error.message, error.param, error.retry_after) == ("why", "p", 2.0)
    assert status_of_code(cls.code) == cls.status
    assert 400 <= cls.status < 600


def test_codes_are_distinct():
    codes = [cls.code for cls in _tree(EngineError)]
    assert len(codes) == len(set(codes))


def test_an_unknown_code_is_a_plain_error():
    assert type(error_from_code("from_the_future", "x")) is EngineError
    assert status_of_code("from_the_future") == 500


def test_a_run_directory_is_private_and_new(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FAST_INFERENCE_HOME", str(tmp_path))
    first, second = make_run_dir(), make_run_dir()
    assert first != second
    for path in (first, first.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert first.parent.parent == tmp_path


def test_a_run_directory_too_deep_for_sockets_is_refused_with_what_to_do(tmp_path: Path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    monkeypatch.setenv("FAST_INFERENCE_HOME", str(deep))
    with pytest.raises(StartupError, match=r"the limit is 107.*FAST_INFERENCE_HOME"):
        make_run_dir()
    assert os.listdir(deep / "run") == []


def test_each_link_has_its_own_address(tmp_path: Path):
    endpoints = Endpoints(str(tmp_path))
    addresses = [getattr(endpoints, name) for name in ("control", "requests", "steps", "results")]
    for of in (endpoints.tokens_of, endpoints.text_of, endpoints.client_of):
        addresses += [of(index) for index in range(3)]
    assert len(set(addresses)) == 4 + 3 * 3
    assert all(address.startswith(f"ipc://{tmp_path}/") for address in addresses)
    assert endpoints.client == endpoints.client_of(0)
