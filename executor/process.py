"""The executor actor's shell: steps in, results out, beats on the control link.

Owns the two data links and the order in which steps are launched and awaited; must not know models, tensors or how a
step is computed. torch is imported inside `run`, after the hello, so that its import is seen as a phase of the start.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from ..protocol.actor import Control
from ..protocol.channel import Wire, ZmqSocket
from ..protocol.config import EngineConfig
from ..protocol.endpoints import Endpoints
from ..protocol.errors import ProtocolError
from ..protocol.messages import ExecutorReady, Message, Step

if TYPE_CHECKING:
    import torch

    from .pending import Pending
    from .recordings import Recordings
    from .runner import Runner

log = logging.getLogger(__name__)

LINK_HWM = 64  # the scheduler keeps at most `run_ahead` steps in flight, so neither queue ever fills
IDLE_SECONDS = 0.5  # how long an idle executor sleeps between two looks at the clock
SPIN_SECONDS = 0.002  # how long to look for another step while the device is busy with the last, before waiting for it
# How long the executor of a device looks for more work before it sleeps: a client that asks again at once finds it
# awake, and the processor's caches as they were, without which the same launch takes longer.
AWAKE_SECONDS = 0.01
WORK_SHARE = 2.0  # under load, between two recordings steps get so many times as long as the first of them took


def run(
    config: EngineConfig,
    endpoints: Endpoints,
    wire: Wire,
    control: Control,
    model: torch.nn.Module | None = None,
) -> None:
    """Load the model, say so, and run steps until told to stop.

    `model`: a live module to serve instead of `config.model`; then this runs on a thread of the caller's process.
    Raises `StartupError` where the engine can't start as configured, `EngineError` where it can't go on.
    """
    began = time.perf_counter()
    steps = wire.bind_pull(endpoints.steps, hwm=LINK_HWM)
    results = wire.push(endpoints.results, hwm=LINK_HWM)
    control.progress("importing torch")
    import torch

    from .startup import start

    imported = time.perf_counter() - began
    with torch.inference_mode():
        engine = start(config, control.progress, model)
        loop = StepLoop(engine.runner, steps, results, wire, control, depth=engine.depth)
        loop.send(ExecutorReady(info=engine.info))
        control.ready(import_seconds=round(imported, 2), **engine.facts)
        loop.run()


class StepLoop:
    """Launches steps as they come and sends their results in order, with at most `depth` steps under way.

    A GPU works on its own, so step N+1 is launched behind N before N is awaited. A CPU computes inside `launch`.
    """

    def __init__(
        self, runner: Runner, steps: ZmqSocket, results: ZmqSocket, wire: Wire, control: Control, depth: int
    ) -> None:
        self._runner = runner
        self._steps = steps
        self._results = results
        self._wire = wire
        self._control = control
        self._watched = (steps, control.socket)
        self._depth = depth
        self._pending: deque[Pending] = deque()
        self._outbox: deque[Message] = deque()
        self._awake_seconds = AWAKE_SECONDS if depth > 1 else 0.0
        self._stirred = 0.0  # when a step last came, or was answered, which asks for another
        self._next_preparation = 0.0  # under load, not before then
        self._recording_began = 0.0

    def run(self) -> None:
        """Until `Shutdown`; what was launched before it is still answered."""
        while True:
            if self._control.turn() is not None:
                while self._pending:
                    self._finish_oldest()
                return
            self._flush()
            if len(self._pending) < self._depth and (step := self._next_step()) is not None:
                self._pending.append(self._runner.launch(step))
                self._stirred = time.monotonic()
            elif self._pending:
                if self._must_finish():
                    self._finish_oldest()
                    self._prepare_if_wanted()
            elif (recordings := self._recordings()) is not None:
                self._prepare(recordings)
            elif time.monotonic() >= self._stirred + self._awake_seconds:
                self._wire.wait(self._watched, IDLE_SECONDS)

    def send(self, message: Message) -> None:
        """Send on the results link; what it does not take now stays, in order."""
        self._outbox.append(message)
        self._flush()

    def _must_finish(self) -> bool:
        """Whether there is nothing better to do than to answer the oldest step. While the device is busy with it,
        another step may still come and be launched behind it; one that has not come soon will not."""
        if len(self._pending) == self._depth or self._pending[0].done():
            return True
        return time.monotonic() > self._stirred + SPIN_SECONDS

    def _finish_oldest(self) -> None:
        recordings = self._recordings()
        self.send(self._pending.popleft().finish(0 if recordings is None else recordings.missing))
        self._stirred = time.monotonic()

    def _prepare_if_wanted(self) -> None:
        """Between steps, make a recording only where a step has missed it, and not too often."""
        recordings = self._recordings()
        if recordings is not None and recordings.wanted and time.monotonic() >= self._next_preparation:
            self._prepare(recordings)

    def _recordings(self) -> Recordings | None:
        """Those of steps, where some are still to be made."""
        graphs = self._runner.graphs
        return graphs.recordings if graphs is not None and graphs.recordings.missing else None

    def _prepare(self, recordings: Recordings) -> None:
        """Make one recording of a step, or a piece of what comes before all of them, and tell how far that is."""
        began = time.monotonic()
        if recordings.missing == recordings.total:
            self._recording_began = began
        piece = recordings.go_on()
        now = time.monotonic()
        self._next_preparation = now + WORK_SHARE * (now - began)
        self._control.progress(piece.phase, piece.done, piece.total)
        if not recordings.missing:
            log.info("recorded %d steps in %.1f s, between the work", recordings.total, now - self._recording_began)

    def _next_step(self) -> Step | None:
        received = self._steps.receive()
        if received is None:
            return None
        message = received[1]
        if isinstance(message, Step):
            return message
        if isinstance(message, ProtocolError):
            log.error("a frame on the steps link can't be read: %s", message)
        else:
            log.error("the steps link carried a %s", type(message).__name__)
        return None

    def _flush(self) -> None:
        while self._outbox and self._results.send(self._outbox[0]):
            self._outbox.popleft()
