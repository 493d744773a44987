"""Text made on the caller's side."""

import pytest
from fast_inference.frontend.outputs import CompletionOutput, RequestOutput
from fast_inference.launch.embedding import describe
from fast_inference.launch.live_tokenizer import CallerSide
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.protocol.sampling import RequestOutputKind, SamplingParams


class Bytes:
    """Token ids are bytes."""

    eos_token_id = 10

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def output(ids: list[int], finished: bool = False) -> RequestOutput:
    part = CompletionOutput(0, "", ids, finish_reason="length" if finished else None)
    return RequestOutput("r", None, [], [part], finished)


def test_an_unfinished_character_is_held_back_until_it_is_whole() -> None:
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    reader = CallerSide(Bytes()).reader(params)
    ids = list("aé€".encode())
    texts = [reader.read(output([token])).outputs[0].text for token in ids]
    assert texts == ["a", "", "é", "", "", "€"]


def test_a_cumulative_output_has_all_of_the_text() -> None:
    reader = CallerSide(Bytes()).reader(SamplingParams())
    assert reader.read(output(list(b"ab"))).outputs[0].text == "ab"
    assert reader.read(output([*b"abc", 0xE2], finished=True)).outputs[0].text == "abc\ufffd"


def test_the_tokenizers_end_token_ends_a_request() -> None:
    side = CallerSide(Bytes())
    asked = side.params(SamplingParams(stop_token_ids=(3,)))
    assert asked.stop_token_ids == (3, 10) and not asked.detokenize
    assert side.params(SamplingParams(ignore_eos=True)).stop_token_ids == ()
    with pytest.raises(InvalidRequest, match="stop strings"):
        side.params(SamplingParams(stop=("x",)))


def test_a_prompt_becomes_token_ids_and_keeps_its_text() -> None:
    side = CallerSide(Bytes())
    assert side.prompt("ab") == {"prompt_token_ids": [97, 98], "prompt": "ab"}
    assert side.prompt([1, 2]) == [1, 2]
    with pytest.raises(InvalidRequest, match="apply_chat_template"):
        side.chat([{"role": "user", "content": "x"}])


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="tokenizer must have encode and decode, got int"):
        describe("x", 7, None, {})
    with pytest.raises(InvalidRequest, match="model must be a name, a path or a torch"):
        describe(7, None, None, {})
