"""The text of one request, token by token: decoding that never shows half a character, and stop strings.

Pure. Owns what one stream has decoded but not yet said; must not know messages, other streams or sockets. What a
token id says comes from `vocabulary.py`.

The deltas of a stream, put together, are the text of its tokens decoded all at once after its context. One
difference: where a sentencepiece tokenizer spells characters in bytes and the spelling breaks off, decoding at once
turns the whole run of bytes into U+FFFD, while a stream has already said the characters before the break.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from .vocabulary import Vocabulary

BROKEN = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes: a window that is still unfinished after this many tokens is broken, not late.
MAX_HELD_TOKENS = 8


class TokenDecoder(Protocol):
    """The decoding half of a stream."""

    @property
    def unfinished(self) -> bool:
        """Whether the next token's text depends on what came before it."""

    def push(self, token_id: int) -> str:
        """The text that is certain now."""

    def finish(self) -> str:
        """The rest: U+FFFD for a character that stayed unfinished."""


class ByteDecoder:
    """Decodes by a table of bytes per token: byte-level BPE, and sentencepiece with byte fallback."""

    __slots__ = ("_broken_run", "_pending", "_pieces", "_skip", "_strip", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool, context: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces
        self._skip = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._pending = b""
        self._broken_run = False  # sentencepiece: all bytes after a wrong one, up to the next whole token
        self._strip = vocabulary.strip
        for token_id in context:
            self.push(token_id)

    @property
    def unfinished(self) -> bool:
        return bool(self._pending or self._strip or self._broken_run)

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None
        if piece is None or token_id in self._skip:
            return ""
        if not self._vocabulary.byte_ids:
            data = self._pending + piece
            text, used = codecs.utf_8_decode(data, "replace", False)
            self._pending = data[used:]
        elif token_id in self._vocabulary.byte_ids:
            text = self._push_byte(piece)
        else:
            text = self.finish() + piece.decode()
            self._broken_run = False
        return self._stripped(text) if self._strip else text

    def finish(self) -> str:
        data, self._pending = self._pending, b""
        if self._vocabulary.byte_ids:
            return BROKEN * len(data)
        return data.decode(errors="replace")

    def _push_byte(self, byte: bytes) -> str:
        if self._broken_run:
            return BROKEN
        data = self._pending + byte
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            self._broken_run, self._pending = True, b""
            return BROKEN * len(data)
        self._pending = data[used:]
        return text

    def _stripped(self, text: str) -> str:
        """The start of the whole text loses up to `strip` characters."""
        while self._strip and text:
            if text[0] != self._vocabulary.strip_text:
                self._strip = 0
            else:
                text, self._strip = text[1:], self._strip - 1
        return text


class WindowDecoder:
    """Decodes by asking the tokenizer for the last few tokens with and without the new ones.

    `_ids[:_read]` were said last: they give the new tokens their context, and their own text is taken off again.
    """

    __slots__ = ("_after_added", "_ids", "_join_added", "_read", "_said", "_skip", "_vocabulary")

    def __init__(
        self,
        vocabulary: Vocabulary,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._join_added = not (skip_special_tokens or spaces_between_special_tokens)
        self._after_added = bool(context) and context[-1] in vocabulary.added
        self._ids = [token_id for token_id in context if not self._silent(token_id)]
        self._read = len(self._ids)
        self._said = self._text()

    @property
    def unfinished(self) -> bool:
        return True

    def push(self, token_id: int) -> str:
        if self._silent(token_id):
            return ""
        added = self._vocabulary.added.get(token_id) if self._join_added else None
        joined, self._after_added = added is not None and self._after_added, added is not None
        if joined and added is not None:
            rest = self.finish()
            self._ids.append(token_id)
            self._advance()
            return rest + added
        self._ids.append(token_id)
        text = self._text()
        held = len(self._ids) - self._read
        late = text.endswith(BROKEN) or len(text) <= len(self._said)
        if late and held < MAX_HELD_TOKENS:
            return ""
        new = text[len(self._said) :]
        self._advance()
        return new

    def finish(self) -> str:
        text = self._text()[len(self._said) :]
        self._advance()
        return text

    def _silent(self, token_id: int) -> bool:
        """A tokenizer drops such tokens before it decodes, so they are no context either."""
        return token_id < 0 or (self._skip and token_id in self._vocabulary.special_ids)

    def _advance(self) -> None:
        """Everything is said: the tokens of the last step become the context of the next."""
        if self._read < len(self._ids):
            del self._ids[: self._read]
            self._read = len(self._ids)
        self._said = self._text()

    def _text(self) -> str:
        return self._vocabulary.decode(self._ids, self._skip) if self._ids else ""


def make_decoder(
    vocabulary: Vocabulary, skip_special_tokens: bool, spaces_between_special_tokens: bool, context: Sequence[int]
) -> TokenDecoder:
    """The decoder that this vocabulary has tables for, or else the one by windows."""
    if vocabulary.pieces:  # there a space is never put between tokens
        return ByteDecoder(vocabulary, skip_special_tokens, context)
    return WindowDecoder(vocabulary, skip_special_tokens, spaces_between_special_tokens, context)


class StopStrings:
    """Finds stop strings in a text that comes in pieces.

    Of several that match, the one that is complete first wins, of two complete at the same character the longer:
    so the cut does not depend on how the text was divided into tokens.
    """

    __slots__ = ("_firsts", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._firsts = frozenset(stop[0] for stop in self._stops)

    def find(self, text: str, after: int) -> tuple[int, int] | None:
        """(begin, end) of the first match that ends beyond `after` characters of `text`."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            begin = text.find(stop, max(0, after - len(stop) + 1))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < (best[1], best[0])):
                best = (begin, begin + len(stop))
        return best

    def held(self, text: str) -> int:
        """How many last characters of `text` may be the beginning of a stop string."""
        if self._firsts.isdisjoint(text):
            return 0
        longest = 0
        for stop in self._stops:
            begin = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= begin < len(text) - longest:
                if stop.startswith(text[begin:]):
                    longest = len(text) - begin
                    break
                begin = text.find(stop[0], begin + 1)
        return longest


class TextStream:
    """One stream: push its tokens one at a time, take the text, stop when `stop` is set.

    Args:
        decoder: turns tokens into text.
        stops: stop strings.
        include_stop: whether the stop string stays in the text.
        min_tokens: a stop string that is complete within this many tokens does not count.
    """

    __slots__ = ("_decoder", "_held", "_include_stop", "_min_tokens", "_stops", "count", "stop")

    def __init__(
        self, decoder: TokenDecoder, stops: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._decoder = decoder
        self._stops = StopStrings(stops) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""
        self.count = 0  # tokens pushed
        self.stop: str | None = None  # the stop string that ended the stream

    @property
    def unfinished(self) -> bool:
        return self._stops is not None or self._decoder.unfinished

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token. Nothing more may be pushed once `stop` is set."""
        self.count += 1
        new = self._decoder.push(token_id)
        if self._stops is None or not new:
            return new
        text = self._held + new
        # Every match that ends in the new text begins in the held one at the earliest.
        if self.count > self._min_tokens and (match := self._stops.find(text, len(self._held))) is not None:
            begin, end = match
            self.stop, self._held = text[begin:end], ""
            return text[: end if self._include_stop else begin]
        held = self._stops.held(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when the stream ends for another reason."""
        text, self._held = self._held, ""
        return text + self._decoder.finish()
