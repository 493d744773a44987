"""The GPU benchmark as far as it goes without a GPU: the work, the floors, the statistics, the table; and its figures
from a small engine on the CPU."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_inference import LLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 10_001,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_cells_are_those_that_vllm_was_measured_on() -> None:
    from gpu_cells import offline_cells, online_requests

    sizes = {name: (len(c.requests), c.prompt_tokens, c.output_tokens) for name, c in offline_cells().items()}
    assert sizes["offline"] == (256, 142_827, 133_966)
    assert sizes["single"] == (1, 128, 256)
    assert sizes["batch32"] == (32, 32 * 512, 32 * 256)
    assert sizes["prefill"] == (16, 16 * 4096, 16)
    assert sizes["prefill1"] == (1, 4096, 1)
    assert sizes["sampled"] == sizes["greedy128"]
    assert offline_cells()["offline"].requests[0].prompt_token_ids[:3] == [6311, 6890, 663]
    arrivals = [request.arrival for request in online_requests(8, 30.0)]
    assert arrivals == sorted(arrivals) and arrivals[0] > 0 and arrivals[-1] <= 30 and 200 < len(arrivals) < 280


@pytest.mark.parametrize(
    ("card", "model", "step", "batch32", "prefill", "offline"),
    [
        ("H200", "llama-8b", 3.48, 1.35, 1.29, 9.9),
        ("H200", "qwen3-0.6b", 0.28, 0.23, 0.12, 3.7),
        ("H100", "llama-8b", 5.26, 1.88, 1.29, 13.6),
        ("H100", "qwen3-0.6b", 0.42, 0.34, 0.12, 5.5),
    ],
)
def test_the_floors_are_those_of_the_published_table(
    card: str, model: str, step: float, batch32: float, prefill: float, offline: float
) -> None:
    from gpu_cells import MODELS, offline_cells
    from gpu_floors import CARDS, cell_seconds, decode_seconds, shape_of

    shape, cells = shape_of(MODELS[model]), offline_cells()
    assert decode_seconds(shape, CARDS[card], []) * 1e3 == pytest.approx(step, abs=0.01)
    found = [cell_seconds(shape, CARDS[card], cells[name].requests) for name in ("batch32", "prefill", "offline")]
    assert found == [
        pytest.approx(batch32, abs=0.01),
        pytest.approx(prefill, abs=0.01),
        pytest.approx(offline, abs=0.06),
    ]


def test_every_figure_has_a_floor_or_none_to_have_and_vllms_beside_it_on_each_card() -> None:
    from gpu import floors
    from gpu_floors import CARDS, FIGURES, VLLM, card_of, target

    for card in CARDS:
        for model, peer in VLLM[card].items():
            assert peer.keys() == FIGURES.keys()
            assert floors(model, card).keys() == FIGURES.keys() - {"startup"}
    assert floors("llama-8b", None) == {}
    assert card_of("NVIDIA H200") == "H200" and card_of("NVIDIA H100 80GB HBM3") == "H100" and card_of("L4") is None
    assert (target("llama-8b", "single"), target("qwen3-0.6b", "single")) == (0.92, 0.6)


def test_a_row_says_whether_the_target_is_reached_in_the_right_direction() -> None:
    from gpu import draw, rows
    from report import console

    run: dict[str, Any] = {
        "model": "llama-8b",
        "cells": {
            "startup": {"figures": {"startup": 31.0}},
            "offline": {"figures": {"offline": 9972 * 1.05}},
            "single": {"figures": {"single": 4.85 * 0.93, "single ttft": 11.4 * 0.5}},
            "prefill1": {"figures": {"prefill1": 90.0}},
        },
    }
    run["rows"] = rows(run, "H200")
    assert {row["figure"]: row["reached"] for row in run["rows"]} == {
        "startup": False,
        "offline": True,
        "single": False,
        "single ttft": True,
        "prefill1": None,
    }
    with console.capture() as shown:
        console.print(draw(run, "a card"))
    assert ">= 1.05x" in shown.get() and "<= 0.92x" in shown.get() and "<= 30 s" in shown.get()
    assert [row["vllm"] for row in rows(run, None)] == [None] * 5


def test_tokens_that_come_together_share_the_time_since_the_last_and_quantiles_are_the_nearest() -> None:
    from gpu_runs import Stream, quantiles, summary

    stream = Stream()
    stream.arrived(1, 10.5, due=10.0)
    stream.arrived(2, 10.9, due=10.0)
    stream.arrived(1, 11.0, due=10.0)
    assert stream.first == 0.5 and stream.gaps == pytest.approx([0.2, 0.2, 0.1])
    found = summary([stream], 2.0)
    assert found["output_tokens_per_second"] == 2.0 and found["ttft_ms"]["p99"] == pytest.approx(500)
    assert quantiles(range(101)) == {"mean": 50.0, "p50": 50, "p99": 99}


def test_cells_run_through_a_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_cells
    from gpu_cells import Cell, alike, shape_folder
    from gpu_runs import run_offline, run_online, seconds_of
    from workloads import Request

    monkeypatch.setitem(gpu_cells.MODELS, "tiny", TINY)
    with (
        shape_folder("tiny") as folder,
        LLM(folder, load_format="dummy", skip_tokenizer_init=True, device="cpu", threads=1, num_blocks=64) as llm,
    ):
        assert seconds_of(llm, Cell("any", alike(3, 5, 4))) > 0
        assert set(run_offline(llm, Cell("single", alike(1, 9, 5)), 1)["figures"]) == {"single", "single ttft"}
        drawn = Cell("sampled", alike(2, 9, 5), {"temperature": 0.8, "top_p": 0.95, "top_k": 50})
        assert run_offline(llm, drawn, 2)["figures"]["sampled"] > 0
        requests = [Request([5, 6, 7], 4, arrival) for arrival in (0.0, 0.01, 0.02)]
        found = asyncio.run(run_online(llm.endpoint, requests))
    assert found["requests"] == 3 and found["itl_ms"]["p99"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "no CUDA device" in done.stdout


def test_a_cell_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu import parse_args

    assert parse_args(["--model", "qwen3-0.6b", "--cells", "single,online"]).models == ["qwen3-0.6b"]
    with pytest.raises(SystemExit):
        parse_args(["--cells", "double"])
    assert "there is no cell 'double'" in capsys.readouterr().err
