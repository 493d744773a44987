"""What was measured: one `Record` per request, and the figures made of them.

Owns the definitions of the figures, which are those of vLLM's serving benchmark under the same names. Must not know
engines or how the times came about.

TTFT: from arrival to the first token. TPOT: (last token - first token) / (tokens - 1). ITL: the gaps between the
events of a stream (an event may carry several tokens). E2EL: from arrival to the last token. Goodput: requests per
second that keep every limit given.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Record:
    """What became of one request. Times are seconds after the start of the run; `events` are its tokens' arrivals."""

    prompt_tokens: int
    arrival: float
    output_tokens: int = 0
    events: list[float] = field(default_factory=list)
    end: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.events[0] - self.arrival

    @property
    def e2el(self) -> float:
        return self.end - self.arrival

    @property
    def tpot(self) -> float | None:
        """None where there is only one token."""
        return (self.end - self.events[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None


METRICS = ("ttft", "tpot", "itl", "e2el")


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default. `values` must not be empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def samples(records: Sequence[Record]) -> dict[str, list[float]]:
    """Of the requests that succeeded: the values of each metric, in milliseconds."""
    done = [record for record in records if not record.error]
    return {
        "ttft": [record.ttft * 1e3 for record in done],
        "tpot": [tpot * 1e3 for record in done if (tpot := record.tpot) is not None],
        "itl": [(b - a) * 1e3 for record in done for a, b in zip(record.events, record.events[1:], strict=False)],
        "e2el": [record.e2el * 1e3 for record in done],
    }


def serving_figures(records: Sequence[Record], goodput: dict[str, float]) -> dict[str, Any]:
    """The figures of a run under load, named as vLLM's.

    `goodput`: limits in milliseconds by metric; with none, no goodput is given. A metric without a sample is left
    out.
    """
    done = [record for record in records if not record.error]
    duration = max((record.end for record in done), default=0.0)
    output = sum(record.output_tokens for record in done)
    prompt = sum(record.prompt_tokens for record in done)
    per_second = 1 / duration if duration else 0.0
    figures: dict[str, Any] = {
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration": duration,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) * per_second,
        "output_throughput": output * per_second,
        "total_token_throughput": (prompt + output) * per_second,
    }
    if goodput:
        figures["request_goodput"] = sum(keeps(record, goodput) for record in done) * per_second
    for metric, values in samples(records).items():
        if values:
            figures[f"mean_{metric}_ms"] = statistics.fmean(values)
            figures[f"median_{metric}_ms"] = statistics.median(values)
            figures[f"p99_{metric}_ms"] = percentile(values, 99)
    return figures


def keeps(record: Record, limits: dict[str, float]) -> bool:
    """Whether a request kept all limits (milliseconds by metric; a single token has no time per further token)."""
    own = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(own[metric] * 1e3 <= limit for metric, limit in limits.items())


def run_figures(records: Sequence[Record]) -> dict[str, float]:
    """The figures of one offline run. Raises `ValueError` if a request failed: such a run measures nothing."""
    failed = [record.error for record in records if record.error]
    if failed:
        raise ValueError(f"{len(failed)} of {len(records)} requests failed, the first with: {failed[0]}")
    seconds = max(record.end for record in records)
    output = sum(record.output_tokens for record in records)
    return {
        "seconds": seconds,
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "output_tokens": output,
        "output_tokens_per_second": output / seconds,
        "mean_ttft_ms": statistics.fmean(record.ttft for record in records) * 1e3,
    }
