"""The tokenizer's room: encoding, the chat template, end tokens, defaults, and no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fast_inference.frontend.tokenizer import eos_token_ids, load_tokenizer, sampling_defaults
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import InvalidRequest, StartupError

from .made_models import make_model_folder


def test_text_survives_encoding_and_decoding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(EngineConfig(model=make_model_folder(tmp_path)))
    assert tokenizer is not None
    text = "hello wörld 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.close()


def test_the_chat_template_takes_options_and_refuses_reserved_ones(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(EngineConfig(model=make_model_folder(tmp_path)))
    assert tokenizer is not None
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<|im|>user: hi\n<|im|>assistant: "
    assert "SHOUT" in tokenizer.apply_chat_template(messages, kwargs={"shout": True})
    for name in ("chat_template", "tokenize", "conversation", "return_tensors"):
        with pytest.raises(InvalidRequest, match=name):
            tokenizer.apply_chat_template(messages, kwargs={name: "{{ 1 }}"})
    with pytest.raises(InvalidRequest, match="this role is not allowed"):
        tokenizer.apply_chat_template([{"role": "forbidden", "content": ""}])
    tokenizer.close()


def test_a_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", template=None)
    bare = load_tokenizer(EngineConfig(model=folder))
    assert bare is not None
    with pytest.raises(InvalidRequest, match="--chat-template"):
        bare.apply_chat_template([{"role": "user", "content": "hi"}])
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    given = load_tokenizer(EngineConfig(model=folder, chat_template=str(tmp_path / "t.jinja")))
    assert given is not None
    assert given.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"
    with pytest.raises(StartupError, match="can't be read"):
        load_tokenizer(EngineConfig(model=folder, chat_template="nowhere.jinja"))
    bare.close()
    given.close()


def test_a_folder_without_a_tokenizer_is_a_startup_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="skip-tokenizer-init"):
        load_tokenizer(EngineConfig(model=str(tmp_path)))
    assert load_tokenizer(EngineConfig(model=str(tmp_path), skip_tokenizer_init=True)) is None


def test_end_tokens_and_defaults_come_from_the_models_files(tmp_path: Path) -> None:
    folder = make_model_folder(
        tmp_path, generation={"eos_token_id": [5, 2], "temperature": 0.6, "top_k": 20, "do_sample": True}
    )
    tokenizer = load_tokenizer(EngineConfig(model=folder))
    assert eos_token_ids(folder, tokenizer) == (5, 2, 1)
    assert sampling_defaults(folder) == {"temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 4}')
    assert eos_token_ids(folder, None) == (4,)
    assert sampling_defaults(folder) == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StartupError, match=r"config\.json"):
        eos_token_ids(folder, None)


PROVE_NO_TORCH = """
import sys
import fast_inference.frontend.server
from fast_inference.frontend.tokenizer import hide_torch, load_tokenizer
from fast_inference.protocol.config import EngineConfig
hide_torch()
tokenizer = load_tokenizer(EngineConfig(model=sys.argv[1]))
assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
import fast_inference.frontend.http_app
assert sys.modules["torch"] is None
assert not [name for name in sys.modules if name.startswith("torch.")]
tokenizer.close()
"""

PROVE_A_LIGHT_CLIENT = """
import sys
import fast_inference.frontend.client
heavy = {"torch", "transformers", "fastapi", "tokenizers", "uvicorn"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("program", [PROVE_NO_TORCH, PROVE_A_LIGHT_CLIENT], ids=["server", "client"])
def test_the_process_imports_no_more_than_it_needs(tmp_path: Path, program: str) -> None:
    folder = make_model_folder(tmp_path)
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
