"""Flags and settings are the same thing, told twice by nobody."""

import dataclasses
import inspect

import pytest
import typer
from fast_inference.launch import flags
from fast_inference.launch.cli import app
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.sampling import SamplingParams
from typer.testing import CliRunner


def parse(*arguments: str) -> EngineConfig:
    """The settings that `serve` would start with."""
    seen = []
    probe = typer.Typer(rich_markup_mode=None)

    def command(**values: object) -> None:
        seen.append(flags.engine_config(values))

    probe.command()(flags.takes_engine_flags(command))
    result = CliRunner().invoke(probe, list(arguments))
    if result.exit_code:
        raise ValueError(result.output)
    return seen[0]


def test_every_setting_has_a_flag_with_a_help_text() -> None:
    comments = flags.field_comments(EngineConfig)
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    for field in dataclasses.fields(EngineConfig):
        assert comments.get(field.name), f"{field.name} has no comment"
        flag = "--model-class" if field.name == "model_classes" else f"--{field.name.replace('_', '-')}"
        assert flag in help_text


def test_no_flags_give_the_defaults() -> None:
    assert parse() == EngineConfig()


def test_each_kind_of_value_is_read() -> None:
    config = parse(
        *("--max-num-seqs", "3", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5"),
        *("--kv-cache-memory", "1.5GiB", "--model-class", "Mini=mini.py:Mini", "--model-config", '{"layers": 2}'),
        *("--fair-weights", "alice=2,team=b=0.5"),
        *("--num-gpu-blocks-override", "77", "--scheduling-policy", "priority", "--api-key", "secret"),
    )
    assert config == EngineConfig(
        max_num_seqs=3,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        kv_cache_memory=3 * 2**29,
        model_classes={"Mini": "mini.py:Mini"},
        model_config={"layers": 2},
        num_blocks=77,
        fair_weights={"alice": 2.0, "team=b": 0.5},
        scheduling_policy="priority",
        api_key="secret",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--block-size", "0"], "--block-size must be in [1, 4096], got 0"),
        (["--kv-cache-memory", "many"], "'many' is no size"),
        (["--model-class", "Mini"], "NAME=file.py:Class"),
        (["--fair-weights", "alice"], "'alice' must be CLIENT=WEIGHT"),
        (["--fair-weights", "a=1,a=2"], "'a' has two weights"),
        (["--fair-weights", "a=0"], "--fair-weights['a'] must be in"),
        (["--scheduling-policy", "best"], "--scheduling-policy must be one of fcfs, priority"),
        (["--model-config", "[1]"], "must be a JSON object"),
        (["--model-config", "{"], "not JSON"),
        (["-tp", "2"], "--tensor-parallel-size must be 1"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_value_that_can_not_be_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(*arguments)
    assert words in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("text", "size"), [("17", 17), ("1KiB", 1024), ("2 MB", 2_000_000), ("4GiB", 4 << 30), ("0.5gib", 1 << 29)]
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert flags.parse_size(text) == size


def test_sampling_flags_are_fields_of_the_sampling_parameters() -> None:
    assert set(flags.SAMPLING_FLAGS) <= {field.name for field in dataclasses.fields(SamplingParams)}
    given = {"temperature": 0.5, "stop": ["a", "b"], "seed": None}
    params = flags.sampling_params(given, max_tokens=9)
    assert (params.temperature, params.stop, params.seed, params.max_tokens) == (0.5, ("a", "b"), None, 9)


def test_the_commands_take_only_their_own_flags() -> None:
    commands = {command.callback.__name__: inspect.signature(command.callback) for command in app.registered_commands}
    assert "port" in commands["serve"].parameters
    assert "port" not in commands["generate"].parameters
    assert "temperature" in commands["chat"].parameters
