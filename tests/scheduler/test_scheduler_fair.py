"""The `fair` policy: who has had how much, and that nobody's share depends on what others send."""

from __future__ import annotations

import pytest
from fast_inference.protocol.messages import Abort
from fast_inference.scheduler import fair
from fast_inference.scheduler.fair import Fair
from hypothesis import given, settings
from hypothesis import strategies as st

from .fake_executor import make_info
from .harness import Harness

BLOCKS, BLOCK_SIZE, LONGEST_PROMPT = 24, 4, 12
MOST_STARTS = 18  # between two looks: six slots, three steps ahead


def fair_harness(**config: object) -> Harness:
    return Harness(
        make_info(num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_model_len=60),
        scheduling_policy="fair",
        enable_prefix_caching=False,
        **config,
    )


def policy_of(harness: Harness) -> Fair:
    policy = harness.core.policy
    assert isinstance(policy, Fair)
    return policy


class Services:
    """The service each client has had, counted by the test itself from what went in and out."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.clients: dict[int, str] = {}  # by key
        self.prompts: dict[int, int] = {}
        self._steps = 0
        self._admitted: dict[str, int] = {}
        self._seen: set[int] = set()

    def submit(self, client: str, prompt: int, output: int) -> None:
        key = len(self.clients)
        self.clients[key], self.prompts[key] = client, prompt
        self.harness.submit(key, [key % 90] * prompt, max_tokens=output, client=client)

    def of(self, client: str) -> float:
        for step in self.harness.steps[self._steps :]:
            for admit in step.admit:
                if admit.seed not in self._seen:  # the seed is the key; only its first admission counts
                    self._seen.add(admit.seed)
                    name = self.clients[admit.seed]
                    self._admitted[name] = self._admitted.get(name, 0) + self.prompts[admit.seed]
        self._steps = len(self.harness.steps)
        said = sum(len(tokens) for key, tokens in self.harness.tokens.items() if self.clients[key] == client)
        return self._admitted.get(client, 0) + 2.0 * said

    def waiting(self, client: str) -> int:
        return sum(request.client == client for request in self.harness.core.queue.requests())


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.tuples(
        st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, 30)),
        st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, 30)),
    ),
    others=st.lists(st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, 20), st.integers(0, 60)), max_size=6),
    slots=st.integers(1, 6),
    run_ahead=st.integers(1, 3),
)
def test_the_service_of_two_backlogged_clients_differs_by_no_more_than_the_paper_says(
    shapes: tuple[tuple[int, int], tuple[int, int]],
    others: list[tuple[int, int, int]],
    slots: int,
    run_ahead: int,
) -> None:
    """Theorem 4.4: |W_f - W_g| <= 2 max(w_p L, w_q M) over any interval in which both are backlogged. The difference
    over an interval is that at its end less that at its start, so the widest is between the least and the most."""
    harness = fair_harness(max_num_seqs=slots, run_ahead=run_ahead)
    services = Services(harness)
    bound = 2 * max(LONGEST_PROMPT, 2 * BLOCKS * BLOCK_SIZE)
    least = most = 0.0
    for turn in range(80):
        for client, (prompt, output) in zip("ab", shapes, strict=True):
            assert not turn or services.waiting(client), "not backlogged"
            for _ in range(MOST_STARTS + 1 - services.waiting(client)):
                services.submit(client, prompt, output)
        for prompt, output, start in others:
            if start == turn:
                services.submit("c", prompt, output)
        harness.step()
        difference = services.of("a") - services.of("b")
        least, most = min(least, difference), max(most, difference)
        assert most - least <= bound


def test_a_client_that_floods_the_queue_does_not_hold_back_one_that_asks_now_and_then() -> None:
    harness = fair_harness(max_num_seqs=2)
    services = Services(harness)
    for _ in range(40):
        services.submit("loud", 8, 8)
    for _ in range(6):
        harness.step()
    services.submit("quiet", 8, 8)
    quiet = max(services.clients)
    harness.drain()
    ends = sorted(harness.ends, key=lambda key: harness.ends[key].finished)
    assert ends.index(quiet) < 8


def test_weights_share_the_service_in_their_proportion() -> None:
    harness = fair_harness(max_num_seqs=1, fair_weights={"a": 3.0})
    services = Services(harness)
    for _ in range(60):
        services.submit("a", 4, 6)
        services.submit("b", 4, 6)
    for _ in range(240):
        harness.step()
    assert services.of("a") / services.of("b") == pytest.approx(3.0, rel=0.15)


def test_idle_time_earns_no_credit() -> None:
    harness = fair_harness(max_num_seqs=1)
    services = Services(harness)
    for _ in range(20):
        services.submit("busy", 8, 8)
    for _ in range(100):
        harness.step()
    before = services.of("busy")
    for _ in range(20):
        services.submit("late", 8, 8)
    for _ in range(90):
        harness.step()
    # from then on they share: the late one is not served alone until it has caught up
    assert services.of("busy") - before > 0.3 * services.of("late") > 0


def test_an_idle_client_is_lifted_to_who_left_the_queue_last_when_nobody_waits() -> None:
    harness = fair_harness(max_num_seqs=4)
    services = Services(harness)
    services.submit("a", 8, 20)
    for _ in range(12):
        harness.step()
    policy = policy_of(harness)
    reached = policy.counter("a")
    services.submit("b", 8, 1)
    assert reached > 8 and policy.counter("b") >= reached


def test_clients_that_come_once_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "MAX_ACCOUNTS", 20)
    harness = fair_harness(max_num_seqs=2)
    services = Services(harness)
    for i in range(200):
        services.submit(f"client {i}", 2, 2)
        harness.step()
    harness.drain()
    assert len(policy_of(harness)._accounts._by_name) <= 20
    assert {end.reason for end in harness.ends.values()} == {"length"}


def test_aborts_of_waiting_requests_keep_the_queue_in_order() -> None:
    harness = fair_harness(max_num_seqs=1)
    services = Services(harness)
    for i in range(300):
        services.submit("abc"[i % 3], 3, 3)
    harness.step()
    harness.handle(Abort(keys=tuple(range(0, 300, 2))))
    assert len(harness.core.queue) == len(harness.core.queue.requests())
    harness.drain()
    reasons = [harness.ends[key].reason for key in range(300)]
    assert reasons.count("abort") == 150 and reasons.count("length") == 150


def test_when_blocks_run_out_the_client_with_the_most_service_gives_way() -> None:
    harness = Harness(make_info(num_blocks=12, max_num_seqs=4), scheduling_policy="fair", enable_prefix_caching=False)
    services = Services(harness)
    services.submit("greedy", 12, 30)
    for _ in range(6):
        harness.step()
    services.submit("modest", 12, 10)
    # lifted on arrival, so that it takes what it has said since to tell the two apart
    policy_of(harness)._accounts.of("modest").counter = 0.0
    harness.drain()
    assert harness.ends[0].preemptions > 0 and harness.ends[1].preemptions == 0
