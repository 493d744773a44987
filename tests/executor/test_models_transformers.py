"""Models without a native file, through transformers' attention interface, against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.models import load_model
from fast_inference.executor.models.base import Model
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import StartupError

from .checkpoints import SMALL, load, make_checkpoint, prompt, reference_tokens
from .step_driver import Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

NO_GROUPS = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
GPT = {"vocab_size": 211, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 211, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 256, "word_embed_proj_dim": 64, "init_std": 0.2}
GEMMA = {**SMALL, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "pad_token_id": 0}
LATENT = {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4}
LATENT |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2_learned_positions": ("GPT2Config", GPT),
    "gemma2_soft_cap_and_alternating_window": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 5.0}),
    "gemma3_rope_by_layer_type": ("Gemma3TextConfig", GEMMA),
    "phi_partial_rotary": ("PhiConfig", SMALL),
    "phi3_window": ("Phi3Config", {**SMALL, "sliding_window": 24, "pad_token_id": 0}),
    "opt_offset_positions": ("OPTConfig", OPT),
    "gpt_neox": ("GPTNeoXConfig", NO_GROUPS),
    "mixtral_experts": ("MixtralConfig", {**SMALL, "num_local_experts": 4}),
    "deepseek_v3_latent_attention": ("DeepseekV3Config", LATENT),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom_alibi": ("BloomConfig", {"vocab_size": 211, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "interface"),
    "mamba": ("MambaConfig", {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2}, "recurrent state"),
    "gpt_oss_sinks": ("GptOssConfig", {**SMALL, "head_dim": 16, "num_local_experts": 4}, "s_aux"),
    "dynamic_rope": (
        "LlamaConfig",
        {**SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic",
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    name, fields = SERVED[case]
    reference = make_checkpoint(getattr(transformers, name)(**fields), tmp_path)
    model = load(tmp_path)
    prompts = [prompt(60, 1), prompt(1, 2), prompt(33, 3)]
    tokens = Sequences(model).generate(prompts, new=8, chunk=16)
    assert tokens == [reference_tokens(reference, ids, 8) for ids in prompts]


@pytest.mark.parametrize("case", REFUSED)
def test_what_pages_cannot_run_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    name, fields, reason = REFUSED[case]
    make_checkpoint(getattr(transformers, name)(**fields), tmp_path)
    with pytest.raises(StartupError, match=reason):
        load(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}')
    with pytest.raises(StartupError, match="causal language model"):
        load(tmp_path, load_format="dummy")


def live(module: torch.nn.Module, **options: Any) -> Model:
    return load_model(
        EngineConfig(model="live", **options), torch.device("cpu"), TorchBackend(), lambda *_: None, module
    )


def make_gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**GPT)).eval()


def test_a_live_transformers_model_is_served_without_a_copy_and_stays_usable() -> None:
    module = make_gpt2()
    ids = prompt(40, 4)
    padded = {"input_ids": torch.tensor([[7, 7, *ids[2:]]]), "attention_mask": torch.tensor([[0, 0] + [1] * 38])}
    before = module(**padded).logits[0, 2:]
    weight = module.transformer.wte.weight
    model = live(module)
    logits = Sequences(model).step({0: ids}, logits_at=list(range(40)))
    assert module.transformer.wte.weight is weight
    torch.testing.assert_close(module(**padded).logits[0, 2:], before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(torch.tensor([ids])).logits[0], logits, rtol=1e-4, atol=1e-4)


def test_a_live_model_whose_forward_looks_elsewhere_than_positions_is_refused() -> None:
    class Shifted(transformers.GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, position_ids: Any = None, **options: Any) -> Any:
            places = torch.arange(input_ids.shape[1])[None]
            return super().forward(input_ids=input_ids, position_ids=places, **options)

    with pytest.raises(StartupError, match="differ from its own"):
        live(Shifted(transformers.GPT2Config(**GPT)))


def test_a_live_model_of_another_dtype_is_refused() -> None:
    with pytest.raises(StartupError, match="cast the model yourself"):
        live(make_gpt2(), dtype="bfloat16")
