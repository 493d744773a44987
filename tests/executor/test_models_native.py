"""The native decoder against transformers, family by family, on small random models."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_inference.executor.models.config import NotNative, decoder_config
from fast_inference.protocol.errors import StartupError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from .checkpoints import SMALL, load, make_checkpoint, prompt, reference_tokens
from .step_driver import Sequences

pytestmark = pytest.mark.usefixtures("one_thread")


def llama3(**more: Any) -> PreTrainedConfig:
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return LlamaConfig(**SMALL, rope_parameters=rope, **more)


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama_with_biases_and_wide_heads": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, head_dim=24),
    "llama_without_grouping": LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "llama3_rope": llama3(),
    "llama_linear_rope": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral_window": MistralConfig(**SMALL, sliding_window=24),
    "mistral_full": MistralConfig(**SMALL, sliding_window=None),
    "qwen2_tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2_window_from_layer_1": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "qwen3_yarn": Qwen3Config(**SMALL, head_dim=32, rope_parameters=YARN),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    reference = make_checkpoint(CASES[case], tmp_path)
    model = load(tmp_path)
    prompts = [prompt(90, 1), prompt(1, 2), prompt(33, 3)]
    sequences = Sequences(model)
    logits = sequences.step({0: prompts[0]}, logits_at=list(range(90)))
    with torch.no_grad():
        expected = reference(torch.tensor([prompts[0]])).logits[0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    tokens = Sequences(model).generate(prompts, new=12, chunk=16)
    assert tokens == [reference_tokens(reference, ids, 12) for ids in prompts]


def test_a_step_that_wants_no_logits_still_writes_keys_and_values(tmp_path: Path) -> None:
    make_checkpoint(CASES["qwen3"], tmp_path)
    model, ids = load(tmp_path), prompt(20, 1)
    whole, cut = Sequences(model), Sequences(model)
    expected = whole.step({0: ids})
    assert cut.step({0: ids[:12]}, logits_at=[]).shape == (0, 211)
    torch.testing.assert_close(cut.step({0: ids[12:]}), expected)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    make_checkpoint(CASES["llama3_rope"], tmp_path)
    ids = prompt(50, 1)
    exact = Sequences(load(tmp_path)).step({0: ids}, logits_at=list(range(50)))
    model = load(tmp_path, dtype="bfloat16")
    assert model.spec.dtype == torch.bfloat16
    rounded = Sequences(model).step({0: ids}, logits_at=list(range(50)))
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).std() / exact.std()) < 0.05


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    make_checkpoint(CASES["llama"], tmp_path / "one")
    make_checkpoint(CASES["llama"], tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (Sequences(load(tmp_path / name)).step({0: prompt(9, 1)}) for name in ("one", "many"))
    assert torch.equal(one, many)


def test_missing_unexpected_and_misshapen_tensors_are_one_error(tmp_path: Path) -> None:
    make_checkpoint(CASES["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.surprise"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    for part in (
        "lacks model.layers.0.mlp.up_proj.weight",
        "unexpected model.layers.0.surprise",
        "[3] instead of [64]",
    ):
        assert part in str(error.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(CASES["llama"], tmp_path, max_shard_size="100KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    victim.unlink()
    with pytest.raises(StartupError, match=victim.name):
        load(tmp_path)


def test_a_damaged_file_is_a_startup_error(tmp_path: Path) -> None:
    make_checkpoint(CASES["llama"], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(StartupError, match="can't be read"):
        load(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    make_checkpoint(CASES["llama"], tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(StartupError, match="convert it once with transformers"):
        load(tmp_path)


def test_dummy_weights_need_no_file_and_follow_the_seed(tmp_path: Path) -> None:
    CASES["qwen2_tied"].architectures = ["Qwen2ForCausalLM"]
    CASES["qwen2_tied"].save_pretrained(tmp_path)
    one, same, other = (
        Sequences(load(tmp_path, load_format="dummy", seed=seed)).step({0: prompt(9, 1)}) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0.001 < float(one.std()) < 10


def test_old_config_spellings_read_as_the_new_ones() -> None:
    new = json.loads(CASES["llama3_rope"].to_json_string(use_diff=False))
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old["rope_scaling"] = {key: value for key, value in new["rope_parameters"].items() if key != "rope_theta"}
    old["rope_theta"] = new["rope_parameters"]["rope_theta"]
    assert decoder_config(old, "LlamaForCausalLM") == decoder_config(new, "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_what_would_change_the_result_is_not_passed_over(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotNative, match=reason):
        decoder_config(SMALL | change, "LlamaForCausalLM")


def test_a_llama_that_the_native_decoder_lacks_goes_through_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = make_checkpoint(LlamaConfig(**SMALL, hidden_act="gelu"), tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path)
    assert "hidden_act" in caplog.text
    assert Sequences(model).generate([prompt(20, 1)], 5) == [reference_tokens(reference, prompt(20, 1), 5)]


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awq"}, **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="awq"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": []}'])
def test_a_bad_config_is_a_startup_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StartupError, match=r"config\.json"):
        load(tmp_path)


def test_the_native_path_imports_no_transformers(tmp_path: Path) -> None:
    make_checkpoint(CASES["llama"], tmp_path)
    code = f"""
import sys, torch
from fast_inference.executor.models import load_model
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.protocol.config import EngineConfig
load_model(EngineConfig(model={str(tmp_path)!r}), torch.device("cpu"), TorchBackend(), lambda *_: None)
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
