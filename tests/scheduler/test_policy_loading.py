"""Policies by name: built in, or an entry point of another package. The page about it is held to what it says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from fast_inference.protocol import policy_names
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import InvalidRequest, StartupError
from fast_inference.protocol.policy_names import SchedulerPolicy
from fast_inference.scheduler.policies import make_policy
from fast_inference.scheduler.policy import Policy
from fast_inference.scheduler.step_model import StepModel

from .harness import Harness


class Newest(Policy):
    """Last come, first served."""

    def rank(self, request: object) -> float:
        return -request.number  # type: ignore[attr-defined]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Entry points of the group as name -> place, read anew in each test."""
    points: dict[str, str] = {}

    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name.split("#")[0], place, group) for name, place in points.items()]

    monkeypatch.setattr(policy_names, "entry_points", entry_points)
    policy_names.custom_policies.cache_clear()
    yield points
    monkeypatch.undo()
    policy_names.custom_policies.cache_clear()


@pytest.mark.parametrize("name", list(SchedulerPolicy))
def test_every_built_in_name_has_its_policy(name: str) -> None:
    assert isinstance(make_policy(EngineConfig(scheduling_policy=name), StepModel()), Policy)


def test_a_policy_of_another_package_is_named_like_a_built_in_one(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type(sys)("newest_policy")
    module.Newest = Newest  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "newest_policy", module)
    installed["newest"] = "newest_policy:Newest"
    harness = Harness(max_num_seqs=1, scheduling_policy="newest")
    for key in (1, 2, 3):
        harness.submit(key, [key, 1], max_tokens=2)
    harness.drain()
    assert [admit.seed for step in harness.steps for admit in step.admit] == [3, 2, 1]


def test_the_setting_is_checked_without_importing_the_policy(installed: dict[str, str]) -> None:
    installed["broken"] = "no_such_module:Policy"
    assert EngineConfig(scheduling_policy="broken").scheduling_policy == "broken"
    with pytest.raises(InvalidRequest, match=r"must be one of fcfs, .*deadline, broken; got 'brokn'"):
        EngineConfig(scheduling_policy="brokn")


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({"broken": "no_such_module:Policy"}, r"--scheduling-policy broken .*No module named.*known policies are fcfs"),
        ({"broken": "pathlib:NoSuchName"}, r"can't be loaded from 'pathlib:NoSuchName'"),
        ({"broken": "pathlib:Path"}, r"'pathlib:Path' is no subclass of"),
        ({"broken": "one:A", "broken#2": "two:B"}, r"claimed by one:A and two:B"),
        ({"fcfs": "mine:Fcfs"}, r"--scheduling-policy fcfs .* is claimed by this engine and mine:Fcfs"),
    ],
)
def test_a_policy_that_can_not_be_had_is_named_with_the_reason(
    installed: dict[str, str], points: dict[str, str], words: str
) -> None:
    installed.update(points)
    name = next(iter(points))
    with pytest.raises(StartupError, match=words):
        make_policy(EngineConfig(scheduling_policy=name), StepModel())


def test_the_policy_that_the_page_shows_does_what_it_says(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [(group, name, place)] = re.findall(r'entry-points\."(.*?)"\]\n(\S+) = "(.*?)"', page)
    assert group == policy_names.POLICY_GROUP
    module = type(sys)(place.split(":")[0])
    exec(compile(code, "docs/policies.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    installed[name] = place
    harness = Harness(max_num_seqs=1, scheduling_policy=name)
    for key, client in ((1, "batch-a"), (2, "batch-a"), (3, "alice")):
        harness.submit(key, [key, 1], max_tokens=6, client=client)
    harness.step()
    harness.submit(4, [4, 1], max_tokens=6, client="bob")
    harness.drain()
    served = [admit.seed for step in harness.steps for admit in step.admit]
    assert list(dict.fromkeys(served)) == [3, 4, 1, 2] and harness.ends[3].preemptions == 0
    harness.submit(5, [5, 1], max_tokens=30, client="batch-a")
    for _ in range(4):
        harness.step()
    harness.submit(6, [6, 1], max_tokens=2, client="carol")
    harness.drain()
    assert harness.ends[5].preemptions == 1 and harness.ends[6].finished < harness.ends[5].finished


def test_the_page_names_every_policy_and_every_question() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    for name in SchedulerPolicy:
        assert f"| `{name}` |" in page
    for method in (name for name in vars(Policy) if not name.startswith("_") and name != "eager"):
        assert re.search(rf"`{method}[`(]", page), f"docs/policies.md does not tell of {method}"
