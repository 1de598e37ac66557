"""A run in a bucket that is killed again and again, and started twice at once: its numbers are those of a whole one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax.benchmarking.fault_proxy import fault_proxy
from uwm_jax.files import as_place
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.telemetry.log import losses_of, read_metrics

pytestmark = pytest.mark.slow

# The training command, whose lock is short: another start soon sees it renewed.
PROGRAM = """
from uwm_jax import cli, train
from uwm_jax.training.checkpoints import lease
lease.LEASE_SECONDS = 12.0
cli.run(train.main, train.define_flags)
"""


class Start:
    """A start of the training command, with its output."""

    def __init__(self, arguments: list[str], environ: dict[str, str], output: Path):
        self.output = output
        with output.open("w") as file:
            command = [sys.executable, "-c", PROGRAM, *arguments]
            self.process = subprocess.Popen(command, env=environ, stdout=file, stderr=subprocess.STDOUT)

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        return self.output.read_text()

    def kill_after(self, seconds: float, step: int) -> None:
        """Kills it so long after a step."""
        deadline = time.monotonic() + 300
        while f"\nstep {step}/" not in self.text() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        time.sleep(seconds)
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, self.text()


def numbers_of(workdir):
    """{step: losses} of all lines, and the parameters of the last checkpoint."""
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no line is missing or there twice"
    checkpoints = Checkpoints(workdir, read_only=True)
    params = checkpoints.restore_arrays(checkpoints.steps()[-1], "params")
    return {line["step"]: losses_of(line) for line in lines}, params, checkpoints.steps()


def test_kills_at_random_moments_and_starts_that_race_change_no_number(
    make_tiny_config, storage_emulator, bucket, tmp_path
):
    config = make_tiny_config()
    config.total_steps, config.log_every, config.checkpoint.every, config.eval.every = 16, 1, 2, 0
    train(config, tmp_path / "whole")
    file = tmp_path / "config.py"
    text = config_lib.to_json(config)
    file.write_text(f"from uwm_jax import config\ndef get_config():\n    return config.from_json({text!r}, 'test')\n")
    workdir, draw = as_place(bucket) / "run", random.Random(5)
    arguments = [f"--config={file}", f"--workdir={workdir}"]
    with fault_proxy(storage_emulator.url, delay=0.02) as proxy:  # seconds a save
        environ = os.environ | proxy.environ
        with Start(arguments, environ, tmp_path / "first") as start:
            start.kill_after(draw.uniform(0, 3), step=5)  # the save of step 2 is durable, others are on their way
        with Start(arguments, environ, tmp_path / "a") as a, Start(arguments, environ, tmp_path / "b") as b:
            deadline = time.monotonic() + 300
            while a.process.poll() is None and b.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            lost, won = (a, b) if a.process.poll() is not None else (b, a)
            assert lost.process.poll() == 1, lost.text()
            pid = won.process.pid
            assert re.search(rf"error: --workdir: another run is at work in .*\(process {pid} on ", lost.text())
            won.kill_after(draw.uniform(0, 3), step=9)
        before = latest_step(workdir)
        assert before is not None and before >= 6
        with Start(arguments, environ, tmp_path / "last") as start:
            assert start.process.wait(timeout=300) == 0, start.text()
        assert f"continuing from step {before}" in start.text()
    losses, params, steps = numbers_of(workdir)
    expected_losses, expected_params, expected_steps = numbers_of(tmp_path / "whole")
    assert losses == expected_losses and len(losses) == 16, "bit for bit"
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    assert steps == expected_steps == [14, 16]
