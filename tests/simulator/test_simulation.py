"""Whole simulations: the same input gives the same figures, no token is lost, and every request ends once."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.simulator.comparison import chart, report, run_all, runs
from fast_inference.simulator.costs import Calibration
from fast_inference.simulator.simulation import Result, Setup, simulate
from fast_inference.simulator.workload import Workload, shaped
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = Calibration(
    name="made up", base=0.01, per_token=1e-4, per_row=1e-3, per_context=1e-6, num_blocks=64, max_model_len=512
)


def workload(*rows: tuple[float, int, int]) -> Workload:
    """Of (arrival, prompt, output)."""
    arrival, prompt, output = zip(*rows, strict=True)
    return Workload(
        arrival=np.array(arrival, np.float64),
        prompt=np.array(prompt, np.int64),
        output=np.array(output, np.int64),
        client=np.zeros(len(rows), np.int64),
        deadline=np.full(len(rows), np.inf),
    )


def setup(device: Calibration = DEVICE, *, replicas: int = 1, router: str = "least-loaded", **config: object) -> Setup:
    settings = {"model": "simulated", "max_num_seqs": 8, "max_num_batched_tokens": 256, **config}
    engine = EngineConfig(**settings)  # type: ignore[arg-type]
    return Setup(config=engine, calibration=device, replicas=replicas, router=router, max_tokens=120)


def crowd(count: int = 60, seed: int = 1) -> Workload:
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0, 5, count))
    rows = zip(
        arrival.tolist(), rng.integers(1, 200, count).tolist(), rng.integers(1, 100, count).tolist(), strict=True
    )
    return workload(*rows)


def test_one_request_takes_the_time_of_its_steps() -> None:
    result = simulate(setup(run_ahead=1), workload((0.0, 100, 3)))
    prefill = 0.01 + 100 * 1e-4 + 100e-6
    decode = [0.01 + 1e-3 + context * 1e-6 for context in (101, 102)]
    assert result.ledger.ttft[0] == pytest.approx(prefill)
    assert result.ledger.e2el[0] == pytest.approx(prefill + sum(decode))
    assert result.figures["mean_itl_ms"] == pytest.approx(sum(decode) / 2 * 1e3)
    assert result.figures["device_utilization"] == pytest.approx(1.0)


def test_what_lies_around_a_step_and_a_request_is_counted_once() -> None:
    around = Calibration(name="around", base=0.01, per_token=0, per_row=0, per_context=0, gap=0.002, request=0.005)
    result = simulate(setup(around, run_ahead=1), workload((0.0, 10, 2)))
    assert result.ledger.ttft[0] == pytest.approx(0.005 + 0.012)
    assert result.ledger.e2el[0] == pytest.approx(0.005 + 0.024)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "memory-aware", "shortest-first", "fair", "deadline"])
def test_the_same_input_gives_the_same_figures(policy: str) -> None:
    both = [simulate(setup(scheduling_policy=policy), crowd()) for _ in range(2)]
    assert json.dumps(both[0].figures) == json.dumps(both[1].figures)
    assert np.array_equal(both[0].ledger.e2el, both[1].ledger.e2el)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), run_ahead=st.integers(1, 3), replicas=st.integers(1, 3), blocks=st.integers(20, 60))
def test_no_token_is_lost_and_every_request_ends(seed: int, run_ahead: int, replicas: int, blocks: int) -> None:
    requests = crowd(20, seed)
    engine = setup(replicas=replicas, run_ahead=run_ahead, num_blocks=blocks)
    result = simulate(engine, requests)
    assert result.ledger.ended == len(requests)
    assert result.figures["refused"] == 0
    assert np.array_equal(result.ledger.tokens, requests.output)
    gaps = int(result.ledger.gaps.counts.sum())
    assert gaps == int(requests.output.sum()) - len(requests)
    assert (result.ledger.ttft > 0).all() and (result.ledger.e2el >= result.ledger.ttft).all()


def test_a_short_pool_preempts_and_still_says_everything() -> None:
    result = simulate(setup(num_blocks=24), crowd())
    assert result.figures["preemptions"] > 0
    assert result.figures["total_output_tokens"] == int(crowd().output.sum())


def test_swapped_blocks_cost_their_copies_and_no_token() -> None:
    # a GiB is 1,024 blocks of the default size
    swapping = {"num_blocks": 24, "preemption": "swap", "kv_offloading_size": 1.0}
    free, dear = (
        simulate(setup(dataclasses.replace(DEVICE, per_copy=cost), **swapping), crowd()).figures for cost in (0.0, 0.01)
    )
    assert free["preemptions"] > 0
    assert free["total_output_tokens"] == dear["total_output_tokens"] == int(crowd().output.sum())
    assert dear["duration"] > free["duration"]


def test_under_priority_the_rarer_client_is_served_first() -> None:
    shared = shaped(crowd(), clients=2, seed=1)
    means = {
        policy: simulate(setup(scheduling_policy=policy, max_num_seqs=2), shared).figures["urgent_mean_ttft_ms"]
        for policy in ("fcfs", "priority")
    }
    assert means["priority"] < 0.5 * means["fcfs"]


def test_the_core_books_agree_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated device never leaves the core in a state that a real one would not."""
    from fast_inference.simulator import replica

    checked = 0

    class Checked(replica.SchedulerCore):
        def handle(self, *arguments: object) -> list[replica.Effect]:
            nonlocal checked
            effects = super().handle(*arguments)  # type: ignore[arg-type]
            self.check()
            checked += 1
            return effects

    monkeypatch.setattr(replica, "SchedulerCore", Checked)
    simulate(setup(num_blocks=24), crowd(30))
    assert checked > 100


def test_who_asks_for_more_than_fits_is_refused_and_counted() -> None:
    result = simulate(setup(), workload((0.0, 600, 5), (0.0, 10, 5)))
    assert (result.figures["refused"], result.figures["completed"]) == (1, 1)
    assert np.isnan(result.ledger.ttft[0])


def test_two_replicas_halve_the_work_of_each() -> None:
    burst = workload(*[(0.0, 100, 20)] * 32)
    one, two = (simulate(setup(replicas=count), burst).figures for count in (1, 2))
    assert two["duration"] < 0.6 * one["duration"]
    assert two["total_output_tokens"] == one["total_output_tokens"] == 640


def test_the_least_loaded_replica_takes_the_next_request() -> None:
    # a long answer holds the first replica; round robin sends every other request there all the same
    rows = [(0.0, 10, 110), *((0.5 * i, 200, 40) for i in range(1, 9))]
    by_load = simulate(setup(replicas=2, router="least-loaded"), workload(*rows))
    in_turn = simulate(setup(replicas=2, router="round-robin"), workload(*rows))
    assert by_load.ledger.e2el.sum() <= in_turn.ledger.e2el.sum()


def test_lengths_can_be_known_beforehand_as_where_the_end_is_ignored() -> None:
    exact = Setup(config=setup().config, calibration=DEVICE, max_tokens=None)
    result = simulate(exact, crowd())
    assert np.array_equal(result.ledger.tokens, crowd().output)
    assert result.figures["duration"] <= simulate(setup(), crowd()).figures["duration"] * 1.01


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"replicas must be in \[1, 4096\], got 0"):
        setup(replicas=0)
    with pytest.raises(InvalidRequest, match="router must be one of least-loaded, round-robin; got 'x'"):
        setup(router="x")
    with pytest.raises(InvalidRequest, match="max_tokens must be at least the longest answer, 300 tokens, got 120"):
        simulate(setup(), workload((0.0, 10, 300)))


def test_deadlines_and_shares_are_told_where_there_are_any() -> None:
    plain = simulate(setup(), crowd()).figures
    assert not {"deadlines", "jain_index"} & plain.keys()
    shared = shaped(crowd(), clients=3, deadline=(0.1, 2.0), seed=4)
    told = simulate(setup(), shared).figures
    assert told["deadlines"] == 60 and 0 <= told["deadlines_met"] <= 60
    weights = np.bincount(shared.client, shared.prompt + 2.0 * shared.output)
    assert told["service"] == pytest.approx(weights.tolist())
    assert 1 / 3 <= told["jain_index"] <= 1
    assert told["largest_service_gap"] >= 0


def compared(speed_ups: tuple[float, ...]) -> list[tuple[object, Result]]:
    chosen = list(runs(setup(), ["fcfs", "memory-aware"], speed_ups, lambda speed: shaped(crowd(20), speed_up=speed)))
    return run_all(chosen)  # type: ignore[return-value]


def test_a_comparison_runs_every_policy_at_every_speed_on_the_same_requests() -> None:
    done = compared((1.0, 4.0))
    told = report(done)  # type: ignore[arg-type]
    assert [(run["speed_up"], run["policy"]) for run in told["runs"]] == [
        (1.0, "fcfs"),
        (1.0, "memory-aware"),
        (4.0, "fcfs"),
        (4.0, "memory-aware"),
    ]
    assert told["calibration"]["name"] == "made up"
    assert {run["total_output_tokens"] for run in told["runs"]} == {int(crowd(20).output.sum())}


def test_the_chart_is_over_load_where_loads_differ_and_a_distribution_where_not() -> None:
    over_load = chart(compared((1.0, 4.0)))  # type: ignore[arg-type]
    assert [[x for x, _ in line.points] for line in over_load.lines] == [[1.0, 4.0]] * 2
    distribution = chart(compared((1.0,)))  # type: ignore[arg-type]
    shares = [y for _, y in distribution.lines[0].points]
    assert shares[0] == 0.0 and shares[-1] == 1.0 and shares == sorted(shares)
