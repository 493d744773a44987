"""The scheduler as a pure machine: `handle(message, now, sender) -> effects`, `schedule(now) -> Step | None`.

Owns every request's life from `Submit` to its one `StreamEnd`. Never reads a clock, opens a socket or logs by
itself: time is handed in, messages and log lines come out as effects. No message makes it raise, however little
sense it makes; `InvalidTransition` and `BrokenInvariant` are defects of this folder. Deterministic: the same calls
give the same effects.

Driving it without processes (a test, a benchmark, a replay):

    core = SchedulerCore(EngineConfig(model="m"))
    core.handle(ExecutorReady(info=info), now, "executor")
    core.handle(Submit(...), now, "frontend-0")
    while (step := core.schedule(now)) is not None:
        for effect in core.handle(result_of(step), now, "executor"): ...

with `result_of(step)` a `StepResult` of the same number whose `slots` are those of the step's work that reached
their last known token, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..protocol.config import EngineConfig
from ..protocol.errors import EngineError, Overloaded
from ..protocol.messages import (
    Abort,
    Attach,
    EngineInfo,
    ExecutorReady,
    GetStats,
    GetTimeline,
    Message,
    SequenceTimeline,
    Shutdown,
    Step,
    StepResult,
    StopFound,
    Submit,
    Timeline,
)
from .admission import Limits, limits_of, refusal, token_limit
from .batch import Batch
from .blocks import BrokenInvariant
from .outcome import Outcome, apply_result
from .planner import Planner
from .policies import make_policy
from .preemption import Preemptor
from .prefix import extend_hashes
from .request import REASONS, Request, RequestState, request_of
from .stats import Totals, snapshot
from .step_model import StepModel
from .stories import Stories
from .streams import Streams
from .swap import Rates, Swap
from .timeline import Waits, not_started

EXECUTOR = "executor"
DETOKENIZER = "detokenizer"
RETRY_AFTER_SECONDS = 1.0


@dataclass(slots=True, frozen=True)
class Send:
    """An effect: a message for "detokenizer" or a frontend by its name."""

    to: str
    message: Message


@dataclass(slots=True, frozen=True)
class Log:
    """An effect: a line for the log, at one of `logging`'s level names in lower case."""

    level: str
    text: str


Effect = Send | Log


class SchedulerCore:
    """See the head of this file. `config`: the engine's settings; what the executor turns out to be comes later.
    `rates`: by which to choose between copying and computing; None: as measured."""

    def __init__(self, config: EngineConfig, rates: Rates | None = None) -> None:
        self.config = config
        self._rates = rates
        self.step_model = StepModel()
        self.policy = make_policy(config, self.step_model)
        self.queue = self.policy.queue()
        self.totals = Totals()
        self.stories = Stories()
        self._waits = Waits()
        self.batch: Batch | None = None  # None until the executor is ready
        self._planner: Planner | None = None
        self._preemptor: Preemptor | None = None
        self._swap: Swap | None = None
        self._info: EngineInfo | None = None
        self._limits: Limits | None = None
        self._frontends: dict[str, None] = {}
        self._unchecked: dict[int, Request] = {}  # came before the executor was ready
        self._streams = Streams()
        self._last_number = 0
        self._effects: list[Effect] = []
        self._closing = False
        self._handlers: dict[type, Callable[[Any, float, str], None]] = {
            StepResult: self._on_result,
            Submit: self._on_submit,
            Abort: self._on_abort,
            StopFound: self._on_stop_found,
            GetStats: self._on_get_stats,
            GetTimeline: self._on_get_timeline,
            Attach: self._on_attach,
            ExecutorReady: self._on_executor_ready,
            Shutdown: self._on_shutdown,
        }

    # ---- the two calls -------------------------------------------------------------------------------------------

    def handle(self, message: Message, now: float, sender: str = "") -> list[Effect]:
        """Take one message in. `now`: `time.time()` seconds; `sender`: the peer's name on the `requests` link, ""
        on a link with one peer. Returns what is to be done, in order."""
        handler = self._handlers.get(type(message))
        if handler is None:
            return [Log("warning", f"{type(message).__name__} from {sender!r} is no message for the scheduler")]
        handler(message, now, sender)
        return self._take_effects()

    def schedule(self, now: float) -> Step | None:
        """The next step for the executor; None if as many are in flight as may be, or nothing can be computed
        before one of them comes back. What is returned counts as sent."""
        if self._planner is None or not self.may_plan:
            return None
        return self._planner.plan(now)

    @property
    def may_plan(self) -> bool:
        """Whether `schedule` would look for work; else it returns None and changes nothing."""
        batch = self.batch
        return batch is not None and len(batch.in_flight) < self.config.run_ahead and len(self._streams) > 0

    @property
    def idle(self) -> bool:
        """Whether no request is left, running or waiting."""
        return not len(self._streams)

    @property
    def waiting(self) -> int:
        return len(self.queue) + len(self._unchecked)

    def end_all(self, now: float) -> list[Effect]:
        """End every request as aborted: the engine stops."""
        for request in self._streams:
            self._finish(request, RequestState.ABORTED, now)
        return self._take_effects()

    def timelines(self, names: Iterable[str], now: float) -> tuple[SequenceTimeline, ...]:
        """What the sequences with one of `names` have done with their time so far (`Stories.tell`)."""
        return self.stories.tell(frozenset(names), self._streams, self.batch, now)

    def check(self) -> None:
        """Raise `BrokenInvariant` unless the books agree."""
        if self.batch is not None:
            self.batch.check()
            saved = self.batch.host.saved.keys()
            if not saved <= {request.number for request in self.queue.requests()}:
                raise BrokenInvariant("a request that does not wait holds host blocks")

    # ---- from the executor ---------------------------------------------------------------------------------------

    def _on_executor_ready(self, message: ExecutorReady, now: float, sender: str) -> None:
        """Also of a restarted one: nothing is on the device any more, so what ran waits again with its tokens."""
        info, config = message.info, self.config
        lost = self.batch
        if lost is not None and self._preemptor is not None:
            lost.acknowledge(lost.last_sent)
            for request in lost.table.running():
                self._preemptor.preempt(request.slot, now, by=None)
        self._info = info
        self.step_model.clear()  # it may be another device
        most_tokens = config.max_num_batched_tokens or info.max_num_batched_tokens
        self._limits = limits_of(info, None if config.enable_chunked_prefill else most_tokens)
        first_step = 1 if lost is None else lost.last_sent + 1
        slots = min(config.max_num_seqs, info.max_num_seqs)
        self.batch = Batch(info, slots, first_step, most_tokens)
        self._swap = swap = Swap(config.preemption, info, self.step_model, self._rates)
        self._preemptor = Preemptor(
            self.batch,
            self.queue,
            self.policy,
            swap,
            self.totals,
            self._waits,
            prefix_caching=config.enable_prefix_caching,
        )
        self._planner = Planner(
            config,
            self.batch,
            self.queue,
            self.policy,
            self._preemptor,
            swap,
            self.totals,
            self.step_model,
            self._waits,
        )
        if config.step_bound is not None:
            self._log("info", f"prompts are cut so that a step stays under {1000 * config.step_bound:g} ms")
        if lost is not None:
            self._check_again(info, self._limits, now)
        early, self._unchecked = self._unchecked, {}
        for request in early.values():
            self._check_in(request, now)
        for frontend in self._frontends:
            self._effects.append(Send(frontend, info))

    def _check_again(self, info: EngineInfo, limits: Limits, now: float) -> None:
        """A restarted executor may have less room than its predecessor, or blocks of another size."""
        for request in self.queue.requests():
            error: EngineError | None = refusal(request, limits)
            if error is None and len(request.tokens) >= token_limit(request, limits):
                error = Overloaded("the restarted executor has no room left for this request")
            if error is not None:
                self._finish(request, RequestState.FAILED, now, error=error)
                continue
            request.limit = token_limit(request, limits)
            if self.config.enable_prefix_caching:
                request.hashes.clear()
                extend_hashes(request.hashes, request.tokens, info.block_size, request.cache_salt)

    def _on_result(self, result: StepResult, now: float, sender: str) -> None:
        batch, preemptor = self.batch, self._preemptor
        if batch is None or preemptor is None or not batch.in_flight:
            self._log("warning", f"result of step {result.number}, but no step is in flight")
            return
        oldest = batch.in_flight[0].number
        if not oldest <= result.number <= batch.last_sent:
            self._log("warning", f"result of step {result.number}, but {oldest} to {batch.last_sent} are in flight")
            return
        while batch.in_flight and batch.in_flight[0].number < result.number:
            # the link keeps order, so that one will never be answered: its rows end with an error
            self._log("error", f"the executor passed over step {batch.in_flight[0].number}")
            empty = StepResult(number=batch.in_flight[0].number, slots=result.slots[:0], tokens=result.tokens[:0])
            self._apply(batch, preemptor, empty, now)
        self.totals.step_seconds = result.seconds
        self.totals.steps_to_record = result.steps_to_record
        if result.gap_seconds is not None:
            self.totals.gaps += 1
            self.totals.gap_seconds += result.gap_seconds
        record = batch.in_flight[0]
        self.step_model.observe(record.prefill_tokens, record.rows, record.context, result.seconds)
        if self._swap is not None:
            self._swap.copied(record.swapped_blocks, result.copy_seconds)
        self._apply(batch, preemptor, result, now)

    def _apply(self, batch: Batch, preemptor: Preemptor, result: StepResult, now: float) -> None:
        outcome = apply_result(batch, result, prefix_caching=self.config.enable_prefix_caching, now=now)
        if len(outcome.slots):
            self.totals.generation_tokens += len(outcome.slots)
            self.policy.generated(outcome.slots)
        for request, state, stop_reason in outcome.ended:
            self._finish(request, state, now, stop_reason=stop_reason)
        for request, error in outcome.failed:
            self._finish(request, RequestState.FAILED, now, error=error)
        for slot in outcome.spoiled:
            preemptor.preempt(slot, now, by=None)
        self._deliver(outcome)

    # ---- from frontends and the detokenizer ----------------------------------------------------------------------

    def _on_submit(self, submit: Submit, now: float, sender: str) -> None:
        if self._streams.keyed(sender, submit.key) is not None:
            # an end would reach the stream that has the key already
            self._log("warning", f"{sender!r} submitted key {submit.key} again while it is in use: ignored")
            return
        self._last_number += 1
        request = request_of(submit, self._last_number, now, sender)
        self._streams.open(request)
        full = self._refuse_for_now()
        if full is not None:
            self._finish(request, RequestState.REJECTED, now, error=full)
        elif self.batch is None:
            self._unchecked[request.number] = request
            not_started(request, now)
        else:
            self._check_in(request, now)

    def _refuse_for_now(self) -> Overloaded | None:
        most = self.config.max_num_queued_reqs
        if self._closing:
            return Overloaded("the engine is shutting down", retry_after=RETRY_AFTER_SECONDS)
        if self.waiting >= most:
            return Overloaded(
                f"{self.waiting} requests are waiting, the limit max_num_queued_reqs is {most}",
                retry_after=RETRY_AFTER_SECONDS,
            )
        return None

    def _check_in(self, request: Request, now: float) -> None:
        """A new request meets the limits of the engine, and joins the queue."""
        if self._limits is None or self._info is None or self.batch is None:
            return
        error: EngineError | None = refusal(request, self._limits)
        if error is not None:
            self._finish(request, RequestState.REJECTED, now, error=error)
            return
        request.limit = token_limit(request, self._limits)
        # the executor masks these before min_tokens; what is not in the vocabulary can't come up
        size = self._limits.vocab_size
        request.stop_token_ids = tuple(token for token in request.stop_token_ids if 0 <= token < size)
        if self.config.enable_prefix_caching:
            extend_hashes(request.hashes, request.tokens, self._info.block_size, request.cache_salt)
        error = self.policy.refuses(request, now, self.batch)
        if error is not None:
            self._finish(request, RequestState.REJECTED, now, error=error)
            return
        request.rank = self.policy.rank(request)
        self.policy.arrived(request)
        request.move(RequestState.WAITING, now)
        self._waits.joined(request, now)
        self.queue.push(request)

    def _on_abort(self, message: Abort, now: float, sender: str) -> None:
        for key in message.keys:
            request = self._streams.keyed(sender, key)
            if request is not None:  # else it has ended: the two crossed on the way
                self._finish(request, RequestState.ABORTED, now)

    def _on_stop_found(self, message: StopFound, now: float, sender: str) -> None:
        for number in message.numbers:
            request = self._streams.numbered(number)
            if request is not None:
                stopped = message.reason == "stop" and request.first_token  # what has said nothing has no stop string
                state = RequestState.STOPPED if stopped else RequestState.ABORTED
                self._finish(request, state, now)

    def _on_get_stats(self, message: GetStats, now: float, sender: str) -> None:
        stats = snapshot(self.totals, self.batch, waiting=self.waiting, token=message.token)
        self._effects.append(Send(sender, stats))

    def _on_get_timeline(self, message: GetTimeline, now: float, sender: str) -> None:
        told = self.timelines(message.request_ids, now)
        self._effects.append(Send(sender, Timeline(token=message.token, sequences=told)))

    def _on_attach(self, message: Attach, now: float, sender: str) -> None:
        self._frontends[sender] = None
        if self._info is not None:
            self._effects.append(Send(sender, self._info))

    def _on_shutdown(self, message: Shutdown, now: float, sender: str) -> None:
        """From now on nothing new is taken; what is under way goes on."""
        self._closing = True

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _finish(
        self,
        request: Request,
        state: RequestState,
        now: float,
        *,
        stop_reason: int | None = None,
        error: EngineError | None = None,
    ) -> None:
        """The one way out of every request: free what it holds, and say so once."""
        known, before = len(request.tokens), request.state
        request.move(state, now)
        if request.slot >= 0 and self.batch is not None:
            known = int(self.batch.table.length[request.slot])
            self.batch.leave(request.slot)
        elif before in (RequestState.WAITING, RequestState.PREEMPTED):
            self.queue.died(request)
            if self.batch is not None:
                self.batch.host.drop(request.number)
        if before != RequestState.NEW:
            self.policy.ended(request, known - request.num_prompt)
        self._unchecked.pop(request.number, None)
        self._waits.ended(request, now)
        self.stories.ended(request, known, now)
        self.totals.finished[REASONS[state]] += 1
        self._streams.end(request, known, now, stop_reason=stop_reason, error=error)

    def _deliver(self, outcome: Outcome | None = None) -> None:
        message = self._streams.deliver(outcome)
        if message is not None:
            self._effects.append(Send(DETOKENIZER, message))

    def _take_effects(self) -> list[Effect]:
        self._deliver()
        effects, self._effects = self._effects, []
        return effects

    def _log(self, level: str, text: str) -> None:
        self._effects.append(Log(level, text))
