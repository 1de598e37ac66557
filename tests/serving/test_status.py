"""Counters in Prometheus' text format, and when a server counts as healthy."""

from __future__ import annotations

import re
import time

import jax
import jax.numpy as jnp
import pytest

from uwm_jax.serving.status import ANSWERED, FAILED, HANGS, REFUSED, Histogram, Status, compilations


def lines(text: str) -> dict[str, float]:
    """{name with labels: value} of Prometheus' text format; every metric has its help and its type above it."""
    found: dict[str, float] = {}
    declared: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in declared and kind in ("counter", "gauge", "histogram")
            declared[name] = kind
        elif not line.startswith("# HELP "):
            matched = re.fullmatch(r'([a-z_]+)((?:\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})?) ([0-9.e+-]+)', line)
            assert matched, line
            base = re.sub("_(bucket|sum|count)$", "", matched[1])
            assert matched[1] in declared or declared[base] == "histogram", line
            found[matched[1] + matched[2]] = float(matched[3])
    return found


def test_counters() -> None:
    status = Status()
    status.received = 3
    status.batch(0.02, [0.001, 0.002], failed=False)
    status.done(ANSWERED, "policy", 0.03, 0.02)
    status.done(REFUSED, "", 0.001)
    status.done(FAILED, "policy", 0.04)
    status.turned_away["401"] += 2
    found = lines(status.prometheus(True, cut=5))
    assert found["uwm_serve_up"] == 1 and found["uwm_serve_received_total"] == 3 and found["uwm_serve_cut_total"] == 5
    assert found['uwm_serve_requests_total{outcome="answered",mode="policy"}'] == 1
    assert found['uwm_serve_requests_total{outcome="refused",mode=""}'] == 1
    assert found['uwm_serve_turned_away_total{status="401"}'] == 2
    assert found['uwm_serve_batches_total{requests="2"}'] == 1
    assert found['uwm_serve_infer_seconds_bucket{le="0.01"}'] == 0
    assert found['uwm_serve_infer_seconds_bucket{le="0.025"}'] == found["uwm_serve_infer_seconds_count"] == 1
    assert found["uwm_serve_infer_seconds_sum"] == pytest.approx(0.02)
    assert found["uwm_serve_request_seconds_count"] == 1 and found["uwm_serve_wait_seconds_count"] == 2
    assert lines(status.prometheus(False))["uwm_serve_up"] == 0
    assert status.summary() == "3 requests received: 1 answered, 1 refused, 1 failed, 0 gone"
    told = status.to_json()
    assert told["latency"]["total_ms"] == {"p50": pytest.approx(30), "p99": pytest.approx(30)}
    assert told["received"] == 3 and told["answered"] == 1 and told["batches"] == {"2": 1}


def test_buckets_are_cumulative() -> None:
    histogram = Histogram()
    for seconds in (0.0005, 0.001, 0.0011, 99.0):
        histogram.add(seconds)
    found = list(histogram.lines("x"))
    assert found[:2] == ['x_bucket{le="0.001"} 2', 'x_bucket{le="0.0025"} 3']
    assert found[-3:] == ['x_bucket{le="+Inf"} 4', "x_sum 99.002600", "x_count 4"]


def test_when_the_model_does_not_run() -> None:
    status = Status()
    assert status.unhealthy(None) == "" and status.unhealthy(time.perf_counter()) == ""
    assert "busy with one batch for" in status.unhealthy(time.perf_counter() - HANGS - 1)
    for _ in range(3):
        assert status.unhealthy(None) == ""
        status.batch(0.1, [0.0], failed=True)
    assert status.unhealthy(None) == "the last 3 batches failed"
    status.batch(0.1, [0.0], failed=False)
    assert status.unhealthy(None) == ""
    status.draining = True
    assert status.unhealthy(None) == "draining"


def test_programs_that_are_compiled_are_counted() -> None:
    status = Status()
    jax.jit(lambda x: x * 3 + 1)(jnp.zeros(7))
    before = compilations()
    status.warmed()
    run = jax.jit(lambda x: jnp.sin(x) * 3 + 2)
    run(jnp.zeros(11)).block_until_ready()
    counted = compilations() - before
    assert counted >= 1 and status.to_json()["compilations"] == counted
    run(jnp.zeros(11)).block_until_ready()
    assert compilations() - before == counted
