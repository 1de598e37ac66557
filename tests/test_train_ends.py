"""The real training command, told to end in all the ways there are, also while a read hangs: it ends soon, with the
status that tells why, and the last finished step is saved."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.rehearse import Processes
from uwm_jax import config as config_lib
from uwm_jax.reporting import pictures
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import latest_step
from uwm_jax.training.telemetry.event_file import EventFile

pytestmark = pytest.mark.slow

# The training command, in which a read sleeps for two minutes once the file HANGS, or HANGS.<process>, is there.
PROGRAM = """
import os, sys, time
import jax
from uwm_jax import cli, train
from uwm_jax.data.records import Dataset

hangs = sys.argv.pop(1)

def view(self, *args, original=Dataset.view):
    if os.path.exists(hangs) or os.path.exists(f"{hangs}.{jax.process_index()}"):
        time.sleep(120)
    return original(self, *args)

Dataset.view = view
cli.run(train.main, train.define_flags)
"""


@pytest.fixture
def command(make_tiny_config, tmp_path):
    """A function that makes the command of a run without an end, which logs every step and saves none."""
    config = make_tiny_config()
    config.total_steps, config.log_every = 1_000_000, 1
    config.checkpoint.every = 1_000_000
    file = tmp_path / "config.py"
    file.write_text(
        "from uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(config)!r}, 'test')\n"
    )
    flags = [f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    return lambda *more: [sys.executable, "-c", PROGRAM, str(tmp_path / "hangs"), *flags, *more]


def steps_of(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", text, re.MULTILINE)]


def until(happens, seconds=240.0) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


def obey():
    """As a terminal starts a process, also where these tests run in the background of a script, deaf to Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Run:
    def __init__(self, command, folder: Path, **options):
        self.output = folder / "output"
        options = {"preexec_fn": obey} | options
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, **{"stdout": output, "stderr": subprocess.STDOUT} | options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        return self.output.read_text()

    def has_stopped(self) -> bool:
        """Whether a second passes without a step."""
        assert self.process.poll() is None, self.text()
        before = len(steps_of(self.text()))
        time.sleep(1.0)
        return 0 < before == len(steps_of(self.text()))


@pytest.mark.parametrize(
    ("number", "times", "name", "status"),
    [(signal.SIGTERM, 1, "SIGTERM", 143), (signal.SIGINT, 2, "Ctrl-C", 130)],
)
def test_a_read_that_hangs_makes_nobody_deaf(command, tmp_path, number, times, name, status):
    with Run(command(), tmp_path) as run:
        until(lambda: len(steps_of(run.text())) > 2 or run.process.poll() is not None)
        (tmp_path / "hangs").touch()
        until(run.has_stopped)
        time.sleep(5)
        began = time.monotonic()
        for _ in range(times):
            run.process.send_signal(number)
            time.sleep(0.2)
        assert run.process.wait(timeout=60) == status, run.text()
        assert time.monotonic() - began < 20
    last = steps_of(run.text())[-1]
    assert latest_step(tmp_path / "run") == last
    said = f"told to end ({name}): step {last} is saved; the same command continues from it. The run had waited for "
    assert said in run.text() and ".array_record" in run.text().split(said)[1]
    assert "Traceback" not in run.text() and "Exception" not in run.text()


def test_a_hangup_saves_and_one_that_is_ignored_does_nothing(command, tmp_path):
    """As the shell's `nohup` starts a process, and then not."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with Run(command(), tmp_path, preexec_fn=ignore) as run:
        until(lambda: len(steps_of(run.text())) > 2 or run.process.poll() is not None)
        run.process.send_signal(signal.SIGHUP)
        before = len(steps_of(run.text()))
        until(lambda: len(steps_of(run.text())) > before + 5 or run.process.poll() is not None)
        run.process.terminate()
        assert run.process.wait(timeout=20) == 143, run.text()
    first = latest_step(tmp_path / "run")
    assert first == steps_of(run.text())[-1]
    with Run(command(), tmp_path) as run:
        until(lambda: len(steps_of(run.text())) > 2 or run.process.poll() is not None)
        run.process.send_signal(signal.SIGHUP)
        assert run.process.wait(timeout=20) == 129, run.text()
    assert latest_step(tmp_path / "run") == steps_of(run.text())[-1] > first


def test_a_lost_reader_of_stdout_saves(command, tmp_path):
    """`train | head`: both streams go into a pipe that is closed after a few lines."""
    with Run(command(), tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        last = 0
        for line in run.process.stdout:
            last = max([last, *steps_of(line)])
            if last > 3:
                break
        run.process.stdout.close()
        assert run.process.wait(timeout=30) == 1
        told = run.process.stderr.read()
    step = latest_step(tmp_path / "run")
    assert step >= last and f"stdout can no longer be written (Broken pipe). Step {step} is saved" in told
    assert "Traceback" not in told and "Exception" not in told


def test_a_tracker_that_fails_ends_nothing_and_holds_nothing_up(make_tiny_config, tmp_path, monkeypatch, capfd):
    """Of every event after the first few none can be written (TensorBoard's own writer then blocks for ever), and no
    picture of the evaluation."""
    config = make_tiny_config()
    config.total_steps, config.log_every, config.eval.every = 30, 1, 15
    written, original = [], EventFile.write
    errors = [
        OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "modes.png")),
        ValueError("cannot draw"),
    ]

    def fail_later(self, data):
        written.append(data)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    def full(*_):
        raise errors.pop(0)

    monkeypatch.setattr(EventFile, "write", fail_later)
    monkeypatch.setattr(pictures, "draw", full)
    timer = threading.Timer(600, os._exit, (1,))  # instead of a test that never ends
    timer.start()
    try:
        train(config, tmp_path / "run")
    finally:
        timer.cancel()
    assert latest_step(tmp_path / "run") == 30
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").open()] == list(range(1, 31))
    lines = capfd.readouterr().err.splitlines()
    warned = [line for line in lines if "No space left on device" in line or "cannot draw" in line]
    assert len(warned) == 3 and "config.trackers: tensorboard ends here" in warned[0]
    assert "modes.png: the evaluation of step 15 cannot be written" in warned[1]
    assert "the evaluation of step 30 cannot be written (ValueError('cannot draw'))" in warned[2]


@pytest.mark.multihost
def test_of_several_processes_the_one_that_hangs_is_named_and_all_save(command, tmp_path):
    """Without any signal, at `hang_seconds`; then once more, with a SIGTERM to the process that does not hang."""
    hangs, last = tmp_path / "hangs.1", 0
    for seconds, status in ((6, 1), (900, 143)):
        hangs.unlink(missing_ok=True)
        with Processes(2, command(f"--config.hang_seconds={seconds}"), os.environ) as processes:

            def steps(lines=processes.lines):
                return steps_of("\n".join(lines[0]))

            until(lambda: len(steps()) > 2 or any(p.poll() for p in processes.popen))  # noqa: B023
            hangs.touch()
            if status == 143:
                count = -1
                while count != len(steps()):
                    count = len(steps())
                    time.sleep(7)
                processes.popen[0].terminate()
            began = time.monotonic()
            statuses = processes.wait(100)
            assert statuses == [status] * 2, processes.lines
            assert time.monotonic() - began < (20 if status == 143 else 60)
        done = steps()[-1]
        assert latest_step(tmp_path / "run") == done > last, processes.lines
        last = done
        for lines in processes.lines:
            text = "\n".join(lines)
            assert "process 1 of 2 got no data in 6 s" in text or "Process 1 of 2 had waited for" in text, text
            assert ".array_record" in text and f"tep {last} is saved" in text
            assert text.count("error:") == (status == 1) and "Traceback (most" not in text
