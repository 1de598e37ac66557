"""Runs that are killed, told to end, that cannot save, or whose newest checkpoint is damaged: nothing changes but time.

What is killed is the real command in a process of its own, on a mixture of robot data and video without actions. What
continues is compared, line by line and bit by bit, with one run that was never stopped.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.systems.small import on_tiny_dataset, small_config
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step

STEPS, EVERY = 60, 5
TIMINGS = ("samples_per_second", "data_wait_fraction", "goodput", "mfu", "time/")


@pytest.fixture
def config(make_tiny_config):
    return make_config(make_tiny_config())


def make_config(config):
    config.total_steps, config.log_every = STEPS, 3
    config.checkpoint.every, config.checkpoint.keep = EVERY, 2
    if config.system != "dp":  # which refuses video without actions
        config.data.sources.robot = config_lib.source(weight=0.75)
        config.data.sources.video = config_lib.source(weight=0.25, use_actions=False)
    return config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, make_tiny_config):
    """The workdir of a run that was left alone."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(make_config(make_tiny_config()), workdir)
    assert data_iter(workdir)["weights"] == [[0, {"robot": 0.75, "video": 0.25}]]
    return workdir


class Run:
    """`python -m uwm_jax.train` in a process of its own."""

    def __init__(self, config, workdir: Path, *flags: str):
        self.workdir = workdir
        file = workdir.with_suffix(".config.py")
        file.write_text(
            "from uwm_jax import config\n"
            f"def get_config():\n    return config.from_json({config_lib.to_json(config)!r}, 'test')\n"
        )
        self.output = workdir.with_suffix(".out")
        command = [sys.executable, "-m", "uwm_jax.train", f"--config={file}", f"--workdir={workdir}", *flags]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def until(self, happens) -> None:
        """Waits for something to happen while the run is going on."""
        end = time.monotonic() + 240
        while not happens():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.002)

    def text(self) -> str:
        return self.output.read_text()

    def lines(self) -> int:
        return len(lines_of(self.workdir))

    def is_saving(self) -> bool:
        directory = self.workdir / "checkpoints"
        return directory.is_dir() and any("orbax-checkpoint-tmp" in p.name for p in directory.iterdir())


def lines_of(workdir: Path) -> list[dict]:
    """The lines of a run's metrics, without what was measured with a clock."""
    file = workdir / "metrics.jsonl"
    complete = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in complete]


@pytest.mark.slow
def test_a_killed_run_continues_as_if_nothing_had_happened(uninterrupted, config, tmp_path, capsys):
    assert_survives_kills(uninterrupted, config, tmp_path / "run", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dp", "gr1"])
def test_killed_runs_of_other_systems_continue_likewise(variant, tiny_dataset, tmp_path, capsys):
    config = make_config(on_tiny_dataset(small_config(variant), tiny_dataset))
    config.optimizer.ema_decay = 0.9
    train(config, tmp_path / "uninterrupted")
    assert_survives_kills(tmp_path / "uninterrupted", config, tmp_path / "run", capsys)


def assert_survives_kills(uninterrupted, config, workdir, capsys):
    """Killed between two saves and in the middle of one; each start reads with another number of threads."""
    with Run(config, workdir) as run:
        run.until(lambda: latest_step(workdir) is not None)
    assert run.process.returncode == -signal.SIGKILL
    first = latest_step(workdir)
    assert first < STEPS
    with (workdir / "metrics.jsonl").open("a") as file:  # lines beyond the checkpoint, the last one torn
        file.write(json.dumps({"step": STEPS - 1, "loss": 0.0}) + '\n{"step": 6')

    with Run(config, workdir, "--config.data.num_threads=3") as run:
        run.until(lambda: (latest_step(workdir) or 0) > first and run.is_saving())
    assert run.process.returncode == -signal.SIGKILL
    assert f"continuing from step {first}" in run.text()
    second = latest_step(workdir)
    assert first < second < STEPS

    config.data.num_threads = 2
    train(config, workdir)
    assert f"continuing from step {second}" in capsys.readouterr().out
    assert_same_run(workdir, uninterrupted)
    assert not any(not p.name.isdigit() for p in (workdir / "checkpoints").iterdir()), "leftovers are gone"


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_and_says_so(uninterrupted, config, tmp_path, capsys):
    """SIGTERM in the middle of a window of metrics: status 143 within 15 s, and nothing is lost."""
    workdir = tmp_path / "run"
    with Run(config, workdir, "--config.total_steps=100000") as run:
        run.until(lambda: run.lines() >= 3)
        run.process.terminate()
        assert run.process.wait(timeout=15) == 143
    step = latest_step(workdir)
    assert f"step {step} is saved" in run.text() and "Traceback" not in run.text()
    assert lines_of(workdir)[-1]["step"] <= step
    config.total_steps = max(STEPS, step + 1)
    train(config, workdir)
    assert f"continuing from step {step}" in capsys.readouterr().out
    before = [x for x in lines_of(uninterrupted) if x["step"] < STEPS]
    assert_same_lines(lines_of(workdir)[: len(before)], before)
    if config.total_steps == STEPS:
        assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_message(uninterrupted, config, tmp_path, capsys):
    workdir = tmp_path / "run"
    with Run(config, workdir, "--config.total_steps=100000") as run:
        run.until(lambda: latest_step(workdir) is not None)
        largest = max(p.stat().st_size for p in (workdir / "checkpoints").rglob("*") if p.is_file())
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
        assert run.process.wait(timeout=60) == 1
    message = run.text()[run.text().index("error: ") :].splitlines()
    assert len(message) == 1 and "Traceback" not in run.text() and "WARNING" not in run.text(), run.text()
    assert f"{workdir / 'checkpoints'}/" in message[0] and "File too large" in message[0]
    step = latest_step(workdir)
    assert step is not None and f"continues from step {step}" in message[0]
    json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    if step < STEPS:
        train(config, workdir)
        assert f"continuing from step {step}" in capsys.readouterr().out
        assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("item", ["params", "codec", "data_iter"])
def test_a_damaged_checkpoint_costs_its_steps_and_no_more(uninterrupted, config, tmp_path, item, capsys):
    """The newest one is set aside, loudly; from the one before the run comes to the same end."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    config.total_steps = STEPS + 1  # the newest must not be the last
    newest = workdir / "checkpoints" / str(STEPS) / item
    for file in (p for p in newest.rglob("*") if p.parent.name == "d" or p.name == "metadata"):
        content = bytearray(file.read_bytes())
        for i in range(len(content) // 2, len(content), 64):
            content[i] ^= 1
        file.write_bytes(content)
    train(config, workdir)
    said = capsys.readouterr()
    assert f"continuing from step {STEPS - EVERY}" in said.out
    assert f"warning: checkpoint {STEPS} is damaged" in said.err and f"checkpoints/{STEPS}/{item}" in said.err
    assert (workdir / "corrupt" / str(STEPS) / item).is_dir()
    assert_same_lines(lines_of(workdir)[:-1], lines_of(uninterrupted))
    assert digests(workdir) == digests(uninterrupted)


# --- what may change when a run continues --------------------------------------------------------------


# design.md: total steps, logging, evaluation and checkpoint cadence, mesh, compilation, mixture weights, data's place
MAY_CHANGE = {
    *("total_steps", "log_every", "trackers", "hang_seconds"),
    *(f"eval.{name}" for name in config_lib.flatten(config_lib.base().eval)),  # what is measured and drawn
    *("checkpoint.every", "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.keep_every"),
    *("checkpoint.keep_best", "checkpoint.keep_best_mode"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.slices", "mesh.rules"),
    *("sweep.members_at_once", "sweep.devices"),
    *("accumulation_steps", "compilation_cache_dir", "model.scan_blocks", "model.remat", "model.codec.microbatch"),
    "model.attention",
    *("data.num_threads", "data.read_ahead", "data.prefetch"),  # how fast the same rows are read
    *("data.path", "data.sources.robot.path", "data.sources.robot.weight"),
    *("data.ranges", "data.sources.robot.ranges"),  # whose content the data's state tells
    *("data.max_bad_records", "data.read_timeout_seconds"),  # how long damaged data are borne
}


def config_with_a_source():
    config = config_lib.base()
    config.data.sources = {"robot": config_lib.source(use_actions=False)}  # else loss.action_free has no effect
    config.optimizer.ema_decay = 0.9  # else optimizer.ema_warmup has none
    config.optimizer.schedule, config.optimizer.decay_steps = "wsd", 1  # else optimizer.decay_steps has none
    config.model.adaln = "low_rank"  # else model.adaln_rank has none
    return config


def test_only_what_leaves_the_numbers_alone_may_change():
    stored, now = config_with_a_source(), config_with_a_source()
    for name, value in config_lib.flatten(stored).items():
        node, field = now, name
        while "." in field:
            first, field = field.split(".", 1)
            node = node[first]
        changed = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else (value, 1)
        with node.ignore_type():
            node[field] = changed
        if name in MAY_CHANGE:
            config_lib.refuse_changed(now, stored)
        else:
            with pytest.raises(UserError, match=rf"config\.{name} is .*this workdir (was started with|is a uwm run)"):
                config_lib.refuse_changed(now, stored)
        with node.ignore_type():
            node[field] = value


def data_iter(workdir: Path) -> dict:
    """The data's state in the newest checkpoint."""
    return Checkpoints(workdir, read_only=True).newest_readable().data_iter


def digests(workdir: Path) -> dict:
    """Of every array of the last step that all runs here come to: equal digests, equal bits."""
    return Checkpoints(workdir, read_only=True).assets(STEPS)["digests"]["arrays"]


def assert_same_lines(found: list[dict], expected: list[dict]) -> None:
    assert [x["step"] for x in found] == [x["step"] for x in expected]
    for x, y in zip(found, expected, strict=True):
        assert {k: (x.get(k), y.get(k)) for k in x.keys() | y.keys() if x.get(k) != y.get(k)} == {}, x["step"]


def assert_same_run(workdir: Path, other: Path) -> None:
    assert_same_lines(lines_of(workdir), lines_of(other))
    assert latest_step(workdir) == STEPS and digests(workdir) == digests(other)
    assert data_iter(workdir) == data_iter(other)
