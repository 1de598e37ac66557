"""Metrics between two log lines: means, ratios, last values, and the guard against NaN."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.training.metrics import Last, Mean, MetricAccumulator, NotFinite, Ratio


def metrics(loss, rate=0.1, bucket=(0.0, 0.0)):
    return {
        "loss": Mean(jnp.float32(loss)),
        "learning_rate": Last(jnp.float32(rate)),
        "loss/action/t0-24": Ratio(*jnp.asarray(bucket, jnp.float32)),
    }


def test_an_accumulator_averages_and_empties():
    accumulator = MetricAccumulator()
    for step, (loss, rate) in enumerate([(1.0, 0.1), (2.0, 0.2), (6.0, 0.3)], start=1):
        accumulator.add(step, metrics(loss, rate))
    means = accumulator.means()
    assert means["loss"] == 3.0 and means["learning_rate"] == pytest.approx(0.3)
    accumulator.add(4, metrics(5.0))
    assert accumulator.means()["loss"] == 5.0


def test_pairs_are_ratios_over_the_steps_and_rows_that_never_came_are_left_out():
    accumulator = MetricAccumulator()
    accumulator.add(1, metrics(1.0, bucket=(2.0, 1.0)))
    accumulator.add(2, metrics(1.0, bucket=(0.0, 0.0)))
    accumulator.add(3, metrics(1.0, bucket=(3.0, 4.0)))
    assert accumulator.means()["loss/action/t0-24"] == 1.0  # 5 / 5, not the mean of 2 and 0.75
    accumulator.add(4, metrics(1.0, bucket=(0.0, 0.0)))
    assert "loss/action/t0-24" not in accumulator.means()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reader", ["means", "check", "state"])
def test_an_accumulator_names_the_first_bad_step_and_metric(bad, reader):
    accumulator = MetricAccumulator()
    for step, loss in enumerate([1.0, bad, bad], start=7):
        accumulator.add(step, metrics(loss))
    with pytest.raises(NotFinite, match="step 8: loss is"):
        getattr(accumulator, reader)()


def test_a_bad_sum_of_rows_is_named_too():
    accumulator = MetricAccumulator()
    accumulator.add(3, metrics(1.0, bucket=(float("nan"), 2.0)))
    with pytest.raises(NotFinite, match="step 3: loss/action/t0-24 is nan"):
        accumulator.check()


def test_check_keeps_the_sums():
    accumulator = MetricAccumulator()
    accumulator.add(1, metrics(1.0))
    accumulator.check()
    accumulator.add(2, metrics(2.0))
    assert accumulator.means()["loss"] == 1.5


def test_an_accumulator_restored_anywhere_ends_with_the_same_bits():
    rng = np.random.default_rng(0)
    steps = [metrics(rng.normal() * 10 ** rng.uniform(-3, 3), rng.uniform(), rng.uniform(size=2)) for _ in range(11)]
    whole = MetricAccumulator()
    for step, m in enumerate(steps, start=1):
        whole.add(step, m)
    expected = whole.means()
    for cut in range(len(steps) + 1):
        first, second = MetricAccumulator(), MetricAccumulator()
        for step, m in enumerate(steps[:cut], start=1):
            first.add(step, m)
        second.restore(json.loads(json.dumps(first.state())))
        for step, m in enumerate(steps[cut:], start=cut + 1):
            second.add(step, m)
        assert second.means() == expected, cut


def test_an_accumulator_keeps_two_steps_in_flight(monkeypatch):
    fetched, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda m: fetched.append(float(m["loss"].value)) or get(m))
    accumulator = MetricAccumulator()
    for step in range(1, 6):
        accumulator.add(step, metrics(step))
        assert fetched == list(range(1, step - 1))
    assert accumulator.means()["loss"] == 3.0 and fetched == [1, 2, 3, 4, 5]


def test_a_bad_step_ends_the_run_before_the_next_line():
    accumulator = MetricAccumulator()
    accumulator.add(1, metrics(float("nan")))
    accumulator.add(2, metrics(1.0))
    with pytest.raises(NotFinite, match="step 1: loss is nan"):
        accumulator.add(3, metrics(1.0))
