"""The pure half of the detokenizer: a `Deliver` in, batches of text and found stop strings out.

Owns the open streams, and each stream's one end. Must not know sockets, queues or clocks. `detokenizer.py` is the
process around it.

A step's tokens are handled as columns: a token whose text can't depend on its neighbours is looked up in a table,
and Python touches a stream only when something happens to it (an unfinished character, a stop string, an end).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import Overloaded, ProtocolError
from ..protocol.messages import Deliver, OpenStream, StopFound, StreamEnd, StreamPromptLogprobs, TextBatch
from ..protocol.ragged import well_formed
from .rows import Route, Stream
from .text_stream import TextStream, make_decoder
from .vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: `batch` goes to `frontend`."""

    frontend: str
    batch: TextBatch


Effect = Send | StopFound


class DetokenizerCore:
    """All open streams of one engine.

    `vocabulary` None: no text is made, tokens pass straight.
    """

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._streams: dict[int, Stream] = {}
        self._unfinished: set[int] = set()  # plain streams whose next token can't be looked up
        self._route: Route | None = None  # of the last batch; running streams stay the same from step to step

    def __len__(self) -> int:
        return len(self._streams)

    def handle(self, deliver: Deliver, now: float = 0.0) -> list[Effect]:
        """Take in one step. `now`: `time.time()` seconds. Raises `ProtocolError`, and does nothing, where columns
        don't fit one another."""
        _check(deliver)
        for opened in deliver.opened:
            self._open(opened)
        prompt_logprobs = self._prompt_logprobs(deliver.prompt_logprobs)
        batches: dict[str, TextBatch] = {}
        ends: list[tuple[str, StreamEnd]] = []
        stopped: list[int] = []
        if deliver.numbers.size:
            batches, ends, stopped = self._tokens(deliver, now)
        for number in stopped:
            self._close(number)
        flushed: list[tuple[str, int, str]] = []
        for end in deliver.ended:
            stream = self._close(end.key)
            if stream is not None:  # else it has ended here by a stop string
                if stream.text is not None and (text := stream.text.finish()):
                    flushed.append((stream.frontend, stream.key, text))
                ends.append((stream.frontend, replace(end, key=stream.key)))
        if prompt_logprobs or flushed or ends:
            batches = _with_rare(batches, prompt_logprobs, flushed, ends)
        effects: list[Effect] = [Send(frontend, batch) for frontend, batch in batches.items()]
        if stopped:
            effects.append(StopFound(numbers=tuple(stopped)))
        return effects

    def drop(self, frontend: str) -> list[Effect]:
        """A frontend is gone: forget its streams, and have the scheduler free what they hold."""
        numbers = self._numbers_of(frontend)
        for number in numbers:
            self._close(number)
        return [StopFound(numbers=tuple(numbers), reason="abort")] if numbers else []

    def fail(self, frontend: str, message: str, now: float = 0.0) -> list[Effect]:
        """End all streams of a frontend that does not read, with an error."""
        ends = []
        numbers = self._numbers_of(frontend)
        for number in numbers:
            stream = self._streams[number]
            ends.append(replace(_end(stream, now), reason="error", code=Overloaded.code, message=message))
            self._close(number)
        if not numbers:
            return []
        return [Send(frontend, TextBatch(ended=tuple(ends))), StopFound(numbers=tuple(numbers), reason="abort")]

    # ---- streams -----------------------------------------------------------------------------------------------

    def _open(self, opened: OpenStream) -> None:
        params = opened.params
        stream = Stream(
            opened.number,
            opened.frontend,
            opened.key,
            params.include_stop_str_in_output,
            opened.prompt_tokens,
            opened.arrival,
        )
        if self._vocabulary is not None and params.detokenize:
            decoder = make_decoder(
                self._vocabulary,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
                opened.context_token_ids.tolist(),
            )
            stream.text = TextStream(decoder, params.stop, params.include_stop_str_in_output, params.min_tokens)
            stream.always_slow = bool(params.stop) or not self._vocabulary.pieces
            stream.table = self._vocabulary.plain(params.skip_special_tokens)
            if decoder.unfinished and not stream.always_slow:
                self._unfinished.add(opened.number)
        self._streams[opened.number] = stream
        self._route = None

    def _close(self, number: int) -> Stream | None:
        self._unfinished.discard(number)
        self._route = None
        return self._streams.pop(number, None)

    def _numbers_of(self, frontend: str) -> list[int]:
        return [number for number, stream in self._streams.items() if stream.frontend == frontend]

    # ---- tokens ------------------------------------------------------------------------------------------------

    def _tokens(
        self, deliver: Deliver, now: float
    ) -> tuple[dict[str, TextBatch], list[tuple[str, StreamEnd]], list[int]]:
        route = self._route
        if route is None or not route.fits(deliver.numbers):
            route = self._route = Route(deliver.numbers, self._streams)
        silent = self._silent_rows(route, deliver.ended) if deliver.ended else set()
        texts, slow = route.look_up(deliver.tokens, self._unfinished)
        if not slow and not silent:
            return route.batches(deliver, texts, None, self._text_of), [], []
        keep, stopped = self._push(route, deliver.tokens, texts, slow, silent, now)
        ends = []
        for number in stopped:
            stream = self._streams[number]
            assert stream.text is not None
            end = replace(_end(stream, now), reason="stop", stop_reason=stream.text.stop)
            ends.append((stream.frontend, end))
        return route.batches(deliver, texts, keep, self._text_of), ends, stopped

    def _silent_rows(self, route: Route, ended: Sequence[StreamEnd]) -> set[int]:
        """A stop token, which only the scheduler knows, is no text unless the request wants it."""
        return {
            route.row_of[end.key]
            for end in ended
            if end.reason == "stop" and end.key in route.row_of and not self._streams[end.key].include_stop
        }

    def _push(
        self,
        route: Route,
        tokens: NDArray[np.int32],
        texts: list[str],
        slow: Sequence[int],
        silent: set[int],
        now: float,
    ) -> tuple[NDArray[np.bool_] | None, list[int]]:
        """Decode the rows that need their streams; returns which rows to keep (None: all) and the stopped numbers."""
        keep: NDArray[np.bool_] | None = None
        stopped: list[int] = []
        for row in silent:
            texts[row] = ""
        for row in slow:
            stream = route.streams[row]
            if stream is None or stream.text is None:
                continue
            if stream.text.stop is not None:  # a token beyond the stop string
                keep = np.ones(len(texts), np.bool_) if keep is None else keep
                keep[row] = False
                continue
            if row in silent:
                continue
            stream.first_token = stream.first_token or now
            texts[row] = stream.text.push(int(tokens[row]))
            if stream.text.stop is not None:
                stopped.append(stream.number)
            elif not stream.always_slow:
                if stream.text.unfinished:
                    self._unfinished.add(stream.number)
                else:
                    self._unfinished.discard(stream.number)
        return keep, stopped

    def _text_of(self, token_ids: NDArray[np.int32]) -> list[str]:
        if self._vocabulary is None:
            return []
        return list(map(self._vocabulary.text_of, token_ids.tolist()))

    def _prompt_logprobs(self, parts: Sequence[StreamPromptLogprobs]) -> list[tuple[str, StreamPromptLogprobs]]:
        out = []
        for part in parts:
            stream = self._streams.get(part.key)
            if stream is not None:
                part = replace(part, key=stream.key, texts=self._text_of(part.top.token_ids))
                out.append((stream.frontend, part))
        return out


def _check(deliver: Deliver) -> None:
    """What the codec can't see: columns that belong together are equally long, and rows exist."""
    if deliver.numbers.size != deliver.tokens.size:
        raise ProtocolError(
            f"Deliver.tokens must be as long as numbers, got {deliver.tokens.size} and {deliver.numbers.size}"
        )
    tops = [part.top for part in deliver.prompt_logprobs]
    if (top := deliver.logprobs) is not None:
        tops.append(top)
        if top.rows.size and not (top.rows.min() >= 0 and top.rows.max() < deliver.numbers.size):
            raise ProtocolError(f"Deliver.logprobs.rows must be in [0, {deliver.numbers.size})")
    if not all(map(well_formed, tops)):
        raise ProtocolError("log-probabilities must be ragged columns that fit one another")


def _end(stream: Stream, now: float) -> StreamEnd:
    """An end that the detokenizer makes; reason to be filled in."""
    return StreamEnd(
        key=stream.key,
        reason="",
        prompt_tokens=stream.prompt_tokens,
        completion_tokens=stream.text.count if stream.text is not None and stream.always_slow else 0,
        arrival=stream.arrival,
        first_token=stream.first_token,
        finished=now,
    )


def _with_rare(
    batches: dict[str, TextBatch],
    prompt_logprobs: Sequence[tuple[str, StreamPromptLogprobs]],
    flushed: Sequence[tuple[str, int, str]],
    ends: Sequence[tuple[str, StreamEnd]],
) -> dict[str, TextBatch]:
    """Add what few steps carry: prompt log-probabilities, rows of held-back text, ends."""
    out = dict(batches)
    frontends = [to for to, _ in prompt_logprobs] + [to for to, _, _ in flushed] + [to for to, _ in ends]
    for frontend in dict.fromkeys(frontends):
        batch = out.get(frontend) or TextBatch()
        rows = [(key, text) for to, key, text in flushed if to == frontend]
        out[frontend] = replace(
            batch,
            keys=np.concatenate([batch.keys, np.array([key for key, _ in rows], np.int64)]),
            indexes=np.concatenate([batch.indexes, np.zeros(len(rows), np.int32)]),
            texts=[*batch.texts, *(text for _, text in rows)],
            counts=np.concatenate([batch.counts, np.zeros(len(rows), np.int32)]),
            prompt_logprobs=tuple(part for to, part in prompt_logprobs if to == frontend),
            ended=tuple(end for to, end in ends if to == frontend),
        )
    return out
