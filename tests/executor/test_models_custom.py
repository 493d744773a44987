"""Custom modules: with paged attention, without, registered by name or live."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_inference.executor import registry
from fast_inference.executor.attention import paged_attention
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.models import load_model
from fast_inference.executor.models.base import Model
from fast_inference.executor.registry import class_spec, find_class, register_model, registered_models
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import InvalidRequest, StartupError
from safetensors.torch import save_file
from torch import nn

from .minimal_llm import Leaky, MinimalLLM, Plain, TwoStage
from .step_driver import Sequences

pytestmark = pytest.mark.usefixtures("one_thread")
FILE = str(Path(__file__).with_name("minimal_llm.py"))


def load(live: nn.Module | None = None, **options: Any) -> Model:
    config = EngineConfig(model="live" if live is not None else "class:Mini", **options)
    return load_model(config, torch.device("cpu"), TorchBackend(), lambda *_: None, live)


def dense_tokens(module: nn.Module, ids: list[int], new: int) -> list[int]:
    """Greedy tokens by running the module outside the engine on everything, each time."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < start + new:
            ids.append(int(module(torch.tensor([ids]), torch.arange(len(ids)))[0, -1].argmax()))
    return ids[start:]


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_live_custom_module_gives_the_tokens_that_it_gives_outside_the_engine() -> None:
    torch.manual_seed(0)
    module = MinimalLLM()
    prompts = [ids_of(33, 1), ids_of(1, 2), ids_of(20, 3)]
    tokens = Sequences(load(module)).generate(prompts, new=10, chunk=16)
    assert tokens == [dense_tokens(module, ids, 10) for ids in prompts]


def test_a_registered_class_is_built_from_its_file_with_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = MinimalLLM(num_layers=3)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    for weights in ("w.safetensors", "w.pt"):
        model = load(
            model_classes={"Mini": f"{FILE}:MinimalLLM"},
            model_config={"num_layers": 3, "weights": str(tmp_path / weights)},
        )
        assert (model.spec.architecture, model.spec.num_layers, model.spec.max_model_len) == ("Mini", 3, 64)
        assert Sequences(model).generate([ids_of(9, 1)], 5) == [dense_tokens(trained, ids_of(9, 1), 5)]


def test_random_weights_of_a_registered_class_follow_the_seed() -> None:
    def logits(seed: int) -> torch.Tensor:
        model = load(model_classes={"Mini": f"{FILE}:MinimalLLM"}, seed=seed)
        return Sequences(model).step({0: [1, 2, 3]})

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


def test_compute_logits_sees_only_the_rows_that_are_wanted() -> None:
    module = TwoStage()
    seen = []
    head = module.compute_logits
    module.compute_logits = lambda hidden: seen.append(len(hidden)) or head(hidden)  # type: ignore[method-assign]
    model = load(module)
    seen.clear()
    assert Sequences(model).step({0: [1, 2, 3], 1: [4, 5]}).shape == (2, 50)
    assert seen == [2]


def test_a_module_that_mixes_requests_is_refused() -> None:
    with pytest.raises(StartupError, match="neighbours"):
        load(Leaky())


def test_a_wrong_layer_number_is_named() -> None:
    module = MinimalLLM(num_layers=2)
    module.num_layers = 1
    with pytest.raises(StartupError, match=r"layer must be in \[0, 0\]"):
        load(module)


@pytest.mark.parametrize(("attribute", "value"), [("vocab_size", 49), ("vocab_size", 0), ("head_dim", "8")])
def test_attributes_that_do_not_fit_are_refused(attribute: str, value: object) -> None:
    module = MinimalLLM()
    setattr(module, attribute, value)
    with pytest.raises(StartupError, match=attribute):
        load(module)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "register_model first"),
        ({"model_classes": {"Mini": "nonsense"}}, "module:Class"),
        ({"model_classes": {"Mini": "no.such.module:Mini"}}, "PYTHONPATH"),
        ({"model_classes": {"Mini": "/no/such/file.py:Mini"}}, "no file"),
        ({"model_classes": {"Mini": f"{FILE}:Absent"}}, "no class Absent"),
        ({"model_classes": {"Mini": f"{FILE}:MinimalLLM"}, "model_config": {"depth": 3}}, "depth"),
        ({"model_classes": {"Mini": f"{FILE}:MinimalLLM"}, "model_config": {"weights": "/no/file"}}, "no file"),
        ({"model_classes": {"Mini": "collections:OrderedDict"}}, "torch.nn.Module"),
    ],
)
def test_a_class_that_cannot_be_built_is_refused_with_the_way_out(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        load(**options)


# ---- recompute ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "dict"])
def test_a_module_from_ids_to_logits_is_served_by_recomputing(wrap: str, caplog: pytest.LogCaptureFixture) -> None:
    module = Plain(wrap)
    with caplog.at_level(logging.WARNING):
        model = load(module)
    assert "slow" in caplog.text
    assert (model.spec.recompute, model.spec.vocab_size, model.spec.max_model_len) == (True, 50, 48)
    prompts = [ids_of(12, 1), ids_of(1, 2), ids_of(5, 3)]
    reference = Plain()
    assert Sequences(model).generate(prompts, new=6, chunk=100) == [
        dense_tokens(lambda ids, _: reference(ids), p, 6) for p in prompts  # type: ignore[arg-type]
    ]  # fmt: skip


def test_logits_of_the_last_position_only_are_refused() -> None:
    with pytest.raises(StartupError, match="one row per token"):
        load(Plain(last_only=True))


def test_a_module_that_takes_no_token_ids_is_refused() -> None:
    with pytest.raises(StartupError, match="forward"):
        load(nn.Linear(3, 3))


# ---- paged_attention outside the engine --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"soft_cap": 2.0}, {"scale": 0.5, "window": 2}])
def test_paged_attention_outside_the_engine_is_plain_causal_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    out = paged_attention(q, k, v, 0, **options)
    k, v = k.repeat_interleave(2, -2), v.repeat_interleave(2, -2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * options.get("scale", 8**-0.5)
    if cap := options.get("soft_cap"):
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    hidden = (distance < 0) | (distance >= options.get("window", 7))
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(paged_attention(q[0], k[0], v[0], 0, **options), expected[0])


def test_paged_attention_names_shapes_that_do_not_fit() -> None:
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 3, 8)
    with pytest.raises(ValueError, match="multiple"):
        paged_attention(q, k, k, 0)
    with pytest.raises(ValueError, match=r"\[T, Hq, D\]"):
        paged_attention(q[0], k, k, 0)


# ---- the registry ------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.usefixtures("empty_registry")
def test_a_registered_class_is_found_again_by_its_text() -> None:
    cls = find_class("Mini", f"{FILE}:MinimalLLM")
    register_model("Mini", cls)
    assert registered_models() == {"Mini": f"{FILE}:MinimalLLM"}
    assert class_spec(nn.Linear) == "torch.nn.modules.linear:Linear"
    assert find_class("Linear", class_spec(nn.Linear)) is nn.Linear


def test_a_class_inside_a_function_is_refused() -> None:
    class Hidden(nn.Module):
        pass

    with pytest.raises(InvalidRequest, match="top level of a file"):
        register_model("Hidden", Hidden)


@pytest.mark.usefixtures("empty_registry")
def test_what_is_no_class_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not an instance"):
        register_model("Mini", nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="name"):
        register_model("", nn.Linear)


def test_a_class_of_the_main_script_is_loaded_from_its_file_without_running_main(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "from beside import VALUE\n"
        "from fast_inference.executor.registry import register_model, registered_models, find_class\n"
        "class Mini:\n    value = VALUE\n"
        "register_model('Mini', Mini)\n"
        "if __name__ == '__main__':\n"
        "    import sys\n"
        "    print(registered_models()['Mini'])\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = find_class("Mini", done.stdout.strip())
    assert found.value == 7  # type: ignore[attr-defined]


def test_a_class_typed_at_a_prompt_is_refused() -> None:
    code = (
        "from fast_inference.executor.registry import register_model\n"
        "class Mini: pass\n"
        "try: register_model('Mini', Mini)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=60)
    assert "put it in a file" in done.stdout
