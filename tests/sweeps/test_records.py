"""Records of members that train together, with records of single runs that only note what they are asked for."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax import host_memory
from uwm_jax.runs.records import Measured
from uwm_jax.sweeps import record as record_lib
from uwm_jax.sweeps.program import ALIVE
from uwm_jax.sweeps.record import Record, read
from uwm_jax.sweeps.records import SweepRecords, host_bytes
from uwm_jax.training.metrics import Mean

NAMES = ["a", "b", "c"]
RATES = {"samples_per_second": 8.0, "data_wait_fraction": 0.0, "eta_seconds": 1.0}


class OfOne:
    """Stands for `RunRecords`."""

    total_steps = 10
    watch = SimpleNamespace(goodput=SimpleNamespace(rates=lambda step: dict(RATES)))
    evaluations = SimpleNamespace(headlines=lambda found: " measured")

    def __init__(self, name, done):
        self.name, self.done = name, done
        self.checkpoints = SimpleNamespace(delete_surplus=lambda: done.append(("delete", name)))
        self.lines = {}

    def mfu(self, samples_per_second):
        return {"mfu": samples_per_second / 100}

    def add(self, step, metrics):
        self.done.append(("add", self.name, step, float(metrics["loss"].value)))

    def evaluates(self, step):
        return step == 4

    def measure(self, step, state):
        self.done.append(("measure", self.name, state))
        return Measured({"loss": 1.0, "loss/action": 0.5, "grad_norm": 2.0}, {}, {})

    def write(self, step, found, rates):
        self.lines[step] = {**found.means, **rates}

    def save(self, step, state):
        self.done.append(("save", self.name, step))

    def wait(self):
        self.done.append(("wait", self.name))


class Sweep:
    """Stands for `SweepProgram`: members are rows."""

    def take(self, state, i):
        return state[i]

    def take_evaluated(self, state, i):
        return f"parameters of {NAMES[i]}"


@pytest.fixture
def made(tmp_path):
    """(records, what was done, records of each, the sweep's)."""
    done: list = []
    each = [OfOne(name, done) for name in NAMES]
    members = [SimpleNamespace(name=name, overrides={}) for name in NAMES]
    of_sweep = Record(tmp_path, members, [NAMES], ["sweep"])
    return SweepRecords(NAMES, each, [True] * 3, Sweep(), of_sweep), done, each, of_sweep


def step_metrics(losses, alive):
    losses = jnp.asarray(losses)
    return {"loss": Mean(losses), "grad_norm": Mean(losses), ALIVE: jnp.asarray(alive)}


STATE = np.zeros((3, 1000), np.float32)


def device_state():
    return jnp.asarray(STATE)


def test_older_checkpoints_go_once_all_have_the_newer_one(made, tmp_path):
    records, done, _, of_sweep = made
    records.save(4, device_state())
    assert [of_sweep.saved(name) for name in NAMES] == [0, 0, 0], "none is durable yet"
    records.wait()
    assert {name: member["saved"] for name, member in read(tmp_path).items()} == dict.fromkeys(NAMES, 4)
    waits = [("wait", name) for name in NAMES]
    assert done == [*waits, *(("save", name, 4) for name in NAMES), *waits, *(("delete", name) for name in NAMES)]
    done.clear()
    records.wait()
    assert done == waits, "nothing more to delete"


@pytest.mark.parametrize("copies", [1, 2, 3, None])
def test_as_many_members_are_copied_as_half_of_the_free_memory_holds(made, monkeypatch, capsys, copies):
    records, done, _, _ = made
    assert host_bytes(device_state()[0]) == 4000
    free = None if copies is None else 8000 * max(1, copies) - (copies == 1)  # one is copied always
    monkeypatch.setattr(host_memory, "available", lambda: free)
    for step in (4, 8):
        done.clear()
        records.save(step, device_state())
        order = [("save" if kind == "save" else "wait", name) for kind, name, *_ in done[3 + (step == 8) * 3 :]]
        expected = [("save", name) for name in NAMES]
        if copies == 1:
            expected = [("save", "a"), ("wait", "a"), ("save", "b"), ("wait", "b"), ("save", "c")]
        if copies == 2:
            expected = [("save", "a"), ("save", "b"), ("wait", "a"), ("save", "c")]
        assert order == expected
    told = capsys.readouterr().out
    assert told.count(f"checkpoints of 3 members are written {copies} at a time") == (copies in (1, 2))


def test_a_line_of_a_member_and_what_is_evaluated(made, tmp_path):
    """Only what evaluations read is taken out of the state, and nothing where none is due."""
    records, done, each, _ = made
    records.report(2, device_state())
    assert done == [("measure", name, None) for name in NAMES]
    done.clear()
    records.report(4, device_state())
    assert done == [("measure", name, f"parameters of {name}") for name in NAMES]
    assert each[1].lines[4] == {"loss": 1.0, "loss/action": 0.5, "grad_norm": 2.0, "mfu": 0.08, **RATES}
    assert record_lib.read(tmp_path)["b"]["last_losses"] == {"loss": 1.0, "loss/action": 0.5}


def test_a_member_that_diverges_has_no_more_lines_and_checkpoints(made, tmp_path, capsys):
    """Its last metrics are those of the step before; the others' are all there, whatever its own become."""
    records, done, each, of_sweep = made
    records.add(1, step_metrics([1.0, 2.0, 3.0], [True, True, True]))
    records.add(2, step_metrics([1.0, np.nan, 3.0], [True, False, True]))
    records.add(3, step_metrics([1.5, 5.0, 3.5], [True, False, True]))
    records.report(3, device_state())
    assert [x[1:] for x in done if x[0] == "add"] == [
        *(("a", 1, 1.0), ("b", 1, 2.0), ("c", 1, 3.0)),
        *(("a", 2, 1.0), ("c", 2, 3.0)),
        *(("a", 3, 1.5), ("c", 3, 3.5)),
    ]
    assert "b has diverged: its loss or gradient is not finite in step 2 (loss nan" in capsys.readouterr().out
    assert record_lib.read(tmp_path)["b"] == {"overrides": {}, "status": "diverged", "last_losses": {}, "step": 2}
    done.clear()
    records.save(3, device_state())
    records.wait()
    assert [x for x in done if x[0] != "wait"] == [("save", "a", 3), ("save", "c", 3), ("delete", "a"), ("delete", "c")]
    assert set(each[0].lines) == {3} and not each[1].lines and not records.is_over()


def test_nothing_is_saved_of_members_that_have_all_diverged(made):
    """Also if that is learnt only when they are to be saved."""
    records, done, _, of_sweep = made
    records.add(1, step_metrics([np.inf] * 3, [False] * 3))
    records.save(1, device_state())
    records.report(1, device_state())
    records.wait()
    assert {x[0] for x in done} == {"wait"} and records.is_over()
    assert [of_sweep.has_diverged(name) for name in NAMES] == [True] * 3


def test_members_that_get_more_steps_are_not_done_any_more(made, tmp_path, monkeypatch):
    """Else a supervisor takes a sweep that dies before it trains for one that is over."""
    *_, of_sweep = made
    monkeypatch.setattr("uwm_jax.sweeps.record.time.time", lambda: 5.0)
    assert of_sweep.open(["a", "b"]) == 5.0
    of_sweep.set("a", record_lib.DONE)
    of_sweep.set("b", record_lib.DIVERGED)
    monkeypatch.setattr("uwm_jax.sweeps.record.time.time", lambda: 9.0)
    assert of_sweep.open(["a"]) == 5.0 and of_sweep.open(["c"]) == 9.0
    assert {name: member["status"] for name, member in read(tmp_path).items()} == {
        "a": "waiting", "b": "diverged", "c": "waiting",
    }  # fmt: skip
