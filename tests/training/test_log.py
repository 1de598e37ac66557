"""metrics.jsonl, the progress line and the guard against NaN."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import pytest

from uwm_jax.training.log import Clock, MetricsLog, NotFinite, Window, progress_line


def metrics(loss, rate=0.1):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0), "learning_rate": jnp.float32(rate)}


def test_window_averages_and_empties():
    window = Window()
    for step, (loss, rate) in enumerate([(1.0, 0.1), (2.0, 0.2), (6.0, 0.3)], start=1):
        window.add(step, metrics(loss, rate))
    means = window.means()
    assert means["loss"] == 3.0 and means["learning_rate"] == pytest.approx(0.3)
    window.add(4, metrics(5.0))
    assert window.means()["loss"] == 5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_window_names_the_first_bad_step_and_metric(bad):
    window = Window()
    for step, loss in enumerate([1.0, bad, bad], start=7):
        window.add(step, metrics(loss))
    with pytest.raises(NotFinite, match="step 8: loss is"):
        window.means()


def test_lines_after_the_restored_step_are_cut(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # a crash in the middle of a line
    log = MetricsLog(tmp_path, 20)
    log.write(30, {"loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [10, 20, 30] and lines[-1]["loss"] == 7.0
    assert list((tmp_path / "tensorboard").iterdir())


def test_clock_and_progress_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("uwm_jax.training.log.time.perf_counter", lambda: now[0])
    clock = Clock(step=0, total_steps=101, batch_size=8)
    now[0] += 30  # compilation
    assert math.isnan(clock.tick(1, 2.0)["eta_seconds"])
    now[0] += 5
    now[0] += 10
    clock.pause(10)  # an evaluation
    rates = clock.tick(11, 3.0)
    assert rates["samples_per_second"] == pytest.approx(16)
    assert rates["data_wait_fraction"] == pytest.approx(0.2)
    assert rates["eta_seconds"] == pytest.approx(90 * 0.5)
    values = {"loss": 1.5, "loss/action": 1.0, "loss/next_obs": 0.5, **rates}
    line = progress_line(11, 101, values)
    for part in ("step 11/101", "loss 1.5000", "action 1.0000", "16.0 samples/s", "data wait 20 %", "ETA 0:45"):
        assert part in line
    assert "ETA 1:00:45" in progress_line(11, 101, values | {"eta_seconds": 3645.0})
