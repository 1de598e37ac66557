"""The rules of restarting, with a clock and a command that the test turns; two real processes for signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uwm_jax import supervision
from uwm_jax.errors import RunError
from uwm_jax.supervision import Supervisor, Workdir
from uwm_jax.training.supervised import Start, Supervised


class World:
    """A command that ends as it is told, on a clock that stands still otherwise.

    Args:
      ends: (seconds that it runs, exit status, what it does) of each start; what it does is called at its end.
    """

    def __init__(self, workdir, ends, restarts=5, pause=5.0):
        self.now, self.sent, self.told, self.waits = 1000.0, [], [], []
        self._ends = iter(ends)
        self.supervisor = Supervisor(
            self.start, Workdir(workdir), restarts, pause, clock=lambda: self.now, sleep=self.sleep
        )

    def start(self, variables):
        self.told.append(Supervised.from_environment(variables))
        self.send = self.sent.append
        return self

    def wait(self):
        seconds, status, do = next(self._ends)
        self.now += seconds
        do()
        self.waits.append(0.0)
        return status

    def sleep(self, seconds):
        self.now += seconds
        self.waits[-1] += seconds


def nothing():
    pass


def saves(workdir, step):
    return lambda: (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("status", [0, 2, 130])
def test_what_is_final_is_not_started_again(tmp_path, status):
    world = World(tmp_path, [(60, 137, nothing), (60, status, nothing)])
    assert world.supervisor.run() == status and len(world.told) == 2


@pytest.mark.parametrize("status", [1, 129, 134, 137, 139, 143])
def test_any_other_status_is_started_again(tmp_path, status):
    """Also 143 and 129, of a signal that only the command got."""
    world = World(tmp_path, [(60, status, nothing), (60, 0, nothing)])
    assert world.supervisor.run() == 0


def test_pauses_grow_up_to_the_bound_and_begin_anew_with_a_checkpoint(tmp_path, capsys):
    ends = [(9, 1, nothing), (9, 1, nothing), (9, 134, saves(tmp_path, 4)), *[(9, 137, nothing)] * 3]
    world = World(tmp_path, ends, restarts=3)
    with pytest.raises(RunError, match=r"status 137 after 0:09, .*\(newest: step 4\) after 3 restarts in a row"):
        world.supervisor.run()
    assert world.waits == pytest.approx([5, 10, 5, 10, 20, 0])
    assert "restart 1 of at most 3 until there is a newer one, in 5 s" in capsys.readouterr().err


def test_pauses_have_a_longest_and_a_checkpoint_before_the_first_start_is_not_new(tmp_path):
    saves(tmp_path, 4)()
    world = World(tmp_path, [(1, 1, saves(tmp_path, 2))] * 9, restarts=8)
    with pytest.raises(RunError, match="newest: step 4"):
        world.supervisor.run()
    assert world.waits == pytest.approx([5, 10, 20, 40, 80, 160, 300, 300, 0])


def test_the_bound_of_zero_starts_once(tmp_path):
    world = World(tmp_path, [(1, 1, saves(tmp_path, 2))], restarts=0)
    with pytest.raises(RunError):
        world.supervisor.run()


def test_a_signal_is_passed_on_and_ends_it(tmp_path):
    world = World(tmp_path, [(9, 1, nothing), (9, 143, lambda: world.supervisor.tell(signal.SIGTERM))])
    assert world.supervisor.run() == 143 and world.sent == [signal.SIGTERM]
    # Also where the command fails over it.
    world = World(tmp_path, [(9, 1, lambda: world.supervisor.tell(signal.SIGHUP))])
    assert world.supervisor.run() == 1 and world.sent == [signal.SIGHUP]


def test_a_signal_in_a_pause_ends_it_at_once(tmp_path):
    world = World(tmp_path, [(9, 1, nothing)])
    world.sleep = None
    world.supervisor._sleep = lambda seconds: world.supervisor.tell(signal.SIGINT)
    assert world.supervisor.run() == 130 and len(world.told) == 1


def test_a_signal_while_the_command_is_started_is_not_lost(tmp_path):
    world = World(tmp_path, [(9, 143, nothing)])
    start = world.start
    world.supervisor._start = lambda variables: (world.supervisor.tell(signal.SIGTERM), start(variables))[1]
    assert world.supervisor.run() == 143 and world.sent == [signal.SIGTERM]


def sweep_of(workdir, **statuses):
    members = {name: {"overrides": {}, "status": status, "last_losses": {}} for name, status in statuses.items()}
    return lambda: (workdir / "sweep.json").write_text(json.dumps({"members": members}))


def test_a_sweep_whose_members_have_all_ended_is_not_started_again(tmp_path):
    ends = [(9, 1, sweep_of(tmp_path, a="diverged", b="stopped")), (9, 1, sweep_of(tmp_path, a="diverged", b="done"))]
    world = World(tmp_path, ends)
    assert world.supervisor.run() == 1 and len(world.told) == 2


def test_a_checkpoint_of_any_member_of_a_sweep_is_new(tmp_path):
    sweep_of(tmp_path, a="training", b="training")()
    ends = [(9, 1, nothing), (9, 1, saves(tmp_path / "members" / "b", 2)), (9, 0, nothing)]
    world = World(tmp_path, ends, restarts=1)
    assert world.supervisor.run() == 0


def test_a_workdir_that_cannot_be_read_has_nothing_new(tmp_path, capsys):
    ends = [(9, 1, lambda: (tmp_path / "sweep.json").write_text("{"))] * 2
    with pytest.raises(RunError):
        World(tmp_path, ends, restarts=1).supervisor.run()
    assert "not JSON" in capsys.readouterr().err


def test_a_start_is_told_of_those_before(tmp_path):
    world = World(tmp_path, [(60, 1, nothing), (20, 134, nothing), (9, 0, nothing)])
    world.supervisor.run()
    assert [told.began for told in world.told] == pytest.approx([1000, 1065, 1095])
    assert world.told[0] == Supervised(1000, 1000)
    assert world.told[2].since == 1000
    assert world.told[2].earlier == (Start(1000, 1060, 1), Start(1065, pytest.approx(1085), 134))


# --- Real processes. ------------------------------------------------------------------------------------------

# Ends with 143 on SIGTERM, as a run that has saved; tells its pid.
PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open(sys.argv[1] + ".tmp", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(99)
"""


def supervise(folder, *flags):
    own = ("--workdir", str(folder), "--pause=0.05", *flags)
    command = [
        sys.executable,
        "-m",
        "uwm_jax.supervise",
        *own,
        "--",
        sys.executable,
        "-c",
        PROGRAM,
        str(folder / "pid"),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(supervision.__file__).parents[1])}
    return subprocess.Popen([*command, str(folder / "pid")], stderr=subprocess.PIPE, text=True, env=environment)


def started(folder):
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int((folder / "pid").read_text())
    (folder / "pid").unlink()
    return pid


def test_killed_it_comes_back_and_sigterm_to_the_supervisor_ends_both(tmp_path):
    with supervise(tmp_path) as supervisor:
        first = started(tmp_path)
        os.kill(first, signal.SIGKILL)
        second = started(tmp_path)
        supervisor.send_signal(signal.SIGTERM)
        told = supervisor.communicate(timeout=30)[1]
    assert supervisor.returncode == 143 and first != second
    assert "ended with status 137" in told and "supervisor: 2 starts in 0:0" in told and "Traceback" not in told


def test_the_command_does_not_outlive_a_supervisor_that_is_killed(tmp_path, ends):
    with supervise(tmp_path) as supervisor:
        pid = started(tmp_path)
        supervisor.kill()
        assert ends(pid)


def test_unusable_calls(tmp_path):
    def refused(*arguments):
        command = [sys.executable, "-m", "uwm_jax.supervise", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        return result.stderr

    assert "expected a command after --" in refused("--workdir=x")
    assert "has no --workdir" in refused("--", "true")
    assert "none/python: cannot be started: No such file" in refused("--", "none/python", "--workdir", str(tmp_path))
