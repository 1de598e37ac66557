"""The launcher of local processes: numbered output, the status of the first failure, nobody left behind."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from launch import rehearse
from launch.rehearse import Processes, one_device

# Stands for the training command: obeys its own number, which is the last argument.
PROGRAM = """
import os, signal, sys, time
number = int(sys.argv[-1].removeprefix("--process-id="))
print("hello", *sys.argv[1:], flush=True)
{body}
"""


def command(body, *flags):
    return [sys.executable, "-c", PROGRAM.format(body=body), *flags]


def test_each_process_gets_its_number_and_its_lines_are_told_apart():
    seen = []
    with Processes(3, command("print('to stderr', file=sys.stderr)"), os.environ, lambda *x: seen.append(x)) as run:
        assert run.wait(60) == [0, 0, 0] and run.first_failed is None
    for p in range(3):
        address, count, process = run.lines[p][0].split()[1:]
        assert (count, process) == ("--num-processes=3", f"--process-id={p}")
        assert address == run.lines[0][0].split()[1] and address.startswith("--coordinator-address=127.0.0.1:")
        assert run.lines[p][1:] == ["to stderr"] == [line for q, line in seen if q == p][1:]


def test_the_first_failure_counts_and_the_others_are_ended():
    with Processes(2, command("sys.exit(3) if number else time.sleep(600)"), os.environ) as run:
        assert run.wait(60, others=0.2) == [128 + signal.SIGKILL, 3] and run.first_failed == 1


def test_none_outlives_the_context():
    with pytest.raises(KeyError), Processes(2, command("time.sleep(600)"), os.environ) as run:
        raise KeyError
    assert [p.returncode for p in run.popen] == [-signal.SIGKILL] * 2


def test_one_device_without_proxies():
    env = one_device({"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8", "HTTPS_PROXY": "p", "HOME": "h"})
    assert env["XLA_FLAGS"] == "--a=1" and env["JAX_PLATFORMS"] == "cpu" and env["HOME"] == "h"
    assert "HTTPS_PROXY" not in env


@pytest.fixture
def started(monkeypatch):
    """The command lines that `main` would start; they succeed."""
    lines = []
    monkeypatch.setattr(rehearse, "_rehearse", lambda count, line, env: lines.append((count, line[1:])) or 0)
    return lines


def test_the_quickstart_in_tiny_form_is_the_default(started, tmp_path, monkeypatch):
    (tmp_path / "pusht").mkdir()
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path))
    assert rehearse.main(["--processes", "2", "--config.total_steps=3"]) == 0
    [(count, line)] = started
    assert count == 2 and line[:3] == ["-m", "uwm_jax.train", "--config=configs/quickstart.py"]
    assert "--config.model.depth=2" in line and line[-1] == "--config.total_steps=3", "what is asked for comes last"
    assert any(x.startswith("--workdir=") for x in line)


def test_a_config_of_ones_own_keeps_its_model(started):
    assert rehearse.main(["--processes=3", "--config=configs/droid.py", "--workdir=runs/x"]) == 0
    [(count, line)] = started
    assert count == 3 and not any("model" in x for x in line)
    assert [x for x in line if "workdir" in x] == ["--workdir=runs/x"] and "--config.total_steps=6" in line


def test_demonstrations_are_made_where_there_are_none(started, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(rehearse, "MAKE_DATA", [sys.executable, "-c", "import sys; print(*sys.argv[1:])"])
    assert rehearse.main([]) == 0
    made = capfd.readouterr().out.split("--output=")[1].split()[0]
    assert f"--config.data.path={made}" in started[0][1] and started[0][0] == 4
    monkeypatch.setattr(rehearse, "MAKE_DATA", [sys.executable, "-c", "raise SystemExit(7)"])
    assert rehearse.main([]) == 7 and len(started) == 1
    assert "pip install -e '.[demo]'" in capfd.readouterr().err


@pytest.mark.parametrize("number", ["0", "two", ""])
def test_an_unusable_number_is_refused(number, capsys):
    with pytest.raises(SystemExit) as e:
        rehearse.main([f"--processes={number}"])
    assert e.value.code == 2 and "--processes: expected a number of at least 1" in capsys.readouterr().err


def test_output_carries_the_number_and_the_status_is_passed_on(capsys):
    assert rehearse._rehearse(2, command("sys.exit(4 if number else 0)"), os.environ) == 4
    output = capsys.readouterr()
    assert "[0] hello" in output.out and "[1] hello" in output.out
    assert "process 1 was the first to fail; statuses of all: [0, 4]" in output.err


def test_sigterm_is_passed_on_and_waited_for(capsys):
    """As the training command does: save, then end with 143."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), os._exit(143)))\n"
        "print('ready', flush=True)\n"
        "os.kill(os.getppid(), signal.SIGTERM) if number == 0 and not time.sleep(1) else None\n"
        "time.sleep(600)"
    )
    began = time.monotonic()
    assert rehearse._rehearse(2, command(body), os.environ) == 143
    output = capsys.readouterr().out
    assert "[0] saved" in output and "[1] saved" in output and time.monotonic() - began < 60
