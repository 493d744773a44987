"""What a scrape of /metrics shows: vLLM's names under the prefix `fast_inference:`.

Owns this frontend's histograms and the page's text; gauges and totals come from the scheduler's `Stats`, what the
other frontends of the port have counted from their `FrontendFigures`, both handed in: the page is that of the whole
engine, whichever frontend is asked. Must not know sockets or HTTP. Observing is vectorised: one call a batch of text,
not one a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from ..protocol.config import EngineConfig
from ..protocol.messages import Distribution, EngineInfo, FrontendFigures, Stats, StreamEnd
from .submission import Request
from .table import Delivery

_Collect = Callable[[], Iterable[Metric]]
PREFIX = "fast_inference:"
REASONS = ("stop", "length", "abort", "error", "rejected")

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_COPIES = (1.0, 2.0, 5.0, 10.0, 20.0, 64.0)

_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Seconds from a request's arrival to its first token.", _FIRST),
    "inter_token_latency_seconds": ("Seconds between the tokens of a sequence.", _GAP),
    "request_time_per_output_token_seconds": ("Mean seconds per token after the first, by request.", _GAP),
    "e2e_request_latency_seconds": ("Seconds from a request's arrival to its end.", _WHOLE),
    "request_queue_time_seconds": ("Seconds that a request waited before it ran.", _WHOLE),
    "request_inference_time_seconds": ("Seconds from first running to the end.", _WHOLE),
    "request_prefill_time_seconds": ("Seconds from first running to the first token.", _WHOLE),
    "request_decode_time_seconds": ("Seconds from the first token to the end.", _WHOLE),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens of a request not found in the prefix cache.", _TOKENS),
    "request_params_n": ("The n that requests asked for.", _COPIES),
    "request_params_max_tokens": ("The max_tokens that requests asked for.", _TOKENS),
    "request_num_preemptions": ("How often a request was preempted.", (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)),
}


class Histogram:
    """Counts by bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.asarray(bounds)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0

    def observe(self, values: ArrayLike) -> None:
        """Count some values at once."""
        flat = np.atleast_1d(np.asarray(values, np.float64))
        if not flat.size:
            return
        places = np.searchsorted(self._bounds, flat)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += float(flat.sum())

    @property
    def distribution(self) -> Distribution:
        return Distribution(counts=self._counts.copy(), sum=self._sum)

    def plus(self, others: Iterable[Distribution]) -> Histogram:
        """One that has counted the others' values too. Those with other buckets than its own are passed over."""
        out = Histogram(self._bounds.tolist())
        for one in (self.distribution, *others):
            if len(one.counts) == len(out._counts):
                out._counts += one.counts
                out._sum += one.sum
        return out

    def buckets(self) -> list[tuple[str, float]]:
        names = [repr(b) for b in self._bounds.tolist()] + ["+Inf"]
        return list(zip(names, np.cumsum(self._counts).astype(float).tolist(), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


class Metrics:
    """The figures of one frontend."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._labels = {"model_name": config.model_name, "engine": "0"}
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._finished = dict.fromkeys(REASONS, 0)
        self._stats = Stats()
        self._info: EngineInfo | None = None
        self._others: Sequence[FrontendFigures] = ()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Page(self.collect))

    def submitted(self, request: Request) -> None:
        """A request goes to the scheduler."""
        self._histograms["request_params_n"].observe(request.params.n)
        if request.params.max_tokens is not None:
            self._histograms["request_params_max_tokens"].observe(request.params.max_tokens)

    def delivered(self, delivery: Delivery) -> None:
        """A batch of text has come."""
        self._histograms["time_to_first_token_seconds"].observe(delivery.first_waits)
        self._histograms["inter_token_latency_seconds"].observe(delivery.token_gaps)
        for end in delivery.ended:
            self._ended(end)

    def _ended(self, end: StreamEnd) -> None:
        self._finished[end.reason] = self._finished.get(end.reason, 0) + 1
        if end.reason not in ("stop", "length"):
            return
        seconds = {
            "e2e_request_latency_seconds": (end.arrival, end.finished),
            "request_queue_time_seconds": (end.arrival, end.first_scheduled),
            "request_inference_time_seconds": (end.first_scheduled, end.finished),
            "request_prefill_time_seconds": (end.first_scheduled, end.first_token),
            "request_decode_time_seconds": (end.first_token, end.finished),
        }
        for name, (start, stop) in seconds.items():
            if start > 0 and stop > 0:
                self._histograms[name].observe(max(0.0, stop - start))
        if end.completion_tokens > 1 and end.first_token > 0:
            per_token = max(0.0, end.finished - end.first_token) / (end.completion_tokens - 1)
            self._histograms["request_time_per_output_token_seconds"].observe(per_token)
        self._histograms["request_prompt_tokens"].observe(end.prompt_tokens)
        computed = max(0, end.prompt_tokens - end.cached_tokens)
        self._histograms["request_prefill_kv_computed_tokens"].observe(computed)
        self._histograms["request_generation_tokens"].observe(end.completion_tokens)
        self._histograms["request_num_preemptions"].observe(end.preemptions)

    def figures(self, live: int, token: int = 0) -> FrontendFigures:
        """What this frontend has counted. `live`: how many sequences of its own run."""
        histograms = {name: histogram.distribution for name, histogram in self._histograms.items()}
        return FrontendFigures(token=token, live=live, finished=dict(self._finished), histograms=histograms)

    def page(self, stats: Stats, info: EngineInfo | None, others: Sequence[FrontendFigures] = ()) -> bytes:
        """The text of /metrics, with the scheduler's `stats` of this moment and the other frontends' figures."""
        self._stats, self._info, self._others = stats, info, others
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics, for prometheus_client."""
        yield from self._gauges()
        yield from self._counters()
        names, values = list(self._labels), list(self._labels.values())
        for name, (text, _) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=names)
            others = [figures.histograms[name] for figures in self._others if name in figures.histograms]
            histogram = self._histograms[name].plus(others)
            family.add_metric(values, histogram.buckets(), histogram.sum)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        s = self._stats
        names, values = list(self._labels), list(self._labels.values())
        for name, text, value in (
            ("num_requests_running", "Requests in the running batch.", s.running),
            ("num_requests_waiting", "Requests that wait to run.", s.waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 1 is all.", s.utilization),
            (
                "kv_cache_fragmentation_perc",
                "Share of slots in used KV blocks that hold no token.",
                s.fragmentation,
            ),
            ("kv_blocks_free", "KV blocks that hold nothing.", s.free_blocks),
            ("kv_blocks_cached", "KV blocks kept for a prefix hit only.", s.cached_blocks),
            ("kv_blocks_used", "KV blocks that running requests hold.", s.used_blocks),
            ("host_kv_blocks", "KV blocks that host memory has room for.", s.host_blocks),
            ("host_kv_blocks_used", "Host KV blocks of preempted requests and of copies.", s.host_used_blocks),
            ("host_kv_blocks_cached", "Host KV blocks kept for a prefix hit only.", s.host_cached_blocks),
            ("step_seconds", "Seconds on the device of the last step.", s.step_seconds),
            ("steps_to_record", "CUDA graphs that are still to be made, between the work.", s.steps_to_record),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        facts = {
            "block_size": str(self._config.block_size),
            "num_gpu_blocks": str(s.num_blocks),
            "enable_prefix_caching": str(self._config.enable_prefix_caching),
            "gpu_memory_utilization": str(self._config.gpu_memory_utilization),
            "cache_dtype": self._info.dtype if self._info else "",
        }
        info = GaugeMetricFamily(PREFIX + "cache_config_info", "How the KV cache is set up.", labels=[*names, *facts])
        info.add_metric([*values, *facts.values()], 1.0)
        yield info

    def _counters(self) -> Iterator[Metric]:
        s = self._stats
        names, values = list(self._labels), list(self._labels.values())
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", s.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", s.prefix_hits),
            ("host_cache_hits", "Prompt tokens of prefix_cache_hits that came from host memory.", s.host_hits),
            ("num_preemptions", "Times that a running request was preempted.", s.preemptions),
            ("num_swap_preemptions", "Preemptions that copied to host memory what was computed.", s.swap_preemptions),
            ("swapped_out_blocks", "KV blocks copied from the device to the host.", s.swapped_out_blocks),
            ("swapped_in_blocks", "KV blocks copied from the host to the device.", s.swapped_in_blocks),
            ("prompt_tokens", "Prompt tokens processed.", s.prompt_tokens),
            ("generation_tokens", "Tokens generated.", s.generation_tokens),
            ("iterations", "Steps of the device.", s.steps),
            ("scheduled_tokens", "Tokens computed in all steps.", s.scheduled_tokens),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=names)
            counter.add_metric(values, value)
            yield counter
        gaps = SummaryMetricFamily(
            PREFIX + "device_gap_seconds", "Idle seconds of the device between two decode steps.", labels=names
        )
        gaps.add_metric(values, s.gaps, s.gap_seconds)
        yield gaps
        ended = CounterMetricFamily(
            PREFIX + "request_success", "Sequences that ended, by reason.", labels=[*names, "finished_reason"]
        )
        for reason, count in self._finished.items():
            total = count + sum(figures.finished.get(reason, 0) for figures in self._others)
            ended.add_metric([*values, reason], total)
        yield ended


class _Page:
    """prometheus_client's idea of a collector."""

    def __init__(self, collect: _Collect) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()
