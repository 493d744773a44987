"""Tokenizers handed over as live objects: how each kind reaches the engine.

One that can be saved (Hugging Face's, or `tokenizers.Tokenizer`) is written to a folder and loaded by the engine's
own processes. Any other object with `encode` and `decode` stays with the caller: the engine then takes and gives
token ids, and the caller's side makes text. Must not know sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..frontend.client_requests import Prompt
from ..frontend.outputs import RequestOutput
from ..protocol.errors import InvalidRequest
from ..protocol.sampling import RequestOutputKind, SamplingParams

UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


@runtime_checkable
class Codec(Protocol):
    """The least that a tokenizer can do."""

    def encode(self, text: str) -> Any:
        """Token ids of `text`."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`."""


def saver(tokenizer: object) -> Callable[[Path], None] | None:
    """What writes `tokenizer` to a folder for `AutoTokenizer` to load, or None if it can't be saved."""
    savable: Any = tokenizer
    if type(tokenizer).__module__.partition(".")[0] == "tokenizers":
        from transformers import PreTrainedTokenizerFast

        savable = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    if not hasattr(savable, "save_pretrained"):
        return None

    def save(folder: Path) -> None:
        savable.save_pretrained(str(folder))

    return save


class CallerSide:
    """Encodes and decodes for an engine that only knows token ids."""

    def __init__(self, tokenizer: object) -> None:
        if not isinstance(tokenizer, Codec):
            raise InvalidRequest(
                f"tokenizer must have encode and decode, got {type(tokenizer).__name__}", param="tokenizer"
            )
        self._tokenizer = tokenizer

    def prompt(self, prompt: Prompt) -> Prompt:
        """The prompt as token ids (with its text, where it has one)."""
        if isinstance(prompt, str):
            return {"prompt_token_ids": self.encode(prompt), "prompt": prompt}
        return prompt

    def encode(self, text: str) -> list[int]:
        encoded = self._tokenizer.encode(text)
        return [int(token) for token in getattr(encoded, "ids", encoded)]

    def chat(self, messages: list[dict[str, Any]]) -> Prompt:
        """The prompt of a conversation. Raises `InvalidRequest` if the tokenizer has no chat template."""
        template = getattr(self._tokenizer, "apply_chat_template", None)
        if template is None:
            raise InvalidRequest("the tokenizer has no apply_chat_template: use generate", param="messages")
        return self.prompt(str(template(messages, tokenize=False, add_generation_prompt=True)))

    def params(self, params: SamplingParams) -> SamplingParams:
        """What to ask of the engine. Raises `InvalidRequest` for stop strings, which the engine can't see."""
        if params.stop:
            raise InvalidRequest("stop strings need a tokenizer that can be saved: use stop_token_ids", param="stop")
        eos = getattr(self._tokenizer, "eos_token_id", None)
        ends = params.stop_token_ids
        if isinstance(eos, int) and not params.ignore_eos and eos not in ends:
            ends = (*ends, eos)
        return params.replace(stop_token_ids=ends, detokenize=False)

    def reader(self, params: SamplingParams) -> OutputReader:
        """Puts text into the outputs of one request."""
        return OutputReader(self._tokenizer.decode, params)


class OutputReader:
    """One request's outputs on their way to the caller: token ids come, text is added.

    All tokens of a sequence are decoded each time, since a token's text may depend on those before it; the part that
    is new is handed out, a character whose bytes are not all there yet is held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], params: SamplingParams) -> None:
        self._decode = decode
        self._delta = params.output_kind == RequestOutputKind.DELTA
        self._ids: list[list[int]] = [[] for _ in range(params.n)]
        self._given = [0] * params.n  # characters handed out

    def read(self, output: RequestOutput) -> RequestOutput:
        """Fill in the text of `output`."""
        for part in output.outputs:
            text = self._text(part.index, part.token_ids, part.finished())
            part.text = text[self._given[part.index] :] if self._delta else text
            self._given[part.index] = len(text)
        return output

    def _text(self, index: int, token_ids: Sequence[int], finished: bool) -> str:
        if self._delta:
            self._ids[index] += token_ids
        else:
            self._ids[index] = list(token_ids)
        text = self._decode(self._ids[index])
        return text if finished else text.rstrip(UNFINISHED)
