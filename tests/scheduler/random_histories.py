"""A whole random life of a scheduler from one number: requests that share prompts, aborts, priorities, tiny pools on
device and host, rows that fail, executors that die.

Owns how a history is drawn, played and judged; the same seed is the same history on every machine. Must not know how
the scheduler decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from fast_inference.protocol.config import SchedulerPolicy
from fast_inference.protocol.messages import Abort
from fast_inference.scheduler.core import SchedulerCore
from fast_inference.scheduler.snapshot import freeze_core, thaw_core
from fast_inference.scheduler.swap import Rates

from .fake_executor import make_info, token_at
from .harness import Harness

VOCAB = 20
BLOCK_SIZE = 4
MAX_MODEL_LEN = 40
LONGEST_LIFE = 3000  # turns
NEVER, ALWAYS = Rates(prefill=1e9, copy=1.0), Rates(prefill=1.0, copy=1e9)  # copies are cheaper
BLOCK_BYTES = 1000
CLOSE = Rates(prefill=4.0, copy=2000.0)  # a copy there and back costs what four tokens cost


@dataclass(slots=True)
class Life:
    """One request of a history."""

    prompt: list[int]
    seed: int
    max_tokens: int
    stops: tuple[int, ...]
    priority: int
    salt: str
    start: int  # the turn in which it arrives
    abort: int | None  # in which it is aborted


@dataclass(slots=True)
class History:
    """What happens, and to which engine."""

    lives: list[Life]
    info: dict[str, int]
    settings: dict[str, Any]
    rates: Rates
    fails: float  # share of steps in which a row fails
    slow: float  # share of turns in which the device answers nothing
    deaths: set[int] = field(default_factory=set)  # turns in which the executor is replaced
    thaws: set[int] = field(default_factory=set)  # turns after which a core goes on that was made from a snapshot


def draw(seed: int) -> History:
    """The history with the number `seed`."""
    rng = Random(seed)
    host = rng.choice((0, 2, 5, 12, 40))
    info = {
        "num_blocks": rng.randint(10, 16),
        "max_num_seqs": rng.randint(1, 8),
        "num_host_blocks": host,
        "block_bytes": BLOCK_BYTES,
        "block_size": BLOCK_SIZE,
        "vocab_size": VOCAB,
        "max_model_len": MAX_MODEL_LEN,
    }
    chunked = rng.random() < 0.8
    settings = {
        "max_num_seqs": info["max_num_seqs"],
        "run_ahead": rng.randint(1, 3),
        "max_num_batched_tokens": rng.choice((3, 8, 16, 64)) if chunked else 64,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": rng.random() < 0.7,
        "scheduling_policy": str(rng.choice(tuple(SchedulerPolicy))),
        "preemption": rng.choice(("auto", "recompute", "swap") if host else ("auto", "recompute")),
        "kv_offloading_size": float(host),
    }
    lives = [_draw_life(rng) for _ in range(rng.randint(2, 9))]
    return History(
        lives,
        info,
        settings,
        rates=rng.choice((NEVER, ALWAYS, CLOSE)),
        fails=rng.choice((0.0, 0.0, 0.2)),
        slow=rng.choice((0.0, 0.5)),
        deaths={rng.randint(2, 30)} if rng.random() < 0.1 else set(),
        thaws={rng.randint(2, 30)} if rng.random() < 0.1 else set(),
    )


def _draw_life(rng: Random) -> Life:
    shared = [i % 7 for i in range(rng.choice((0, 3, 4, 8, 9, 16)))]
    return Life(
        prompt=shared + [rng.randint(0, 2) for _ in range(rng.randint(1, 6))],
        seed=rng.randint(0, 6),
        max_tokens=rng.randint(1, 16),
        stops=rng.choice(((), (), (3,), (1, 2, 5))),
        priority=rng.randint(-1, 2),
        salt=rng.choice(("", "", "salt")),
        start=rng.randint(0, 12),
        abort=rng.randint(0, 30) if rng.random() < 0.25 else None,
    )


def play(seed: int) -> Harness:
    """Play the history with the number `seed` to its end. An `AssertionError` of the harness, the fake executor or of
    here, or a `BrokenInvariant`, means that the scheduler is wrong; another that it hangs."""
    history, rng = draw(seed), Random(~seed)
    harness = Harness(make_info(**history.info), rates=history.rates, **history.settings)
    last = max([life.start for life in history.lives] + [0])
    for turn in range(LONGEST_LIFE):
        if turn <= 30:
            _happen(harness, history, turn)
        harness.now += 0.01
        harness.schedule()
        if harness.queue and rng.random() >= history.slow:
            failing = (rng.choice(harness.queue[0].work_slots.tolist()),) if rng.random() < history.fails else ()
            harness.answer(failing)
        if turn >= last and harness.core.idle and not harness.queue:
            _judge(harness, history)
            return harness
    raise AssertionError(f"the history does not come to an end within {LONGEST_LIFE} turns")


def _happen(harness: Harness, history: History, turn: int) -> None:
    if turn in history.thaws:
        core = SchedulerCore(harness.config)
        thaw_core(core, freeze_core(harness.core))
        harness.core = core
    if turn in history.deaths:
        harness.replace_device(harness.info)
    for key, life in enumerate(history.lives):
        if life.start == turn:
            harness.submit(
                key,
                life.prompt,
                seed=life.seed,
                max_tokens=life.max_tokens,
                stop_token_ids=life.stops,
                priority=life.priority,
                cache_salt=life.salt,
            )
        if life.abort == turn:
            harness.handle(Abort(keys=(key,)))
            harness.core.check()


def _judge(harness: Harness, history: History) -> None:
    """Every request has ended once, for a reason that it had, with the tokens that it must have."""
    for key, life in enumerate(history.lives):
        end, tokens, whole = harness.ends[key], harness.tokens[key], _expected(life)
        assert tokens == whole[: len(tokens)], f"request {key} says {tokens}, not {whole}"
        if end.reason == "abort":
            assert life.abort is not None
        elif end.reason == "error":
            assert history.fails, end.message
        else:
            assert end.reason in ("stop", "length") and tokens == whole
    batch = harness.core.batch
    assert batch is not None and batch.pool.used == 0 and batch.num_running == 0 and not batch.host.saved
    assert not harness.logs


def _expected(life: Life) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < life.max_tokens:
        tokens.append(token_at(life.seed, len(life.prompt) + len(tokens), VOCAB))
        if tokens[-1] in life.stops:
            break
    return tokens
