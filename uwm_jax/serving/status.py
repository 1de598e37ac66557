"""Counters and latencies of a server, for Prometheus, for its page, and for the line at its end."""

from __future__ import annotations

import bisect
import collections
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

# Upper bounds of the histograms' buckets, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# What may become of a request that was received whole.
ANSWERED, REFUSED, FAILED, GONE = "answered", "refused", "failed", "gone"
OUTCOMES = (ANSWERED, REFUSED, FAILED, GONE)
HANGS = 60.0  # seconds of one batch, after which the model counts as not running
FAILURES = 3  # batches in a row that failed, after which it does too
_KEPT = 1000  # requests whose latencies the page shows

_COMPILED = "/jax/core/compile/backend_compile_duration"
_compiled: list[float] = []  # seconds of each program


@functools.cache  # once: a listener stays for good
def _listen() -> None:
    def listener(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            _compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listener)


def compilations() -> int:
    """Programs that JAX compiled in this process since the first call of this function."""
    _listen()
    return len(_compiled)


class Histogram:
    """Counts of seconds by bucket, as Prometheus has them."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        upto = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            upto += count
            yield f'{name}_bucket{{le="{bound}"}} {upto}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {upto}"


class Status:
    """Counters of one server; called from its event loop alone."""

    def __init__(self) -> None:
        self.started = time.time()
        self.draining = False
        self.received = 0
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()  # (outcome, mode)
        self.open = 0
        self.connections = 0
        self.turned_away: collections.Counter[str] = collections.Counter()  # by HTTP status
        self.remarks = 0
        self.batches: collections.Counter[int] = collections.Counter()  # by number of requests
        self.failed_in_a_row = 0
        self.total, self.infer, self.waited = Histogram(), Histogram(), Histogram()
        self._latest: collections.deque[tuple[float, float]] = collections.deque(maxlen=_KEPT)
        self._compiled_before = compilations()

    def warmed(self) -> None:
        """Starts the count of compilations, which should stay 0."""
        self._compiled_before = compilations()

    def batch(self, seconds: float, waited: Sequence[float], failed: bool) -> None:
        """After a batch, as `Batcher` tells it."""
        self.batches[len(waited)] += 1
        self.infer.add(seconds)
        for each in waited:
            self.waited.add(each)
        self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0

    def done(self, outcome: str, mode: str, seconds: float, infer: float = 0.0) -> None:
        """After a request: its outcome, its use ("" where it could not be read), and seconds in total and in the
        model."""
        self.outcomes[outcome, mode] += 1
        if outcome == ANSWERED:
            self.total.add(seconds)
            self._latest.append((seconds, infer))

    def of(self, outcome: str) -> int:
        """Requests with an outcome."""
        return sum(count for (name, _), count in self.outcomes.items() if name == outcome)

    def unhealthy(self, busy_since: float | None) -> str:
        """Why the model does not run, "" where it does; `busy_since` as `Batcher` has it."""
        if self.draining:
            return "draining"
        if busy_since is not None and (seconds := time.perf_counter() - busy_since) > HANGS:
            return f"the model has been busy with one batch for {seconds:.0f} s"
        if self.failed_in_a_row >= FAILURES:
            return f"the last {self.failed_in_a_row} batches failed"
        return ""

    def summary(self) -> str:
        """A line for people."""
        counts = ", ".join(f"{self.of(outcome)} {outcome}" for outcome in OUTCOMES)
        return f"{self.received} requests received: {counts}"

    def to_json(self) -> dict[str, Any]:
        """The counters, and percentiles in ms over the last requests, for a page."""
        latest = np.array(self._latest).reshape(-1, 2) * 1000
        percentiles = {
            name: {f"p{p}": float(np.percentile(column, p)) for p in (50, 99)} if len(column) else {}
            for name, column in zip(("total_ms", "infer_ms"), latest.T, strict=True)
        }
        return {
            "uptime_s": time.time() - self.started,
            "draining": self.draining,
            "received": self.received,
            **{outcome: self.of(outcome) for outcome in OUTCOMES},
            "connections": self.open,
            "latency": percentiles | {"requests": len(latest)},
            "last_ms": latest[-50:, 0].tolist(),
            "batches": {str(size): count for size, count in sorted(self.batches.items())},
            "compilations": compilations() - self._compiled_before,
        }

    def prometheus(self, healthy: bool, cut: int = 0) -> str:
        """All counters in Prometheus' text format; `cut` as `Actor` counts it."""
        lines: list[str] = []

        def metric(name: str, kind: str, about: str, values: Iterator[str] | list[str]) -> None:
            lines.extend([f"# HELP uwm_serve_{name} {about}", f"# TYPE uwm_serve_{name} {kind}", *values])

        def one(name: str, kind: str, about: str, value: float) -> None:
            metric(name, kind, about, [f"uwm_serve_{name} {value}"])

        one("up", "gauge", "1 while the model runs.", int(healthy))
        one("draining", "gauge", "1 while the server drains.", int(self.draining))
        one("connections", "gauge", "Open connections.", self.open)
        one("connections_total", "counter", "Connections that were opened.", self.connections)
        turned = [f'uwm_serve_turned_away_total{{status="{s}"}} {n}' for s, n in sorted(self.turned_away.items())]
        metric("turned_away_total", "counter", "Connections that were refused, by HTTP status.", turned)
        one("received_total", "counter", "Requests that were received whole.", self.received)
        counts = [
            f'uwm_serve_requests_total{{outcome="{outcome}",mode="{mode}"}} {count}'
            for (outcome, mode), count in sorted(self.outcomes.items())
        ]
        metric("requests_total", "counter", "Requests by outcome and use.", counts)
        one("far_out_total", "counter", "Inputs far outside the range of the training data.", self.remarks)
        one("cut_total", "counter", "Values of actions that the stated limits cut.", cut)
        compiled = compilations() - self._compiled_before
        one("compilations_total", "counter", "Programs compiled after the warm-up.", compiled)
        sizes = [f'uwm_serve_batches_total{{requests="{size}"}} {n}' for size, n in sorted(self.batches.items())]
        metric("batches_total", "counter", "Batches by their number of requests.", sizes)
        for name, about, histogram in (
            ("request_seconds", "From a request received whole to its reply.", self.total),
            ("infer_seconds", "Of the model, a batch.", self.infer),
            ("wait_seconds", "From a request that was read to its batch.", self.waited),
        ):
            metric(name, "histogram", about, histogram.lines(f"uwm_serve_{name}"))
        return "\n".join(lines) + "\n"
