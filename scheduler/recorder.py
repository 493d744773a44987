"""A core that keeps a journal of itself: every call goes through, and is written down with what came of it.

Owns what is recorded and when a segment ends; must not decide anything. Speaks to the core it wraps and to a
`JournalWriter`. Calls of `schedule` that could not have changed anything (`SchedulerCore.may_plan`) are left out.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from ..protocol.codec import encode
from ..protocol.config import EngineConfig
from ..protocol.errors import ProtocolError
from ..protocol.messages import Message, Step
from .core import Effect, SchedulerCore
from .journal import Call, Header, outputs_of, pack_record
from .journal_writer import JournalWriter
from .redaction import KEY_BYTES, Redactor
from .snapshot import SnapshotError, freeze_core


class RecordedCore:
    """`core` with a journal at `config.journal`; to be called as a core is, and closed in the end.

    Raises `StartupError` if the file can't be opened. The journal holds records of at most `config.journal_max_bytes`,
    in two segments; the second and all further ones begin with a snapshot. A redacted journal can't begin with one
    of `core`, which holds prompts. So a second core is fed what the journal holds: its state is that of a replay.
    """

    def __init__(self, core: SchedulerCore, config: EngineConfig) -> None:
        self._core = core
        self._config = config
        self._redactor = Redactor(core, secrets.token_bytes(KEY_BYTES)) if config.journal_redact else None
        self._redacted = SchedulerCore(config) if config.journal_redact else None
        header = Header(config, config.journal_redact).pack()
        self._writer = JournalWriter(Path(config.journal or ""), header, config.journal_max_bytes // 2)

    @property
    def idle(self) -> bool:
        return self._core.idle

    def handle(self, message: Message, now: float, sender: str = "") -> list[Effect]:
        if self._writer.stopped:
            return self._core.handle(message, now, sender)
        shown = message if self._redactor is None else self._redactor.incoming(message)
        try:
            effects = self._core.handle(message, now, sender)
        except BaseException:
            self._write(Call.HANDLE, now, sender, shown, None, raised=True)
            raise
        self._follow(lambda redacted: redacted.handle(shown, now, sender))
        self._write(Call.HANDLE, now, sender, shown, effects)
        return effects

    def schedule(self, now: float) -> Step | None:
        if self._writer.stopped or not self._core.may_plan:
            return self._core.schedule(now)
        try:
            step = self._core.schedule(now)
        except BaseException:
            self._write(Call.SCHEDULE, now, "", None, None, raised=True)
            raise
        self._follow(lambda redacted: redacted.schedule(now))
        self._write(Call.SCHEDULE, now, "", None, step)
        return step

    def end_all(self, now: float) -> list[Effect]:
        effects = self._core.end_all(now)
        self._write(Call.END_ALL, now, "", None, effects)
        return effects

    def close(self) -> None:
        self._writer.close()

    def _follow(self, call: Callable[[SchedulerCore], object]) -> None:
        if self._redacted is None:
            return
        try:
            call(self._redacted)
        except Exception as error:  # noqa: BLE001  # a defect of the redaction must not end the engine
            self._writer.stop(f"the core that is fed its redacted messages failed: {type(error).__name__}: {error}")

    def _write(
        self,
        call: Call,
        now: float,
        sender: str,
        message: Message | None,
        result: list[Effect] | Step | None,
        *,
        raised: bool = False,
    ) -> None:
        try:
            frame = None if message is None else encode(message)
            outputs = None if raised else outputs_of(result, redacted=self._redacted is not None)
        except ProtocolError as error:  # no frame can hold it: whoever sends it will say so too
            self._writer.stop(str(error))
            return
        self._writer.append(pack_record(call, now, sender, frame, outputs), now)
        if self._writer.full:
            self._next_segment()
        elif self._core.idle:
            self._writer.flush()

    def _next_segment(self) -> None:
        try:
            snapshot = freeze_core(self._redacted or self._core)
        except SnapshotError as error:
            self._writer.stop(f"no second segment can begin: {error}")
            return
        self._writer.begin_segment(Header(self._config, self._redacted is not None, snapshot).pack())
