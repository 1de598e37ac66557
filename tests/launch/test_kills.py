"""The rehearsal of lost hosts: its plan, what it compares, and two kills of a real run whose workdir is in a bucket."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

import pytest

from launch import kills
from launch.kills import Kill, differences, kill_as_planned, plan, supervised
from launch.rehearse import Processes
from tests.test_processes import command_of
from uwm_jax.benchmarking.fault_proxy import fault_proxy
from uwm_jax.files import as_place
from uwm_jax.training.goodput import CATEGORIES
from uwm_jax.training.telemetry.log import read_metrics


def test_a_plan_is_random_in_order_and_leaves_the_end_alone():
    planned = plan(10, 4, 100, start_seconds=20.0, step_seconds=0.5, seed=3)
    assert planned == plan(10, 4, 100, 20.0, 0.5, seed=3) != plan(10, 4, 100, 20.0, 0.5, seed=4)
    at_steps = [kill for kill in planned if kill.step is not None]
    assert len(at_steps) == 8 and [kill.step for kill in at_steps] == sorted(kill.step for kill in at_steps)
    assert all(1 <= kill.step <= 80 and 0 <= kill.delay <= 2.5 for kill in at_steps)
    assert {kill.victim for kill in planned} <= {0, 1, 2, 3} and len({kill.victim for kill in planned}) > 2


class Lines:
    """Stands for `Processes` of a run whose process 0 prints these lines, one at each look."""

    def __init__(self, *lines):
        self.lines, self._left = [[]], list(lines)
        self.popen = [self]

    def poll(self):
        return None if self._left else 0

    def look(self, _):
        if self._left:
            self.lines[0].append(self._left.pop(0))


def test_kills_come_in_the_start_that_they_are_meant_for(monkeypatch):
    """Also where a start is quicker, or steps are, than the plan took them for."""
    started, old = "supervisor: process 7 is started", ["step 3/9", "step 4/9"]
    run = Lines(started, "step 1/9", "step 2/9", *old, started, "step 3/9", "step 4/9", "step 5/9", *["step 6/9"] * 9)
    when = []
    monkeypatch.setattr(kills.time, "sleep", run.look)
    monkeypatch.setattr(kills.os, "kill", lambda pid, number: when.append((pid, number, len(run.lines[0]))))
    told = []
    assert kill_as_planned(run, [Kill(2, 0.0, 0), Kill(None, 1e9, 0), Kill(9, 0.0, 0)], told.append) == 2
    assert when == [(7, signal.SIGKILL, 3), (7, signal.SIGKILL, 7)] and "kill 2 of 3: SIGKILL to process 0" in told[1]


def run_at(folder, *lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_differences_are_named(tmp_path, monkeypatch):
    digests = {"alone": {"params/a": "1", "params/b": "2"}, "killed": {"params/a": "1", "params/b": "3"}}
    assets = {name: {"digests": {"arrays": arrays}} for name, arrays in digests.items()}
    monkeypatch.setattr(
        kills, "CheckpointReader", lambda d, step: type("Reader", (), {"assets": assets[d.parent.name]})
    )
    alone = run_at(tmp_path / "alone", {"step": 1, "loss": 0.5, "time/step": 3.0}, {"step": 2, "loss": 0.25})
    killed = run_at(tmp_path / "killed", {"step": 1, "loss": 0.5, "time/step": 4.0}, {"step": 2, "loss": 0.25})
    assert differences(alone, killed) == ["params/b: other bits"]
    other = run_at(tmp_path / "other", {"step": 1, "loss": 0.5000000000000001}, {"step": 3, "loss": 0.25})
    assert differences(alone, other) == [
        "step 2 is logged in one of both only",
        "step 3 is logged in one of both only",
        "step 1: loss is 0.5 alone, 0.5000000000000001 killed",
    ]


REQUEST_SECONDS, SAVE_SECONDS = 0.05, 25.0


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_under_supervisors_are_killed_twice_and_told_to_end_once(
    make_tiny_config, tmp_path, bucket, storage_emulator
):
    """In a bucket with 50 ms a request, and the same run left alone on a disk: all metrics are equal to the bit.

    SIGTERM to one process lets both save, which is durable within 25 s.
    """
    flags = command_of(make_tiny_config(), tmp_path)
    more = ("--config.total_steps=15", "--config.checkpoint.every=3", "--config.checkpoint.keep=3")

    def command(workdir):
        return [sys.executable, "-m", "uwm_jax.train", *flags(workdir, *more)]

    alone, killed = tmp_path / "alone", as_place(bucket) / "killed"
    with Processes(2, command(alone), os.environ) as processes:
        assert processes.wait(300) == [0, 0], processes.lines
    planned = [Kill(4, 0.0, 0), Kill(7, 0.0, 1), Kill(11, 0.0, 1, signal.SIGTERM)]
    times = []  # of the kills
    with fault_proxy(storage_emulator.url, delay=REQUEST_SECONDS) as proxy:
        began, command_line = time.time(), supervised(command(killed), restarts=5, pause=0.1)
        with Processes(2, command_line, os.environ | proxy.environ) as processes:
            assert kill_as_planned(processes, planned, lambda _: times.append(time.monotonic())) == 3
            while not (saved := [line for line in processes.lines[0] if "is saved; the same command" in line]):
                assert any(p.poll() is None for p in processes.popen), processes.lines
                time.sleep(0.02)
            seconds = time.monotonic() - times[-1]
            assert processes.wait(400) == [0, 0], processes.lines
        wall = time.time() - began

    assert differences(alone, killed) == []
    assert len(saved) == 1 and seconds < SAVE_SECONDS
    told = [[line for line in lines if line.startswith("supervisor: the command ended")] for lines in processes.lines]
    statuses = [[int(re.search(r"status (\d+)", line)[1]) for line in lines] for lines in told]
    assert statuses[0][0] == 137 and statuses[1][0] in (1, 134) and statuses[0][-1] == statuses[1][-1] == 143, told
    (last,) = read_metrics(killed / "metrics.jsonl")[-1:]
    spent = {name: last[f"time/{name}"] for name in CATEGORIES}
    assert spent["lost"] > 0 and spent["downtime"] > 0.2
    assert 0.5 * wall < sum(spent.values()) < wall
