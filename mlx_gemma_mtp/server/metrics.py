"""Prometheus metrics: what the server counts itself, and what the engine says when it is asked. Knows no HTTP."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..engine import EngineStats
from ..stats import SpecStats

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_DEEPEST = 8
_NAME = "mlx_gemma_mtp"


class Metrics:
    """The registry of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{_NAME}_http_requests", "HTTP requests answered.", ["route", "status"], registry=self.registry
        )
        self._ended = Counter(f"{_NAME}_outputs", "Outputs ended, by reason.", ["reason"], registry=self.registry)
        self._prompt = Counter(f"{_NAME}_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._tokens = Counter(f"{_NAME}_output_tokens", "Tokens given out.", registry=self.registry)
        self._first = _Histogram(
            "time_to_first_token_seconds", "From a request's submission to its first token.", _FIRST
        )
        self._between = _Histogram(
            "time_between_tokens_seconds",
            "Between a token and the one before; tokens of one round come together, 0 apart.",
            _BETWEEN,
        )
        for histogram in (self._first, self._between):
            self.registry.register(histogram)

    def follow(self, stats: Callable[[], EngineStats]) -> None:
        """Report the engine's own figures, too, as they are when the metrics are read."""
        self.registry.register(_EngineFigures(stats))

    def answered(self, route: str, status: int) -> None:
        """An HTTP request has got its answer."""
        self._requests.labels(route, str(status)).inc()

    def prompt_tokens(self, count: int) -> None:
        """A prompt was submitted."""
        self._prompt.inc(count)

    def tokens(self, count: int, waited: float, *, first: bool) -> None:
        """Tokens came together, `waited` seconds after the ones before, or after the submission."""
        self._tokens.inc(count)
        (self._first if first else self._between).observe(waited)
        self._between.observe(0.0, count - 1)

    def ended(self, reason: str) -> None:
        """An output has ended."""
        self._ended.labels(reason).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Histogram(Collector):
    """A histogram for one thread: several equal values at once, and no lock."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text, self._buckets = f"{_NAME}_{name}", text, buckets
        self._counts, self._sum = [0] * (len(buckets) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._buckets, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        buckets = [(bound, float(n)) for bound, n in zip(bounds, accumulate(self._counts), strict=True)]
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class _EngineFigures(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        stats = self._stats()
        gauges = {
            "rows": ("Rows of the batch in use.", stats.running),
            "waiting_requests": ("Requests that wait for a row.", stats.waiting),
            "paused_requests": ("Requests that gave their row up for want of memory.", stats.paused),
            "kv_bytes": ("Bytes of keys and values.", stats.kv_bytes),
            "kv_budget_bytes": ("The most that keys and values may take.", stats.kv_budget or 0),
            "prefix_cache_bytes": ("Bytes of prefixes kept for later.", stats.prefix_bytes),
            "peak_memory_bytes": ("The most memory that MLX has held.", stats.peak_memory),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"{_NAME}_{name}", text, value=value)
        counters = {
            "rounds": ("Rounds of the whole batch.", stats.rounds),
            "preemptions": ("Times that a row was given up for want of memory.", stats.preemptions),
            "prefilled_tokens": ("Prompt tokens computed.", stats.prefilled_tokens),
            "prefix_hits": ("Prompts that began with a prefix kept.", stats.prefix_hits),
            "prefix_tokens": ("Prompt tokens that such prefixes saved.", stats.prefix_tokens),
            "failed_steps": ("Steps that failed.", stats.failed_steps),
            "row_rounds": ("Rounds, counted for each row in them.", stats.spec.rounds),
            "drafted_tokens": ("Tokens drafted.", stats.spec.drafted),
            "accepted_tokens": ("Drafts accepted.", stats.spec.accepted),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"{_NAME}_{name}", text, value=value)
        yield _depths(stats.spec)
        for what, counts in (
            ("drafted", stats.spec.drafted_per_position),
            ("accepted", stats.spec.accepted_per_position),
        ):
            family = CounterMetricFamily(
                f"{_NAME}_{what}_by_position", f"Drafts {what}, by position.", labels=["position"]
            )
            for i, count in enumerate(counts):
                family.add_metric([str(i + 1)], count)
            yield family


def _depths(spec: SpecStats) -> Metric:
    """The depths chosen: a row's round is deeper than i where something was drafted at position i + 1."""
    deeper = [*spec.drafted_per_position, *[0] * _DEEPEST][:_DEEPEST]
    buckets = [(str(i), float(spec.rounds - count)) for i, count in enumerate(deeper)]
    text = "Depth of rounds, counted for each row in them: how many drafts it chose to verify."
    return HistogramMetricFamily(
        f"{_NAME}_depth", text, buckets=[*buckets, ("+Inf", float(spec.rounds))], sum_value=float(spec.drafted)
    )
