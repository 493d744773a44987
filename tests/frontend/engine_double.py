"""A stand-in for everything behind the frontend: takes its messages, makes one token a step for each sequence.

Token t of a sequence is `first_token + t` (mod the vocabulary) and reads " w<id>". Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from fast_inference.protocol.messages import (
    Abort,
    Attach,
    EngineInfo,
    GetStats,
    GetTimeline,
    Message,
    SequenceTimeline,
    Stats,
    StreamEnd,
    StreamPromptLogprobs,
    Submit,
    TextBatch,
    Timeline,
    TopLogprobs,
)

INFO = EngineInfo(
    model="double",
    max_model_len=128,
    vocab_size=300,
    num_blocks=64,
    block_size=16,
    max_num_seqs=32,
    dtype="float32",
    device="none",
)


def word(token: int) -> str:
    return f" w{token}"


@dataclass
class Sequence:
    submit: Submit
    made: list[int] = field(default_factory=list)
    text: str = ""


class EngineDouble:
    def __init__(self, info: EngineInfo = INFO, first_token: int = 7) -> None:
        self.info = info
        self.first_token = first_token
        self.running: dict[int, Sequence] = {}
        self.submits: list[Submit] = []
        self.aborted: list[int] = []
        self.replies: deque[Message] = deque()
        self.rejecting: StreamEnd | None = None  # how every new sequence ends at once
        self.full = False  # take no more submits
        self.silent = False  # answer nothing, make nothing
        self.steps = 0
        self.timelines: list[SequenceTimeline] = []  # what it knows of requests' times
        self._ended: list[StreamEnd] = []
        self._new: list[int] = []

    def send(self, message: Message) -> bool:
        """The frontend's link to the scheduler."""
        if isinstance(message, Attach):
            self.replies.append(self.info)
        elif isinstance(message, Submit):
            return self._submit(message)
        elif isinstance(message, Abort):
            for key in message.keys:
                self.aborted.append(key)
                if self.running.pop(key, None) is not None:
                    self._ended.append(StreamEnd(key=key, reason="abort"))
        elif isinstance(message, GetStats) and not self.silent:
            self.replies.append(
                Stats(token=message.token, running=len(self.running), steps=self.steps, num_blocks=self.info.num_blocks)
            )
        elif isinstance(message, GetTimeline) and not self.silent:
            told = tuple(story for story in self.timelines if story.request_id in message.request_ids)
            self.replies.append(Timeline(token=message.token, sequences=told))
        return True

    def _submit(self, submit: Submit) -> bool:
        if self.full:
            return False
        self.submits.append(submit)
        if self.rejecting is not None:
            reject = self.rejecting
            self._ended.append(
                StreamEnd(
                    key=submit.key,
                    reason=reject.reason,
                    code=reject.code,
                    message=reject.message,
                    param=reject.param,
                    retry_after=reject.retry_after,
                )
            )
        else:
            self.running[submit.key] = Sequence(submit)
            self._new.append(submit.key)
        return True

    def step(self) -> TextBatch | None:
        """One token for every sequence, and the ends; None if there is nothing to tell."""
        if self.silent:
            return None
        self.steps += 1
        keys, texts, tokens, ended = [], [], [], self._ended
        records: list[tuple[int, list[int], list[float]]] = []
        self._ended = []
        prompt_logprobs = tuple(self._prompt_logprobs(key) for key in self._new if self._wants_prompt(key))
        self._new = []
        for key, sequence in list(self.running.items()):
            params = sequence.submit.params
            token = (self.first_token + len(sequence.made)) % self.info.vocab_size
            if params.logprobs is not None:
                records.append(
                    (len(tokens), [token, *range(1, params.logprobs + 1)], [-0.5, *_falling(params.logprobs)])
                )
            sequence.made.append(token)
            before, sequence.text = sequence.text, sequence.text + word(token)
            keys.append(key)
            tokens.append(token)
            text, end = word(token), None
            for stop in params.stop:
                if (at := sequence.text.find(stop)) >= 0:
                    text, end = sequence.text[len(before) : at], self._end(sequence, "stop", stop)
            if end is None and token in sequence.submit.eos_token_ids and not params.ignore_eos:
                text, end = "", self._end(sequence, "stop", None)
            room = self.info.max_model_len - len(sequence.submit.prompt_token_ids)
            if end is None and len(sequence.made) >= min(params.max_tokens or room, room):
                end = self._end(sequence, "length", None)
            texts.append(text)
            if end is not None:
                del self.running[key]
                ended.append(end)
        if not keys and not ended:
            return None
        return TextBatch(
            keys=np.array(keys, np.int64),
            indexes=np.zeros(len(keys), np.int32),
            texts=texts,
            counts=np.ones(len(keys), np.int32),
            token_ids=np.array(tokens, np.int32),
            logprobs=_top(records) if records else None,
            logprob_texts=[word(t) for _, ids, _ in records for t in ids],
            prompt_logprobs=prompt_logprobs,
            ended=tuple(ended),
        )

    def _wants_prompt(self, key: int) -> bool:
        return key in self.running and self.running[key].submit.params.prompt_logprobs is not None

    def _prompt_logprobs(self, key: int) -> StreamPromptLogprobs:
        submit = self.running[key].submit
        count = submit.params.prompt_logprobs or 0
        ids = submit.prompt_token_ids.tolist()
        records = [(i, [ids[i], *range(1, count + 1)], [-1.5, *_falling(count)]) for i in range(1, len(ids))]
        return StreamPromptLogprobs(key=key, top=_top(records))

    def _end(self, sequence: Sequence, reason: str, stop_reason: str | int | None) -> StreamEnd:
        return StreamEnd(
            key=sequence.submit.key,
            reason=reason,
            stop_reason=stop_reason,
            prompt_tokens=len(sequence.submit.prompt_token_ids),
            completion_tokens=len(sequence.made),
            cached_tokens=3,
            arrival=100.0,
            first_scheduled=100.5,
            first_token=101.0,
            finished=102.0,
        )


def _falling(count: int) -> list[float]:
    return [-1.0 - i for i in range(count)]


def _top(records: list[tuple[int, list[int], list[float]]]) -> TopLogprobs:
    return TopLogprobs(
        rows=np.array([row for row, _, _ in records], np.int32),
        counts=np.array([len(ids) for _, ids, _ in records], np.int32),
        ranks=np.ones(len(records), np.int32),
        token_ids=np.array([t for _, ids, _ in records for t in ids], np.int32),
        values=np.array([v for _, _, values in records for v in values], np.float32),
    )
