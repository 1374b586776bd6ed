"""What the service counts and times, for Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fathom.engine.protocol import Chunk, Engine
from fathom.serve.job import Job

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One service's figures, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(engine))
        self._requests = Counter(
            "fathom_requests", "Requests answered.", ["method", "path", "code"], registry=self._registry
        )
        self._first = Histogram(
            "fathom_time_to_first_token_seconds",
            "From a request's start to its first token.",
            buckets=_FIRST,
            registry=self._registry,
        )
        self._between = Histogram(
            "fathom_inter_token_seconds",
            "From token to token of one answer; tokens that come together share the time.",
            buckets=_BETWEEN,
            registry=self._registry,
        )

    def answered(self, method: str, path: str, code: int) -> None:
        """Count an answer; `path` is a route's, not a client's spelling."""
        self._requests.labels(method, path, str(code)).inc()

    def arrived(self, job: Job, place: int, chunk: Chunk) -> None:
        """Time the tokens of a chunk."""
        if not chunk.token_ids:
            return
        now = time.monotonic()
        previous = job.last_token_at[place]
        job.last_token_at[place] = now
        if previous is None:
            self._first.observe(now - job.created_at)
        else:
            self._between.observe((now - previous) / len(chunk.token_ids))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    """The engine's own statistics, read when asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing beforehand: the engine need not be asked in order to be registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Levels and counters now."""
        now = self._engine.statistics()
        levels = {
            "running_requests": ("Requests being answered.", now.running),
            "waiting_requests": ("Requests in the queue.", now.waiting),
            "cache_blocks": ("Blocks of the KV cache.", now.cache_blocks),
            "cache_blocks_used": ("Blocks that running requests hold.", now.cache_blocks_used),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", now.prompt_tokens),
            "cached_prompt_tokens": ("Of them, found in the prefix cache.", now.cached_tokens),
            "completion_tokens": ("Tokens drawn.", now.completion_tokens),
            "drafted_tokens": ("Tokens that speculation proposed.", now.drafted_tokens),
            "accepted_tokens": ("Of them, accepted.", now.accepted_tokens),
        }
        for name, (meaning, value) in levels.items():
            yield GaugeMetricFamily(f"fathom_{name}", meaning, value=value)
        for name, (meaning, value) in counters.items():
            yield CounterMetricFamily(f"fathom_{name}", meaning, value=value)
