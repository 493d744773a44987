"""What is measured: lists of requests as token ids, each with the time at which it arrives.

Owns the offline workloads, the arrival processes and the ratios that issue and documentation ask for. Must not know
engines, models' weights or how anything is timed.

Prompts are random ids, so that no engine is helped by what is in them. Lengths depend on the workload alone; ids also
on `seed`, so that a repeat is the same amount of work but finds nothing of the last one in a prefix cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from fast_inference.simulator import workload


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its prompt, how many tokens it wants, and when it comes (seconds after the start)."""

    prompt_token_ids: list[int]
    max_tokens: int
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of random requests: inclusive ranges of prompt and output tokens."""

    input_low: int
    input_high: int
    output_low: int
    output_high: int

    def draw(self, rng: random.Random, count: int) -> list[tuple[int, int]]:
        """`count` pairs of prompt and output length: all the prompts' first, then all the outputs'."""
        inputs = [self.input_low + int(rng.random() * (self.input_high - self.input_low + 1)) for _ in range(count)]
        outputs = [self.output_low + int(rng.random() * (self.output_high - self.output_low + 1)) for _ in range(count)]
        return list(zip(inputs, outputs, strict=True))


OFFLINE = ("single", "batch", "prefix", "long")

# Output tokens/s over the peer's on the same CPU, at least.
TARGET_RATIOS = {
    ("single", "transformers-generate"): 1.7,
    ("batch", "transformers-cb"): 4.5,
    ("batch", "transformers-generate"): 2.7,
    ("prefix", "transformers-generate"): 12.0,
    ("long", "transformers-generate"): 1.2,
}

BATCH_LENGTHS = Lengths(32, 256, 16, 128)
BATCH_SEED = 436_291  # its 64 pairs add up to 8,802 prompt and 4,542 output tokens, as in the peers' own figures
COMMON_PREFIX = 512


def offline_workload(name: str, vocab_size: int, seed: int, scale: float = 1.0) -> list[Request]:
    """The requests of workload `name`, all there at once.

    `scale` shortens every length (and nothing else): for trying the scripts out. Raises `ValueError` for a name that
    is none of `OFFLINE`.
    """
    if name == "single":
        return random_requests([(128, 128)], vocab_size, seed, scale)
    if name == "batch":
        return random_requests(BATCH_LENGTHS.draw(random.Random(BATCH_SEED), 64), vocab_size, seed, scale)
    if name == "prefix":
        common = random_requests([(COMMON_PREFIX, 1)], vocab_size, seed, scale)[0].prompt_token_ids
        own = random_requests([(16, 16)] * 64, vocab_size, seed + 1, scale)
        return [Request(common + request.prompt_token_ids, request.max_tokens) for request in own]
    if name == "long":
        return random_requests([(2048, 32)] * 4, vocab_size, seed, scale)
    raise ValueError(f"workload must be one of {', '.join(OFFLINE)}; got {name!r}")


def random_requests(
    lengths: list[tuple[int, int]],
    vocab_size: int,
    seed: int,
    scale: float = 1.0,
    arrivals: list[float] | None = None,
) -> list[Request]:
    """Requests of the given (prompt, output) lengths with random ids, at the given arrivals (or all at 0)."""
    rng = random.Random(seed)
    low = min(1000, vocab_size // 2)  # the first ids of a vocabulary are its special ones
    times = arrivals or [0.0] * len(lengths)
    return [
        Request([rng.randrange(low, vocab_size) for _ in range(scaled(prompt, scale))], scaled(output, scale), arrival)
        for (prompt, output), arrival in zip(lengths, times, strict=True)
    ]


def scaled(tokens: int, scale: float) -> int:
    """`tokens` times `scale`, at least 1."""
    return max(1, round(tokens * scale))


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Arrival times of a Poisson process of `rate` requests per second; an infinite rate puts all at 0."""
    if rate == float("inf"):
        return [0.0] * count
    rng = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    return times


def read_trace(path: Path, count: int, speed_up: float) -> tuple[list[float], list[tuple[int, int]]]:
    """The first `count` rows of a trace with the columns TIMESTAMP, ContextTokens and GeneratedTokens.

    Returns arrival times in seconds after the first one, divided by `speed_up`, and (prompt, output) lengths. Raises
    `ValueError` if the file has fewer rows, `InvalidRequest` if it is no trace.
    """
    trace = workload.read_trace(path)
    if len(trace) < count:
        raise ValueError(f"--num-prompts must be at most the {len(trace)} rows of {path}, got {count}")
    lengths = zip(trace.prompt[:count].tolist(), trace.output[:count].tolist(), strict=True)
    return (trace.arrival[:count] / speed_up).tolist(), list(lengths)
