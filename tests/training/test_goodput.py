"""Named wall time, with a clock that the test turns."""

from __future__ import annotations

import functools
import json
import math

import pytest

from uwm_jax.training.goodput import CATEGORIES, Goodput, duration
from uwm_jax.training.supervised import Start, Supervised


@pytest.fixture
def now(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr("uwm_jax.training.goodput.time.perf_counter", lambda: seconds[0])
    return seconds


def spend(goodput, now, category, seconds):
    with goodput.spend(category):
        now[0] += seconds


def times(rates):
    return {name: rates[f"time/{name}"] for name in CATEGORIES if rates[f"time/{name}"]}


def test_every_second_has_one_name(now):
    goodput = Goodput(total_steps=100, batch_size=8)
    now[0] += 5
    spend(goodput, now, "compile", 30)
    now[0] += 1
    goodput.begin(0)
    for _ in range(10):
        spend(goodput, now, "data_wait", 0.5)
        now[0] += 1.5
    first = goodput.rates(10)
    assert first["samples_per_second"] == pytest.approx(80 / 20)
    assert first["data_wait_fraction"] == pytest.approx(0.25)
    spend(goodput, now, "evaluation", 7)
    spend(goodput, now, "checkpoint", 3)
    spend(goodput, now, "other", 2)
    now[0] += 8
    rates = goodput.rates(20)
    assert times(rates) == {
        "start": 6, "compile": 30, "step": 23, "data_wait": 5, "evaluation": 7, "checkpoint": 3, "other": 2,
    }  # fmt: skip
    assert sum(times(rates).values()) == now[0] - 100
    assert rates["goodput"] == pytest.approx(23 / 76)
    # Evaluation and saves are no part of the speed; writing metrics is.
    assert rates["samples_per_second"] == pytest.approx(80 / 10) and rates["data_wait_fraction"] == 0
    json.dumps(rates, allow_nan=False)


def test_a_nested_category_is_taken_out_of_the_outer_one(now):
    goodput = Goodput(total_steps=10, batch_size=1)
    goodput.begin(0)
    with goodput.spend("evaluation"):
        now[0] += 2
        spend(goodput, now, "compile", 20)
        now[0] += 1
    now[0] += 4
    assert times(goodput.rates(1)) == {"evaluation": 3, "compile": 20, "step": 4}
    with pytest.raises(ValueError, match="unknown category 'evaluations'"), goodput.spend("evaluations"):
        pass


def test_a_category_ends_with_an_exception(now):
    goodput = Goodput(total_steps=10, batch_size=1)
    goodput.begin(0)
    with pytest.raises(KeyError), goodput.spend("checkpoint"):
        now[0] += 2
        raise KeyError
    now[0] += 1
    assert times(goodput.rates(1)) == {"checkpoint": 2, "step": 1}


def test_eta_holds_evaluation_and_saves_but_no_compilation(now):
    goodput = Goodput(total_steps=101, batch_size=8)
    spend(goodput, now, "compile", 300)
    goodput.begin(0)
    assert math.isnan(goodput.eta_seconds(0))
    now[0] += 2
    assert goodput.rates(1)["eta_seconds"] == pytest.approx(100 * 2)
    now[0] += 18
    spend(goodput, now, "evaluation", 10)
    spend(goodput, now, "checkpoint", 5)
    assert goodput.rates(10)["eta_seconds"] == pytest.approx(91 * (20 + 15) / 10)


def run_and_kill(now, saved_at=20, killed_at=27):
    """A start that is saved at step 20 and whose last line is that of step 25; returns (state, line)."""
    goodput = Goodput(total_steps=100, batch_size=8)
    now[0] += 10
    goodput.begin(0)
    state = line = None
    for step in range(1, killed_at + 1):
        now[0] += 2
        if step % 5 == 0:
            line = {"step": step, **goodput.rates(step)}
        if step == saved_at:
            spend(goodput, now, "evaluation", 20)
            state = json.loads(json.dumps(goodput.state(step)))
            spend(goodput, now, "checkpoint", 1)
    return state, line


def test_totals_and_eta_survive_a_kill_and_steps_done_again_are_lost(now):
    state, line = run_and_kill(now)
    now[0] += 1000  # until somebody starts it again
    goodput = Goodput(total_steps=100, batch_size=8)
    now[0] += 4
    goodput.begin(20, state, line)
    assert goodput.eta_seconds(20) == pytest.approx(80 * (2 + 20 / 20))  # before any step, the pace known before
    now[0] += 3
    rates = goodput.rates(21)
    # Between save and last line: the save itself and five steps.
    assert times(rates) == {"start": 14, "step": 43, "evaluation": 20, "lost": 11}
    assert rates["goodput"] == pytest.approx(43 / 88)
    assert rates["samples_per_second"] == pytest.approx(8 / 3)
    assert rates["eta_seconds"] == pytest.approx(79 * (3 + 20 / 21))  # the new pace


def test_a_clean_stop_loses_nothing(now):
    state, _ = run_and_kill(now)
    goodput = Goodput(total_steps=100, batch_size=8)
    goodput.begin(20, state, None)
    now[0] += 2
    assert "lost" not in times(goodput.rates(21))


def test_a_run_killed_before_its_first_checkpoint_has_lost_all(now):
    _, line = run_and_kill(now)
    goodput = Goodput(total_steps=100, batch_size=8)
    goodput.begin(0, None, line)
    now[0] += 2
    assert times(goodput.rates(1)) == {"step": 2, "lost": 10 + 50 + 20 + 1}


def test_lost_time_adds_up_over_kills(now):
    state, line = run_and_kill(now)
    goodput = Goodput(total_steps=100, batch_size=8)
    goodput.begin(20, state, line)
    now[0] += 6
    line = {"step": 23, **goodput.rates(23)}
    again = Goodput(total_steps=100, batch_size=8)
    again.begin(20, state, line)  # killed again before another checkpoint
    assert again.state(20)["seconds"]["lost"] == pytest.approx(11 + 6)


def test_summary_for_people(now):
    goodput = Goodput(total_steps=10, batch_size=1)
    now[0] += 10
    goodput.begin(0)
    spend(goodput, now, "data_wait", 1)
    now[0] += 89
    assert goodput.summary() == "wall time 1:40: step 89.0 %, start 10.0 %, data wait 1.0 %"


def test_durations():
    assert [duration(s) for s in (45.2, 200, 3723, math.nan)] == ["0:45", "3:20", "1:02:03", "unknown"]


# --- Under a supervisor, whose clock counts from its first start at 100. ------------------------------------------


@pytest.fixture
def supervised_start(now, monkeypatch):
    """(*earlier starts) -> Goodput, told of it, of a start that begins now, whose imports have taken 2 s."""
    monkeypatch.setattr("uwm_jax.training.goodput.time.time", lambda: now[0])

    def start(*earlier):
        began, now[0] = now[0], now[0] + 2
        told = Supervised(100.0, began, tuple(Start(*x) for x in earlier))
        goodput = Goodput(100, 8)
        monkeypatch.setattr(goodput, "begin", functools.partial(goodput.begin, supervised=told))
        return goodput

    return start


def test_under_a_supervisor_times_add_up_to_its_clock(now, supervised_start):
    goodput = supervised_start()
    now[0] += 8
    goodput.begin(0)
    now[0] += 30
    state = json.loads(json.dumps(goodput.state(20)))  # at 140
    now[0] += 5
    cut = {"step": 22, **goodput.rates(22)}  # of which no second counts twice
    now[0] += 5  # killed at 150
    first = (100, now[0], 137)
    now[0] += 5
    second = (now[0], now[0] + 13, 134)  # could not join the others
    now[0] += 13 + 10
    goodput = supervised_start(first, second)
    now[0] += 3
    goodput.begin(20, state, cut)
    now[0] += 20
    found = times(goodput.rates(30))
    assert found == {"start": 10 + 5, "step": 30 + 20, "lost": 10 + 13, "downtime": 5 + 10}
    assert sum(found.values()) == now[0] - 100


def test_a_start_that_saved_as_it_was_told_has_lost_nothing(now, supervised_start):
    goodput = supervised_start()
    goodput.begin(0)
    now[0] += 30
    state = goodput.state(20)
    now[0] += 4
    ended = (100, now[0], 143)
    now[0] += 6
    again = (now[0], now[0] + 1, 143)  # told before its first step
    now[0] += 1 + 6
    goodput = supervised_start(ended, again)
    goodput.begin(20, state)
    assert times(goodput.rates(20)) == {"start": 4, "step": 30, "checkpoint": 4, "lost": 1, "downtime": 12}


def test_without_a_checkpoint_all_earlier_starts_are_lost(now, supervised_start):
    now[0] += 40
    goodput = supervised_start((100, 130, 137))
    goodput.begin(0)
    now[0] += 1
    assert times(goodput.rates(1)) == {"start": 2, "step": 1, "lost": 30, "downtime": 10}


def test_time_before_a_supervisor_is_not_its_own(now, supervised_start):
    """A run that was saved, and killed, a day before: its line tells what was lost, and nobody watched the day."""
    state = {"seconds": {"step": 50.0}, "seconds_per_step": 1.0, "at": 100.0 - 86400}
    cut = {"step": 60, "time/step": 57.0}
    goodput = supervised_start()
    goodput.begin(50, state, cut)
    assert times(goodput.rates(50)) == {"start": 2, "step": 50, "lost": 7}
    now[0] = 140.0
    goodput = supervised_start((100, 130, 137))
    goodput.begin(50, state)
    assert times(goodput.rates(50)) == {"start": 2, "step": 50, "lost": 30, "downtime": 10}
