"""Sweeps from config to checkpoints, against runs of their own; killed, diverged, continued alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import sweep as launch_sweep
from launch.rehearse import Processes
from tests.training import small_run
from uwm_jax import cli
from uwm_jax import config as config_lib
from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.runs.loop import loop
from uwm_jax.sweeps import record, run
from uwm_jax.sweeps.members import groups, make_members
from uwm_jax.sweeps.records import SweepRecords
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.inference import load_for_inference
from uwm_jax.training.provenance import describe_use, read_starts

pytestmark = pytest.mark.slow

OVERRIDES = [
    {"loss.weights.action": 1.0, "seed": 0},
    {"loss.weights.action": 5.0, "seed": 1},
    {"optimizer.learning_rate": 1e30, "seed": 2},
]
NAMES = ["action=1,seed=0", "action=5,seed=1", "learning_rate=1e+30,seed=2"]
TIMINGS = ("samples_per_second", "data_wait_fraction", "goodput", "mfu", "time/")


def make_config(config):
    config.checkpoint.keep = 1
    config.log_every = 3
    return config


def sweep(config, directory: Path, overrides=OVERRIDES) -> list[str]:
    members = make_members(config, overrides)
    return run.run_sweep(
        directory, groups(members), lambda m: describe_use(["sweep"], m.config, list(m.overrides)), lambda *_: {}
    )


def lines_of(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]


def steps_of(workdir: Path) -> list[int]:
    return Checkpoints(workdir, read_only=True).steps()


def arrays_of(workdir: Path, step: int) -> list[bytes]:
    checkpoints = Checkpoints(workdir, read_only=True)
    items = sorted(checkpoints.items(step) & {"params", "ema_params", "train_state"})
    return [np.asarray(x).tobytes() for item in items for x in jax.tree.leaves(checkpoints.restore_arrays(step, item))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_tiny_config):
    """A sweep of three members that ran to its end, one of which diverged."""
    directory = tmp_path_factory.mktemp("sweep") / "all"
    assert sweep(make_config(make_tiny_config()), directory) == NAMES[2:]
    return directory


@pytest.fixture
def config(make_tiny_config):
    return make_config(make_tiny_config())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_tiny_config):
    """The second member as a single run."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(make_members(make_config(make_tiny_config()), OVERRIDES)[1].config, workdir)
    return workdir


def assert_alike(found, expected, steps):
    assert [line["step"] for line in found] == [line["step"] for line in expected] == steps
    for line, alone in zip(found, expected, strict=True):
        assert line.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-4 if "norm" in name else 1e-5, err_msg=name)


def test_members_train_as_alone(finished, alone):
    """Their losses are those of single runs with the data's seed of the sweep; members are ordinary workdirs."""
    workdir = finished / "members" / NAMES[1]
    assert_alike(lines_of(workdir), lines_of(alone), [1, 2, 3, 4, 6])
    assert config_lib.read(workdir).data.seed == 0 and config_lib.read(workdir).seed == 1
    assert read_starts(workdir)[0]["changed"] == {"loss.weights.action": 5.0, "seed": 1}
    system, params, _, step = load_for_inference(workdir)
    assert step == 6 and set(params) == {"obs_encoder", "noise_pred_net"}


def test_what_a_sweep_leaves_behind(finished):
    members = record.read(finished)
    assert list(members) == NAMES
    assert [m["status"] for m in members.values()] == ["done", "done", "diverged"]
    assert members[NAMES[0]]["overrides"] == {"loss.weights.action": 1.0, "seed": 0}
    assert members[NAMES[0]]["step"] == 6 and set(members[NAMES[0]]["last_losses"]) >= {"loss", "loss/action"}
    assert [steps_of(finished / "members" / name) for name in NAMES[:2]] == [[6], [6]]


def test_a_member_that_diverges_is_frozen_and_the_others_go_on(finished):
    """Its rate makes the parameters of the first step infinite, so that it has a line of that step and no checkpoint;
    `test_members_train_as_alone` and `test_program` compare the others with runs without it."""
    workdir = finished / "members" / NAMES[2]
    assert record.read(finished)[NAMES[2]]["step"] == 2 and latest_step(workdir) is None
    assert [line["step"] for line in lines_of(workdir)] == [1]


def config_file(folder: Path, config, overrides) -> Path:
    file = folder / "config.py"
    file.write_text(
        "from uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(config)!r}, 'test')\n"
        f"def get_members():\n    return {overrides!r}\n"
    )
    return file


def test_a_finished_sweep_is_left_alone_and_does_not_revive_the_diverged(finished, config, tmp_path, capsys):
    """The command exits with 1, as it did when the member diverged."""
    before = (finished / "members" / NAMES[0] / "metrics.jsonl").read_bytes()
    flags = [f"--config={config_file(tmp_path, config, OVERRIDES)}", f"--workdir={finished}"]
    assert cli.call(launch_sweep.main, ["sweep", *flags], launch_sweep.define_flags) == 1
    told = capsys.readouterr()
    assert "nothing to do" in told.out and f"1 of 3 members have diverged: {NAMES[2]}" in told.err
    assert record.read(finished)[NAMES[2]]["status"] == "diverged"
    assert (finished / "members" / NAMES[0] / "metrics.jsonl").read_bytes() == before
    for others in (OVERRIDES[:2], [*OVERRIDES, {"seed": 9}]):
        with pytest.raises(UserError, match="has other members"):
            sweep(config, finished, others)


KILLED = """
import os, signal, sys
from tests.sweeps.test_run import sweep
from uwm_jax import config as config_lib
from uwm_jax.runs.records import RunRecords

saved, original = [], RunRecords.save

def save(self, step, state):
    if step == 4 and saved.count(4):  # one member has its step 4, or is writing it; the next one is never asked
        self.checkpoints.wait()
        [records.wait() for records in others]
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(step)
    original(self, step, state)
    others.append(self)

others = []
RunRecords.save = save
config = config_lib.from_json(open(sys.argv[1]).read(), "test")
sweep(config, __import__("pathlib").Path(sys.argv[2]))
"""


def sigterm_at(step: int, patch: pytest.MonkeyPatch) -> None:
    add = SweepRecords.add

    def add_and_be_told(self, at, metrics):
        add(self, at, metrics)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(SweepRecords, "add", add_and_be_told)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_and_told_to_end_a_sweep_continues_from_the_step_that_all_hold(
    finished, config, tmp_path, capsys, caplog, monkeypatch
):
    """Killed between two saves with `keep=1`, the step before stays until all hold the next one. SIGTERM saves all.
    Lines and arrays are those of a sweep that was left alone, bit for bit."""
    directory, file = tmp_path / "killed", tmp_path / "config.json"
    file.write_text(config_lib.to_json(config))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file), str(directory)], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    first, second, third = (directory / "members" / name for name in NAMES)
    assert (steps_of(first), steps_of(second)) == ([2, 4], [2])

    began: list[int] = []
    with monkeypatch.context() as patch, jax.log_compiles():
        patch.setattr(run, "loop", lambda *given: began.append(len(caplog.messages)) or loop(*given))
        sigterm_at(5, patch)
        with pytest.raises(Preempted, match=r"told to end \(SIGTERM\): step 5 is saved") as told:
            sweep(config, directory)
    assert told.value.status == 143
    assert "step [4] is set aside" in capsys.readouterr().out and (first / "set_aside" / "4").is_dir()
    assert [m["status"] for m in record.read(directory).values()] == ["stopped", "stopped", "diverged"]
    assert steps_of(first) == steps_of(second) == [5]
    compiled = [[m for m in part if "Compiling jit(take)" in m] for part in split_at(began[0], caplog.messages)]
    assert len(compiled[0]) == 1 and not compiled[1], "saving compiles nothing: SIGTERM leaves little time"

    shutil.copytree(first / "checkpoints" / "5", third / "checkpoints" / "5")
    small_run.flip(small_run.largest_file(third / "checkpoints" / "5" / "params"))
    before = files_of(third / "checkpoints")
    assert sweep(config, directory) == NAMES[2:]
    assert files_of(third / "checkpoints") == before, "of a member that has diverged nothing is read or moved"
    for name in NAMES[:2]:
        assert lines_of(directory / "members" / name) == lines_of(finished / "members" / name)
        assert arrays_of(directory / "members" / name, 6) == arrays_of(finished / "members" / name, 6)


def split_at(place: int, lines: list[str]) -> tuple[list[str], list[str]]:
    return lines[:place], lines[place:]


@contextlib.contextmanager
def at_work(workdir: Path):
    """Another process holds the lock of a workdir; gives its number."""
    program = (
        "import sys; from pathlib import Path; from uwm_jax.training.checkpoints import lock;"
        f"lock.hold(Path({str(workdir)!r}));"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder.pid
    finally:
        holder.communicate("")


def test_members_start_from_another_run(finished, config, tmp_path):
    """All from the parameters that one of them had, so that their first losses differ by the weight alone."""
    config.init_from = str(finished / "members" / NAMES[1])
    config.total_steps = 2
    sweep(config, tmp_path, [{"loss.weights.action": weight} for weight in (1.0, 2.0, 3.0)])  # as many as `finished`
    one, two = (lines_of(tmp_path / "members" / f"action={weight}")[0] for weight in (1, 2))
    np.testing.assert_allclose(one["loss/action"], two["loss/action"], rtol=1e-6)
    np.testing.assert_allclose(two["loss"], one["loss"] + one["loss/action"], rtol=1e-5)
    fresh = lines_of(finished / "members" / NAMES[0])[0]["loss/action"]  # of the same draws and data
    assert not np.isclose(one["loss/action"], fresh, rtol=1e-4)
    assert config_lib.read(tmp_path / "members" / "action=1").init_from.endswith("@6")


def test_a_sweep_and_a_member_are_refused_while_the_other_is_at_work(finished, config, tmp_path):
    """`train` in a member's workdir finds the lock that its sweep holds; a sweep finds that of a member."""
    workdir = tmp_path / "members" / NAMES[0]
    workdir.mkdir(parents=True)
    with at_work(workdir) as pid, pytest.raises(RunError, match=rf"at work in .*{NAMES[0]} \(process {pid}"):
        sweep(config, tmp_path)
    member = make_members(config, OVERRIDES)[0]
    member.config.total_steps = 8
    workdir = finished / "members" / NAMES[0]
    with at_work(workdir) as pid, pytest.raises(RunError, match=rf"at work in .*{NAMES[0]}.* \(process {pid}"):
        train(member.config, workdir)
    assert latest_step(workdir) == 6


@pytest.mark.multihost
@pytest.mark.parametrize("devices", [2, 1])
def test_two_processes_train_members_as_one_does(devices, finished, config, tmp_path):
    """The command itself, with a member on each process, and with rows of both members on each."""
    file = config_file(tmp_path, config, OVERRIDES[:2])
    command = [sys.executable, "-m", "launch.sweep", f"--config={file}", f"--workdir={tmp_path / 'two'}"]
    command.append(f"--config.sweep.devices={devices}")
    with Processes(2, command, os.environ) as processes:
        assert processes.wait(400) == [0, 0], processes.lines
    assert sum("2 members in 1 program(s)" in "\n".join(lines) for lines in processes.lines) == 1, "one process speaks"
    for name in NAMES[:2]:
        found, expected = (lines_of(root / "members" / name) for root in (tmp_path / "two", finished))
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for line, alone in zip(found, expected, strict=True):
            np.testing.assert_allclose(line["loss"], alone["loss"], rtol=1e-5)
    assert [m["status"] for m in record.read(tmp_path / "two").values()] == ["done", "done"]


def test_a_member_continues_alone_and_the_sweep_does_not_move_it(finished, alone, config):
    """The last test of this file: it changes the sweep that the others read."""
    other, name = NAMES[:2]
    workdir, member = finished / "members" / name, make_members(config, OVERRIDES)[1]
    member.config.total_steps = 8
    train(member.config, workdir)
    train(member.config, alone)
    assert_alike(lines_of(workdir), lines_of(alone), [1, 2, 3, 4, 6, 8])
    assert steps_of(workdir) == [8]
    assert sweep(config, finished) == NAMES[2:], "all have made the sweep's steps"
    assert steps_of(workdir) == [8]
    config.total_steps = 10
    with pytest.raises(UserError, match=rf"no checkpoint of the same step.*{other}: \[6\]; {name}: \[8\]"):
        sweep(config, finished)
    assert [steps_of(finished / "members" / each) for each in (other, name)] == [[6], [8]]
    member.config.seed = 5
    with pytest.raises(UserError, match="config.seed is 5, but this workdir was started with 1"):
        train(member.config, workdir)
