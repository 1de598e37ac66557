"""The measurement of what telemetry costs runs, and says what it should."""

from __future__ import annotations

import math

import pytest

from uwm_jax.benchmark_overhead import benchmark

pytestmark = pytest.mark.slow


def test_both_loops_run_and_the_difference_is_told(make_tiny_config):
    config = make_tiny_config()
    config.batch_size = 16  # norms cost two operations a parameter whatever the batch, and a batch of 4 is no training
    result = benchmark(config, pairs=2, steps=3)
    assert result["bare_step_ms"] > 0 and result["step_ms"] > 0 and result["host_ms_per_step"] > 0
    for kind in ("wall", "cpu"):
        assert all(math.isfinite(x) for x in result[f"{kind}_overhead_percent"].values())
    assert result["compiled_bytes_percent"] > 0  # the bare program really lacks something
    assert result["compiled_flops_percent"] < 1
