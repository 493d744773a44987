"""The scheduling policies by name: built-in ones, and those that other packages bring as entry points.

The short ones are here; `memory_aware.py`, `fair.py` and `deadline.py` have a file each. `policy.py` is the interface.
Owns the names and the loading; must not know steps or messages.
"""

from __future__ import annotations

from typing import ClassVar

from ..protocol.config import EngineConfig
from ..protocol.errors import StartupError
from ..protocol.policy_names import POLICY_GROUP, SchedulerPolicy, custom_policies, known_policies
from .deadline import Deadline
from .fair import Fair
from .memory_aware import MemoryAware
from .output_lengths import OutputLengths
from .policy import Policy
from .request import Request
from .step_model import StepModel


class FirstComeFirstServed(Policy):
    """vLLM's default: arrival order, admission as soon as the known tokens find blocks."""


class Priority(Policy):
    """Higher `priority` first, ties by arrival; a waiting request preempts running ones of lower priority.

    Ageing, as old as multi-level queues (Corbato et al., "An Experimental Time-Sharing System", 1962): each
    `AGEING_SECONDS` of waiting count as one level. Since all requests age alike, the order of two never changes, and
    rank is a constant: arrival - priority * AGEING_SECONDS. So a stream of requests of level p can hold one of level
    q back for (p - q) * AGEING_SECONDS at most. The same order decides preemption: what got in by age is not pushed
    out again by what it had overtaken.
    """

    AGEING_SECONDS: ClassVar[float] = 30.0
    eager = True

    def rank(self, request: Request) -> float:
        return request.arrival - request.priority * self.AGEING_SECONDS

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.priority > running.priority and waiting.order < running.order


class ShortestFirst(Policy):
    """Least predicted work first: prompt tokens, and the tokens that are likely to be generated.

    Shortest job first has the least mean waiting time (Schrage, "A Proof of the Optimality of the Shortest Remaining
    Processing Time Discipline", 1968); "Efficient LLM Scheduling by Learning to Rank" (Fu et al., 2024) shows it for
    LLM serving with predicted lengths. Predicted is the mean of the outputs that ended lately, at most what the
    request may generate. A prompt token costs far less than a generated one, which takes a row of a step of its own.

    Ageing: `SECONDS_PER_TOKEN` of waiting make up for one token of work, so rank is a constant, and a request of w
    tokens is overtaken only by those that come within w * SECONDS_PER_TOKEN after it.
    """

    SECONDS_PER_TOKEN: ClassVar[float] = 0.05
    PROMPT_WEIGHT: ClassVar[float] = 0.1  # of a prompt token, in generated ones

    def __init__(self, config: EngineConfig, steps: StepModel) -> None:
        super().__init__(config, steps)
        self._lengths = OutputLengths()

    def rank(self, request: Request) -> float:
        allowed = float(request.limit - request.num_prompt)
        output = min(allowed, self._lengths.mean) if self._lengths.enough else allowed
        return request.arrival + (self.PROMPT_WEIGHT * request.num_prompt + output) * self.SECONDS_PER_TOKEN

    def ended(self, request: Request, generated: int) -> None:
        self._lengths.ended(request, generated)


_POLICIES: dict[str, type[Policy]] = {
    SchedulerPolicy.FCFS: FirstComeFirstServed,
    SchedulerPolicy.PRIORITY: Priority,
    SchedulerPolicy.MEMORY_AWARE: MemoryAware,
    SchedulerPolicy.SHORTEST_FIRST: ShortestFirst,
    SchedulerPolicy.FAIR: Fair,
    SchedulerPolicy.DEADLINE: Deadline,
}


def make_policy(config: EngineConfig, steps: StepModel) -> Policy:
    """The policy that `config.scheduling_policy` names. Raises `StartupError` for one that can't be loaded or whose
    name is taken, naming the flag, the value and the known names."""
    name = config.scheduling_policy
    places = custom_policies().get(name, [])
    if len(places) + (name in _POLICIES) > 1:
        claims = [*(["this engine"] if name in _POLICIES else []), *(place.value for place in places)]
        raise StartupError(
            f"{_flag(name)} is claimed by {' and '.join(claims)}: uninstall one, or rename its entry point"
        )
    if not places:
        return _POLICIES[name](config, steps)
    try:
        cls = places[0].load()
    except Exception as error:  # a plug-in's import may raise anything
        raise StartupError(
            f"{_flag(name)} can't be loaded from {places[0].value!r}: {type(error).__name__}: {error}; known policies "
            f"are {', '.join(known_policies())}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise StartupError(
            f"{_flag(name)}: {places[0].value!r} is no subclass of fast_inference.scheduler.policy.Policy"
        )
    return cls(config, steps)


def _flag(name: str) -> str:
    return f"--scheduling-policy {name} (entry point group {POLICY_GROUP})"
