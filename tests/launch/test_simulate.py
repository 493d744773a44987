"""`fast-inference simulate`: tables, files, and what a wrong flag is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fast_inference.launch.cli import app
from fast_inference.protocol.errors import InvalidRequest
from typer.testing import CliRunner

ROWS = "".join(f"{0.2 * number:.1f},{50 + 7 * number % 90},{5 + number % 30}\n" for number in range(40))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + ROWS)
    return str(file)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_one_run_prints_every_figure_and_names_its_calibration(trace: str) -> None:
    printed = run("--trace", trace, "--policy", "memory-aware", "--speed-up", "4", "--num-blocks", "200")
    assert "40 requests, simulated on h200-llama-8b" in printed
    for figure in ("output_throughput", "p99_ttft_ms", "mean_itl_ms", "p90_e2el_ms", "preemptions", "kv_utilization"):
        assert figure in printed


def test_a_comparison_prints_a_row_for_each_run_and_writes_its_files(trace: str, tmp_path: Path) -> None:
    plot, figures = tmp_path / "ttft.svg", tmp_path / "figures.json"
    printed = run(
        *("--trace", trace, "--compare", "fcfs,memory-aware", "--speed-up", "1,10", "--clients", "2"),
        *("--deadline-ms", "100-500", "--replicas", "2", "--plot", str(plot), "--json", str(figures)),
    )
    assert printed.count("fcfs") == 2 and printed.count("memory-aware") == 2
    assert "2 replicas (least-loaded)" in printed
    assert "deadlines met" in printed and "service gap" in printed
    report = json.loads(figures.read_text())
    assert len(report["runs"]) == 4 and report["calibration"]["name"] == "h200-llama-8b"
    assert "p99 TTFT" in plot.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policy", "newest"), "scheduling_policy"),
        (("--calibrate", "a100"), "calibrate must be h200-llama-8b, a JSON file or a journal; got 'a100'"),
        (("--plot", "a.pdf"), "plot must end in .svg or .png, got 'a.pdf'"),
        (("--replicas", "0"), r"replicas must be in \[1, 4096\], got 0"),
        (("--max-tokens", "3"), "max_tokens must be at least the longest answer, 34 tokens, got 3"),
        (("--num-prompts", "0"), "requests must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(trace: str, flags: tuple[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        run("--trace", trace, *flags)


@pytest.mark.parametrize(
    ("flag", "value"), [("--speed-up", "fast"), ("--deadline-ms", "1-x"), ("--block-size", "0"), ("--json", "no/where")]
)
def test_a_flag_that_can_not_be_read_is_a_usage_error(trace: str, flag: str, value: str) -> None:
    result = CliRunner().invoke(app, ["simulate", "--trace", trace, flag, value])
    assert result.exit_code == 2
    assert flag in result.output and value in result.output
