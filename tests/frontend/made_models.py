"""A model folder with nothing but a text side, made on the fly."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'forbidden' %}{{ raise_exception('this role is not allowed') }}{% endif %}"
    "<|im|>{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if shout %}SHOUT {% endif %}{% if add_generation_prompt %}<|im|>assistant: {% endif %}"
)


def make_model_folder(
    folder: Path, *, template: str | None = TEMPLATE, generation: dict[str, object] | None = None
) -> str:
    """A byte-level BPE tokenizer of some 270 tokens: <s> 0, </s> 1, <|im|> 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|im|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world hello world"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 128,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)
