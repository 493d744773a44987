"""Where the rows of a step's tokens go: the columns that stay the same while the same streams run.

Pure. Owns `Stream` and the columns made of a `Deliver`'s `numbers`; must not know sockets, clocks or how text is
decoded. Used by `detokenizer.py` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..protocol.messages import Deliver, Int32, Int64, TextBatch
from ..protocol.ragged import follow_rows
from .text_stream import TextStream


class _Nothing:
    """A table in which every token says nothing."""

    def __getitem__(self, token_id: int) -> str:
        return ""


NOTHING = _Nothing()
Table = list[str | None] | _Nothing


@dataclass(slots=True)
class Stream:
    """One open stream. `text` None: its tokens pass as they are."""

    number: int
    frontend: str
    key: int
    include_stop: bool
    prompt_tokens: int
    arrival: float
    first_token: float = 0.0  # when its first token was looked at one by one
    text: TextStream | None = None
    always_slow: bool = False  # every token goes through `text`: it counts and looks for stop strings
    table: Table = NOTHING  # where the text of the other streams' tokens is looked up


class Route:
    """What a column of stream numbers means. Stands until one of its streams closes."""

    def __init__(self, numbers: Int64, streams: Mapping[int, Stream]) -> None:
        self._numbers = numbers.tobytes()
        listed = numbers.tolist()
        self.streams: list[Stream | None] = [streams.get(number) for number in listed]
        self.row_of = {s.number: row for row, s in enumerate(self.streams) if s is not None}  # a stream's last row
        self._keys = np.array([-1 if s is None else s.key for s in self.streams], np.int64)
        self._counts = np.ones(len(listed), np.int32)
        self._indexes = np.zeros(len(listed), np.int32)
        self._tables: list[Table] = [_table_of(s) for s in self.streams]
        first = self._tables[0]
        self._one_table = first if all(table is first for table in self._tables) else None
        known = sum(s is not None for s in self.streams)
        if len(self.row_of) < known:  # several tokens of one stream: a token's place in it matters
            self._slow: Sequence[int] = range(len(listed))
        else:
            self._slow = [row for row, s in enumerate(self.streams) if s is not None and s.always_slow]
        self._groups = self._by_frontend()

    def fits(self, numbers: Int64) -> bool:
        return numbers.tobytes() == self._numbers

    def look_up(self, tokens: Int32, unfinished: set[int]) -> tuple[list[str], Sequence[int]]:
        """The text of each row where the table has it, and the rows, in order, that must ask their stream."""
        if self._one_table is NOTHING:
            return [""] * len(tokens), self._slow
        found: list[str | None]
        try:
            if isinstance(self._one_table, list):
                found = list(map(self._one_table.__getitem__, tokens.tolist()))
            else:
                found = [table[token] for table, token in zip(self._tables, tokens.tolist(), strict=True)]
        except IndexError:  # an id beyond every table
            return [""] * len(tokens), range(len(tokens))
        slow = self._slow
        if unfinished or None in found:
            rows = {row for row, text in enumerate(found) if text is None}
            rows.update(self.row_of[number] for number in unfinished if number in self.row_of)
            rows.update(slow)
            slow = sorted(rows)
        return found, slow  # type: ignore[return-value]  # the rows that are None get their text from the stream

    def batches(
        self,
        deliver: Deliver,
        texts: list[str],
        keep: NDArray[np.bool_] | None,
        text_of: Callable[[Int32], list[str]],
    ) -> dict[str, TextBatch]:
        """The rows of each frontend; those whose `keep` is false are left out."""
        out: dict[str, TextBatch] = {}
        for frontend, rows in self._groups.items():
            if rows is None and keep is None:
                out[frontend] = TextBatch(
                    keys=self._keys,
                    indexes=self._indexes,
                    texts=texts,
                    counts=self._counts,
                    token_ids=deliver.tokens,
                    logprobs=deliver.logprobs,
                    logprob_texts=[] if deliver.logprobs is None else text_of(deliver.logprobs.token_ids),
                )
                continue
            chosen = np.arange(len(texts)) if rows is None else rows
            if keep is not None:
                chosen = chosen[keep[chosen]]
            if not chosen.size:
                continue
            logprobs = None
            if deliver.logprobs is not None:
                place = np.full(len(texts), -1, np.int64)
                place[chosen] = np.arange(chosen.size)
                logprobs = follow_rows(deliver.logprobs, place)
            out[frontend] = TextBatch(
                keys=self._keys[chosen],
                indexes=self._indexes[: chosen.size],
                texts=[texts[row] for row in chosen.tolist()],
                counts=self._counts[: chosen.size],
                token_ids=deliver.tokens[chosen],
                logprobs=logprobs,
                logprob_texts=[] if logprobs is None else text_of(logprobs.token_ids),
            )
        return out

    def _by_frontend(self) -> dict[str, NDArray[np.int64] | None]:
        """Frontend -> its rows; None: it has all of them."""
        rows: dict[str, list[int]] = {}
        for row, stream in enumerate(self.streams):
            if stream is not None:
                rows.setdefault(stream.frontend, []).append(row)
        return {
            frontend: None if len(mine) == len(self.streams) else np.array(mine, np.int64)
            for frontend, mine in rows.items()
        }


def _table_of(stream: Stream | None) -> Table:
    return NOTHING if stream is None or stream.always_slow else stream.table
