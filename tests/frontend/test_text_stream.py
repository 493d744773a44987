"""Text of one stream: equal to decoding at once, whole characters only, stop strings as a naive search finds them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from fast_inference.frontend.text_stream import BROKEN, StopStrings, TextStream, WindowDecoder, make_decoder
from fast_inference.frontend.vocabulary import from_tokenizer, load_vocabulary
from fast_inference.protocol.errors import StartupError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from . import made_tokenizers as made

TOKENIZERS = {
    "byte_level": made.byte_level,
    "byte_fallback": made.byte_fallback,
    "word_piece": made.word_piece,
    "metaspace": made.metaspace,
    "default_model": made.default_model,
}
vocabulary_of = functools.lru_cache(maxsize=None)(lambda tokenizer: from_tokenizer(tokenizer))
SLOW_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXTS = st.one_of(st.text(), st.sampled_from(made.CORPUS), st.text("日é😀👩‍👧 ab\n▁."))


def deltas(
    tokenizer: Tokenizer, ids: list[int], context: list[int], *, skip: bool = True, spaces: bool = True
) -> list[str]:
    """What a stream says after each token, and at its end."""
    vocabulary = vocabulary_of(tokenizer)
    stream = TextStream(make_decoder(vocabulary, skip, spaces, context))
    plain = vocabulary.plain(skip)
    said = []
    for token_id in ids:
        unfinished = stream.unfinished
        said.append(stream.push(token_id))
        if not unfinished and plain[token_id] is not None:  # what the fast path would have said
            assert said[-1] == plain[token_id]
            assert not stream.unfinished
    return [*said, stream.finish()]


def random_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=24)


@pytest.mark.parametrize("name", ["byte_level", "default_model"])
@given(data=st.data(), skip=st.booleans())
@settings(SLOW_MACHINE)
def test_byte_level_deltas_of_any_tokens_are_the_text_decoded_at_once(name, data, skip):
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(random_ids(tokenizer))
    assert "".join(deltas(tokenizer, ids, [], skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(data=st.data(), skip=st.booleans())
@settings(SLOW_MACHINE)
def test_deltas_of_a_text_after_its_context_are_the_rest_of_the_text(name, data, skip):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(data.draw(TEXTS), add_special_tokens=False).ids
    cut = data.draw(st.integers(0, len(ids)))
    before = tokenizer.decode(ids[:cut], skip_special_tokens=skip)
    if before.endswith(BROKEN):  # the context ends inside a character, or says U+FFFD itself
        return
    said = "".join(deltas(tokenizer, ids[cut:], ids[:cut], skip=skip))
    assert before + said == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.data(), skip=st.booleans())
@settings(SLOW_MACHINE)
def test_byte_fallback_deltas_of_any_tokens_are_the_text_decoded_at_once_but_for_runs_that_break(data, skip):
    tokenizer = made.byte_fallback()
    ids = data.draw(random_ids(tokenizer))
    said = "".join(deltas(tokenizer, ids, [], skip=skip))
    assert said == _with_runs_kept(tokenizer, ids, skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert said == whole or BROKEN in whole


def _with_runs_kept(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """Decoding at once, but characters before the break in a run of byte tokens stand."""
    special = {tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")}
    out, run = "", b""
    for token_id in [*ids, None]:
        token = "" if token_id is None else tokenizer.id_to_token(token_id)
        if token is None or (skip and token_id in special):
            continue
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        while run:
            try:
                out, run = out + run.decode(), b""
            except UnicodeDecodeError as error:
                out, run = out + run[: error.start].decode() + BROKEN * (len(run) - error.start), b""
        out += token.replace("▁", " ")
    return out[1:] if out.startswith(" ") else out


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "default_model"])
def test_an_emoji_over_several_tokens_comes_as_one_character(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode("a😀b", add_special_tokens=False).ids
    said = deltas(tokenizer, ids, [])
    assert [text for text in said if text][-2:] == ["😀", "b"]
    assert not any(BROKEN in text for text in said)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "default_model"])
def test_a_text_that_really_ends_broken_says_so_at_its_end(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode("a😀", add_special_tokens=False).ids[:-1]
    said = deltas(tokenizer, ids, [])
    assert not any(BROKEN in text for text in said[:-1])
    assert said[-1].strip(BROKEN) == "" and said[-1]


def test_a_context_that_ends_inside_a_character_is_completed():
    tokenizer = made.byte_level()
    ids = tokenizer.encode("🦀", add_special_tokens=False).ids
    assert len(ids) > 1
    assert "".join(deltas(tokenizer, ids[-1:], ids[:-1])) == "🦀"


def test_a_leading_space_stays_after_a_context_and_goes_without_one():
    tokenizer = made.byte_fallback()
    the, quick = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁quick")
    assert "".join(deltas(tokenizer, [quick], [the])) == " quick"
    assert "".join(deltas(tokenizer, [the, quick], [])) == "the quick"
    assert "".join(deltas(tokenizer, [the, quick], [tokenizer.token_to_id("<s>")])) == "the quick"


def test_special_tokens_are_skipped_or_kept_as_asked():
    tokenizer = made.byte_level()
    ids = [*tokenizer.encode("hi", add_special_tokens=False).ids, tokenizer.token_to_id("<|end|>")]
    assert "".join(deltas(tokenizer, ids, [], skip=True)) == "hi"
    assert "".join(deltas(tokenizer, ids, [], skip=False)) == "hi<|end|>"


def test_added_tokens_have_no_space_between_them_when_asked_so():
    tokenizer = made.word_piece()
    sep, cat = tokenizer.token_to_id("[SEP]"), tokenizer.token_to_id("cat")
    assert "".join(deltas(tokenizer, [sep, sep, cat, sep], [cat], skip=False)) == " [SEP] [SEP] cat [SEP]"
    assert "".join(deltas(tokenizer, [sep, sep, cat, sep], [cat], skip=False, spaces=False)) == " [SEP][SEP] cat [SEP]"


def test_a_window_that_stays_broken_is_said_after_some_tokens():
    tokenizer = made.byte_level()
    lone = tokenizer.encode("🦀", add_special_tokens=False).ids[0]
    decoder = WindowDecoder(vocabulary_of(tokenizer), True)
    said = "".join(decoder.push(lone) for _ in range(40))
    assert len(said) > 20 and set(said) == {BROKEN}


def test_a_token_by_itself_reads_the_same_whatever_came_before():
    tokenizer = made.byte_fallback()
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.text_of(tokenizer.token_to_id("▁Hello")) == " Hello"
    assert vocabulary.text_of(tokenizer.token_to_id("<s>")) == "<s>"
    assert vocabulary.text_of(tokenizer.token_to_id("<0xF0>")) == BROKEN
    assert vocabulary.text_of(10**6) == ""
    assert vocabulary_of(made.word_piece()).text_of(3) == "cat"


def test_a_folder_without_a_tokenizer_is_refused_with_what_to_do(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StartupError, match=r"can't read .*tokenizer\.json"):
        load_vocabulary(str(tmp_path))
    with pytest.raises(StartupError, match="--skip-tokenizer-init"):
        load_vocabulary("")


def test_a_folder_with_a_tokenizer_file_is_read_without_transformers(tmp_path: Path):
    made.byte_level().save(str(tmp_path / "tokenizer.json"))
    assert load_vocabulary(str(tmp_path)).pieces


def test_tokens_that_only_the_config_file_calls_special_are_skipped(tmp_path: Path):
    made.byte_level().save(str(tmp_path / "tokenizer.json"))
    names = {"eos_token": {"content": "<tool→>"}, "pad_token": "a", "bos_token": None, "unk_token": "not there"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    vocabulary = load_vocabulary(str(tmp_path))
    ids = made.byte_level().encode("xa<tool→>", add_special_tokens=False).ids
    assert [vocabulary.plain(True)[token_id] for token_id in ids] == ["x", "", ""]
    assert vocabulary.decode(ids, True) == "x"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(StartupError, match=r"tokenizer_config\.json"):
        load_vocabulary(str(tmp_path))


# ---- stop strings ------------------------------------------------------------------------------------------------


class _Letters:
    """A decoder whose tokens are indexes into a list of texts."""

    unfinished = False

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def push(self, token_id: int) -> str:
        return self._texts[token_id]

    def finish(self) -> str:
        return ""


def naive(texts: list[str], stops: list[str], include: bool, min_tokens: int) -> tuple[str, str | None, int]:
    """(text, stop string, tokens): reads character by character and looks back at each."""
    text = ""
    for count, new in enumerate(texts, 1):
        for character in new:
            text += character
            found = [stop for stop in stops if text.endswith(stop)]
            if found and count > min_tokens:
                stop = max(found, key=len)
                return (text if include else text[: -len(stop)]), stop, count
    return text, None, len(texts)


@given(
    texts=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
)
@settings(SLOW_MACHINE, max_examples=1000)
def test_stop_strings_are_found_as_by_a_naive_search(texts, stops, include, min_tokens):
    stream = TextStream(_Letters(texts), stops, include, min_tokens)
    said = ""
    finder = StopStrings(stops)
    for token_id in range(len(texts)):
        said += stream.push(token_id)
        if stream.stop is not None:
            break
        whole = "".join(texts[: token_id + 1])
        held = [n for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        assert said == whole[: len(whole) - max(held, default=0)], "holds back what may become a stop, and no more"
        assert finder.held(whole) == max(held, default=0)
    if stream.stop is None:
        said += stream.finish()
    assert (said, stream.stop, stream.count) == naive(texts, stops, include, min_tokens)


def test_a_held_back_beginning_is_said_when_the_stream_ends_otherwise():
    stream = TextStream(_Letters(["Hello", "\nUs", "er"]), ["\nUser:"])
    assert [stream.push(0), stream.push(1), stream.push(2)] == ["Hello", "", ""]
    assert stream.finish() == "\nUser"
