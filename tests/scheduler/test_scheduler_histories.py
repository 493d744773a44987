"""Random histories: arrivals, aborts, stop ids, priorities, tiny pools. Whatever happens, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fast_inference.protocol.messages import Abort, Step, StopFound
from fast_inference.protocol.policy_names import SchedulerPolicy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fake_executor import make_info, token_at
from .harness import Harness

VOCAB = 20


@dataclass(frozen=True)
class Sequence:
    prompt: list[int]
    fields: dict[str, object]
    seed: int
    eos: tuple[int, ...]
    start: int  # the step before which it arrives
    abort: int | None  # the step before which it is aborted
    stop_found: int | None


def expected(sequence: Sequence, max_model_len: int) -> list[int]:
    """The tokens that the sequence must have if nobody interrupts it."""
    params = sequence.fields
    stops = set(params["stop_token_ids"]) | set(sequence.eos)  # type: ignore[call-overload]
    least = int(params["min_tokens"])  # type: ignore[call-overload]
    length = len(sequence.prompt)
    most = int(params["max_tokens"] or max_model_len - length)  # type: ignore[call-overload]
    tokens: list[int] = []
    while len(tokens) < most:
        token = token_at(sequence.seed, length + len(tokens), VOCAB)
        while len(tokens) < least and token in stops:
            token = (token + 1) % VOCAB
        tokens.append(token)
        if token in stops and len(tokens) > least:
            break
    return tokens


# Few different prompts that share their starts, so that the prefix cache has something to do.
prompts = st.builds(
    lambda shared, own: [i % 7 for i in range(shared)] + own,
    st.sampled_from([0, 3, 4, 8, 9, 16]),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
sequences = st.builds(
    lambda prompt, most, least, stops, priority, salt, client, deadline, seed, eos, start, abort, found: Sequence(
        prompt,
        {
            "max_tokens": most,
            "min_tokens": min(least, most),
            "stop_token_ids": stops,
            "priority": priority,
            "cache_salt": salt,
            "client": client,
            "deadline_ms": deadline,
        },
        seed,
        eos,
        start,
        abort,
        found,
    ),
    prompts,
    st.integers(1, 14),
    st.integers(0, 4),
    st.sampled_from([(), (3,), (1, 2, 5), tuple(range(0, 20, 2))]),
    st.integers(-1, 2),
    st.sampled_from(["", "", "salt"]),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from([None, 10, 100, 1000]),
    st.integers(0, 6),
    st.sampled_from([(), (0,), (4, 9)]),
    st.integers(0, 12),
    st.one_of(st.none(), st.none(), st.integers(0, 30)),
    st.one_of(st.none(), st.none(), st.integers(0, 30)),
)
engines = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(11, 24),
        "max_num_seqs": st.integers(1, 6),
        "run_ahead": st.integers(1, 3),
        "max_num_batched_tokens": st.sampled_from([1, 3, 5, 16, 64]),
        "max_step_ms": st.sampled_from([None, 4.0]),
        "enable_prefix_caching": st.booleans(),
        "enable_chunked_prefill": st.booleans(),
        "scheduling_policy": st.sampled_from(list(SchedulerPolicy)),
    }
)


def cost(step: Step) -> float:
    return 0.002 + 0.001 * int(step.work_counts.sum())


def play(
    work: list[Sequence],
    engine: dict[str, object],
    answers: list[bool],
    make: Callable[..., Harness] = Harness,
) -> Harness:
    engine = dict(engine)
    if not engine["enable_chunked_prefill"]:
        engine["max_num_batched_tokens"] = 64
        engine["max_step_ms"] = None
    info = make_info(
        num_blocks=engine.pop("num_blocks"), max_num_seqs=engine["max_num_seqs"], vocab_size=VOCAB, max_model_len=40
    )
    harness = make(info, **engine)
    for turn in range(3000):
        for key, sequence in enumerate(work):
            if sequence.start == turn:
                harness.submit(
                    key, list(sequence.prompt), seed=sequence.seed, eos=sequence.eos, **dict(sequence.fields)
                )
            if sequence.abort == turn:
                harness.handle(Abort(keys=(key,)))
            if sequence.stop_found == turn:
                harness.handle(StopFound(numbers=tuple(n for n, k in harness.keys.items() if k == key)), "detokenizer")
            harness.core.check()
        harness.now += 0.01
        harness.schedule()
        # now and then the device is slow, so that steps pile up; never for ever
        if harness.queue and (turn >= len(answers) or answers[turn]):
            harness.answer()
        if harness.core.idle and not harness.queue and turn > 40:
            return harness
    raise AssertionError("the history does not come to an end")


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sequences, min_size=1, max_size=10), engines, st.lists(st.booleans(), max_size=40))
def test_whatever_happens_every_request_ends_once_and_with_the_right_tokens(
    work: list[Sequence], engine: dict[str, object], answers: list[bool]
) -> None:
    harness = play(work, engine, answers, partial(Harness, cost=cost))
    for key, sequence in enumerate(work):
        end, tokens = harness.ends[key], harness.tokens[key]
        whole = expected(sequence, 40)
        if end.reason in ("stop", "length") and tokens != whole:
            assert sequence.stop_found is not None and end.reason == "stop"
        if end.reason == "abort":
            assert sequence.abort is not None or (sequence.stop_found is not None and not tokens)
        if end.reason == "rejected":
            assert end.code == "deadline_unreachable" and engine["scheduling_policy"] == "deadline"
        else:
            assert end.reason in ("stop", "length", "abort")
        assert tokens == whole[: len(tokens)]
    batch = harness.core.batch
    assert batch is not None and batch.pool.used == 0 and batch.num_running == 0
    assert all(log.level == "info" for log in harness.logs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sequences, min_size=1, max_size=8), engines)
def test_running_ahead_gives_the_same_streams(work: list[Sequence], engine: dict[str, object]) -> None:
    undisturbed = [Sequence(s.prompt, s.fields, s.seed, s.eos, s.start, abort=None, stop_found=None) for s in work]
    streams = [play(undisturbed, {**engine, "run_ahead": depth}, []).tokens for depth in (1, 2, 3)]
    assert streams[0] == streams[1] == streams[2]
