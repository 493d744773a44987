"""What each token id says: a tokenizer's decoder, taken apart once into tables.

Owns the reading of a tokenizer's decoder and the tables made of it. Must not know streams, messages or sockets.
`text_stream.py` decodes with them.

Nearly every language model's tokenizer decodes by putting the bytes of its tokens in a row, so that a token's bytes
never depend on its neighbours. Two such decoders are known here: byte-level BPE, and sentencepiece with byte
fallback. Every other one is asked as a whole (`decode`), for a window of tokens at a time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..protocol.errors import StartupError
from .tokenizer import hide_torch

log = logging.getLogger(__name__)

# Models pad their vocabulary beyond the tokenizer's (to a multiple of 128 and more); such ids say nothing.
PADDING = 4096

Decode = Callable[[Sequence[int], bool], str]


@dataclass(slots=True)
class Vocabulary:
    """The tables of one tokenizer.

    `pieces[id]` are a token's bytes, None for an id that says nothing; empty where only `decode` knows. A piece of
    an id in `byte_ids` is one byte of a sentencepiece run. `strip` leading `strip_text` characters of a whole text
    are dropped. `plain_skip` and `plain_keep` (special tokens dropped or kept) hold the text of an id wherever that
    can't depend on its neighbours, else None.
    """

    decode: Decode
    special_ids: frozenset[int]
    added: dict[int, str]
    pieces: list[bytes | None] = field(default_factory=list)
    byte_ids: frozenset[int] = frozenset()
    strip: int = 0
    strip_text: str = " "
    plain_skip: list[str | None] = field(default_factory=list)
    plain_keep: list[str | None] = field(default_factory=list)
    _texts: dict[int, str] = field(default_factory=dict)

    def plain(self, skip_special_tokens: bool) -> list[str | None]:
        return self.plain_skip if skip_special_tokens else self.plain_keep

    def text_of(self, token_id: int) -> str:
        """One token by itself, special ones too; broken bytes read as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            if self.pieces:
                piece = self.pieces[token_id] if 0 <= token_id < len(self.pieces) else None
                text = "" if piece is None else piece.decode(errors="replace")
            else:
                text = self.decode([token_id], False) if token_id >= 0 else ""
            self._texts[token_id] = text
        return text


def load_vocabulary(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Vocabulary:
    """The vocabulary of the tokenizer in the folder, or of the hub name, `source`. Raises `StartupError` if there is
    none that can be read."""
    if not source:
        raise StartupError("the model comes without a tokenizer: set --tokenizer or --skip-tokenizer-init")
    file = Path(source) / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself for a bad file
            raise StartupError(f"can't read {file}: {error}") from None
        _mark_special(tokenizer, file.with_name("tokenizer_config.json"))
        return from_tokenizer(tokenizer)
    log.info("%s is no folder with a tokenizer.json: transformers loads the tokenizer, which takes longer", source)
    hide_torch()
    from transformers import AutoTokenizer  # only here: it takes seconds to import

    try:
        loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StartupError(f"{source} has no tokenizer: set --tokenizer or --skip-tokenizer-init ({error})") from None
    if loaded.is_fast:
        return from_tokenizer(loaded.backend_tokenizer)
    log.warning("the tokenizer of %s is written in Python: tokens are decoded in windows, which is slower", source)

    def decode(ids: Sequence[int], skip: bool) -> str:
        return str(loaded.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    added = {i: str(token) for i, token in loaded.added_tokens_decoder.items()}
    return Vocabulary(decode=decode, special_ids=frozenset(loaded.all_special_ids), added=added)


def _mark_special(tokenizer: Tokenizer, config_file: Path) -> None:
    """Tokens that only `tokenizer_config.json` calls special are special too, as transformers has it."""
    if not config_file.is_file():
        return
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"can't read {config_file}: {error}") from None
    named = [value for name, value in config.items() if name.endswith("_token")]
    extra = config.get("extra_special_tokens") or ()
    listed = [*(config.get("additional_special_tokens") or ()), *(extra.values() if isinstance(extra, dict) else extra)]
    added = [token for token in config.get("added_tokens_decoder", {}).values() if token.get("special")]
    contents = [token.get("content") if isinstance(token, dict) else token for token in (*named, *listed, *added)]
    known = [c for c in contents if isinstance(c, str) and c and tokenizer.token_to_id(c) is not None]
    tokenizer.add_special_tokens(list(dict.fromkeys(known)))


def from_tokenizer(tokenizer: Tokenizer) -> Vocabulary:
    """Take a tokenizer apart; one whose decoder is not known here gets a vocabulary that only has `decode`."""
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)

    def decode(ids: Sequence[int], skip: bool) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=skip)
        return text

    steps = _steps(json.loads(tokenizer.to_str())["decoder"])
    tokens: dict[int, str] = {i: t for t, i in tokenizer.get_vocab(with_added_tokens=True).items()} | added
    if [step["type"] for step in steps] == ["ByteLevel"]:
        vocabulary = Vocabulary(decode=decode, special_ids=special, added=added)
        vocabulary.pieces = _table(tokens, _byte_level_piece)
    elif (plan := _byte_fallback_plan(steps)) is not None:
        vocabulary = Vocabulary(decode=decode, special_ids=special, added=added)
        _read_byte_fallback(vocabulary, tokens, plan)
    else:
        kinds = ", ".join(step["type"] for step in steps) or "none"
        log.warning("this tokenizer's decoder (%s) has no table form: tokens are decoded in windows", kinds)
        return Vocabulary(decode=decode, special_ids=special, added=added)
    _fill_plain(vocabulary)
    return vocabulary


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _table(tokens: dict[int, str], piece: Callable[[str], bytes]) -> list[bytes | None]:
    table: list[bytes | None] = [None] * (max(tokens, default=-1) + 1)
    for token_id, token in tokens.items():
        table[token_id] = piece(token)
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where it is one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


@dataclass(slots=True)
class _ByteFallbackPlan:
    replace: list[tuple[str, str]]
    bytes: bool
    strip: int
    strip_text: str


def _byte_fallback_plan(steps: list[dict[str, Any]]) -> _ByteFallbackPlan | None:
    """Replace..., then ByteFallback and Fuse, then at most one Strip at the start; None for anything else."""
    plan = _ByteFallbackPlan([], False, 0, " ")
    kinds = [step["type"] for step in steps]
    rest = list(steps)
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        step = rest.pop(0)
        plan.replace.append((step["pattern"]["String"], step["content"]))
    if rest and rest[0]["type"] == "ByteFallback":
        rest.pop(0)
        plan.bytes = True
    if rest and rest[0]["type"] == "Fuse":
        rest.pop(0)
    if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0 and "Fuse" in kinds:
        step = rest.pop(0)
        plan.strip, plan.strip_text = step["start"], step["content"]
    return plan if steps and not rest else None


def _read_byte_fallback(vocabulary: Vocabulary, tokens: dict[int, str], plan: _ByteFallbackPlan) -> None:
    replaced = {}
    for token_id, token in tokens.items():
        for old, new in plan.replace:
            token = token.replace(old, new)
        replaced[token_id] = token
    single = {i: value for i, t in replaced.items() if plan.bytes and (value := _byte_token(t)) is not None}
    vocabulary.pieces = _table(replaced, str.encode)
    for token_id, value in single.items():
        vocabulary.pieces[token_id] = bytes([value])
    vocabulary.byte_ids = frozenset(single)
    vocabulary.strip, vocabulary.strip_text = plan.strip, plan.strip_text


def _byte_token(token: str) -> int | None:
    """The byte that `<0xNN>` stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _fill_plain(vocabulary: Vocabulary) -> None:
    keep: list[str | None] = []
    for token_id, piece in enumerate(vocabulary.pieces):
        if piece is None:
            keep.append("")
        elif token_id in vocabulary.byte_ids:
            keep.append(None)
        else:
            try:
                keep.append(piece.decode())
            except UnicodeDecodeError:
                keep.append(None)
    keep += [""] * PADDING
    skip = list(keep)
    for token_id in vocabulary.special_ids:
        skip[token_id] = ""
    vocabulary.plain_keep, vocabulary.plain_skip = keep, skip
