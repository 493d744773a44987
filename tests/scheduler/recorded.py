"""A harness whose core keeps a journal."""

from __future__ import annotations

from pathlib import Path

from fast_inference.protocol.messages import EngineInfo, ExecutorReady, Message
from fast_inference.scheduler.core import Effect
from fast_inference.scheduler.recorder import RecordedCore

from .harness import Harness


class Recorded(Harness):
    """Every call goes through `recorder`, which is to be closed in the end."""

    def __init__(self, path: Path, info: EngineInfo | None = None, **config: object) -> None:
        super().__init__(info, ready=False, **{"journal": str(path), **config})
        self.recorder = RecordedCore(self.core, self.config)
        self.handle(ExecutorReady(info=self.info), "executor")

    def handle(self, message: Message, sender: str = "frontend-0") -> list[Effect]:
        effects = self.recorder.handle(message, self.now, sender)
        self.book(effects)
        return effects

    def schedule(self) -> None:
        while (step := self.recorder.schedule(self.now)) is not None:
            self._check_reuse(step)
            self.queue.append(step)
            self.steps.append(step)
