"""Who goes first, who is let in, who is thrown out."""

from __future__ import annotations

from fast_inference.protocol.messages import Abort
from fast_inference.scheduler.policies import Priority

from .fake_executor import make_info, token_at
from .harness import Harness


def admitted(harness: Harness) -> list[int]:
    """Seeds in the order of their first admission."""
    return list(dict.fromkeys(admit.seed for step in harness.steps for admit in step.admit))


def test_fcfs_serves_in_the_order_of_arrival() -> None:
    harness = Harness(max_num_seqs=1)
    for key in (3, 1, 2):
        harness.submit(key, [key, 1], max_tokens=3, priority=key)
    harness.drain()
    assert admitted(harness) == [3, 1, 2]


def test_priority_serves_higher_numbers_first_and_ties_by_arrival() -> None:
    harness = Harness(max_num_seqs=1, scheduling_policy="priority")
    for key, priority in ((1, 1), (2, 10), (3, 1), (4, 10)):
        harness.submit(key, [key, 1], max_tokens=3, priority=priority)
    harness.drain()
    assert admitted(harness) == [2, 4, 1, 3]


def test_a_high_priority_request_preempts_when_every_slot_is_taken() -> None:
    harness = Harness(max_num_seqs=2, scheduling_policy="priority", run_ahead=2)
    for key in (1, 2):
        harness.submit(key, [key, 1], max_tokens=40)
    for _ in range(5):
        harness.step()
    before = len(harness.steps)
    harness.submit(9, [9, 1, 2], max_tokens=2, priority=5)
    harness.schedule()
    harness.step()
    assert [admit.seed for admit in harness.steps[before].admit] == [9]
    harness.drain()
    assert harness.ends[2].preemptions == 1 and harness.ends[1].preemptions == 0
    for key in (1, 2):
        assert harness.tokens[key] == [token_at(key, 2 + i, 100) for i in range(40)]


def test_a_high_priority_request_preempts_for_blocks_and_has_its_token_two_steps_later() -> None:
    harness = Harness(make_info(num_blocks=12), scheduling_policy="priority", run_ahead=2, enable_prefix_caching=False)
    for key in (1, 2, 3):
        harness.submit(key, [key] * 12, max_tokens=4)
    harness.step()
    harness.submit(9, [9] * 20, max_tokens=2, priority=5)
    steps = len(harness.steps)
    while not harness.tokens.get(9):
        assert harness.step()
    prefill = next(i for i, step in enumerate(harness.steps) if any(a.seed == 9 for a in step.admit))
    assert prefill - steps <= 2
    harness.drain()
    assert len(harness.ends) == 4


def test_an_equal_priority_preempts_nobody() -> None:
    harness = Harness(max_num_seqs=1, scheduling_policy="priority")
    harness.submit(1, [1, 1], max_tokens=20, priority=3)
    harness.step()
    harness.submit(2, [2, 1], max_tokens=3, priority=3)
    harness.drain()
    assert harness.ends[1].preemptions == 0


def test_a_stream_of_high_priorities_does_not_starve_a_low_one() -> None:
    harness = Harness(max_num_seqs=1, scheduling_policy="priority")
    harness.submit(0, [0, 1], max_tokens=3, priority=0)
    key = 0
    while 0 not in harness.ends:
        assert key < 200, "starved"
        key += 1
        harness.submit(key, [1, key % 50], max_tokens=3, priority=2)
        harness.now += Priority.AGEING_SECONDS / 10
        for _ in range(3):
            harness.step()
    assert harness.ends[0].finished - harness.ends[0].arrival < 3 * Priority.AGEING_SECONDS


def test_preemption_takes_the_lowest_priority_when_blocks_run_out() -> None:
    harness = Harness(make_info(num_blocks=12), scheduling_policy="priority", enable_prefix_caching=False)
    for key, priority in ((1, 5), (2, 0), (3, 5)):
        harness.submit(key, [key, 1, 2], max_tokens=22, priority=priority)
    harness.drain()
    assert harness.ends[2].preemptions > 0
    assert harness.ends[1].preemptions == harness.ends[3].preemptions == 0


def serve_unknown_lengths(policy: str) -> tuple[int, int]:
    """240 requests that may say 120 tokens and stop after 1 to 60, in a pool of 480 tokens. Returns how often one
    was thrown out and how many steps it took, the first 40 left out: their lengths are what is learned from."""
    vocab = 50_000
    harness = Harness(
        make_info(num_blocks=120, max_num_seqs=64, vocab_size=vocab),
        scheduling_policy=policy,
        enable_prefix_caching=False,
    )

    def serve(keys: range) -> int:
        before = len(harness.steps)
        for key in keys:
            last = token_at(key, 4 + key * 37 % 60, vocab)
            harness.submit(key, [key] * 4, max_tokens=120, stop_token_ids=(last,))
        harness.drain()
        assert {harness.ends[key].reason for key in keys} == {"stop"}
        return len(harness.steps) - before

    serve(range(40))
    steps = serve(range(40, 240))
    return sum(harness.ends[key].preemptions for key in range(40, 240)), steps


def test_memory_aware_preempts_far_less_than_fcfs_and_takes_hardly_more_steps() -> None:
    fcfs, aware = serve_unknown_lengths("fcfs"), serve_unknown_lengths("memory-aware")
    assert aware[0] * 10 < fcfs[0]
    assert aware[1] < 1.2 * fcfs[1]


def test_memory_aware_learns_that_outputs_are_shorter_than_they_may_be() -> None:
    harness = Harness(make_info(num_blocks=40, max_num_seqs=32), scheduling_policy="memory-aware")
    running = []
    for key in range(160):
        tokens = [token_at(key, 4 + i, 100) for i in range(4)]
        harness.submit(key, [key % 100] * 4, max_tokens=100, stop_token_ids=(tokens[3],))
    while harness.step():
        running.append(len(harness.steps[-1].work_slots))
    assert max(running[60:]) > 8
    assert {end.reason for end in harness.ends.values()} == {"stop"}


def test_an_abort_of_many_waiting_requests_empties_the_queue() -> None:
    harness = Harness(max_num_seqs=1, scheduling_policy="priority")
    for key in range(300):
        harness.submit(key, [1, 2, 3], max_tokens=4, priority=key % 5)
    harness.step()
    harness.handle(Abort(keys=tuple(range(0, 300, 2))))
    harness.drain()
    reasons = [harness.ends[key].reason for key in range(300)]
    assert reasons.count("abort") == 150 and reasons.count("length") == 150
