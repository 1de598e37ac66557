"""launch/worker.sh, as SSH calls it on a host: what is started outlives the call, holds a lock, and shows no secret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs on the hosts of TPUs, with setsid and flock")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a bundle below a home directory, as if it were installed."""
    folder = tmp_path / "uwm_jax" / "c0ffee"
    (folder / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "worker.sh", folder / "launch")
    (folder / "env" / "bin").mkdir(parents=True)
    (folder / "env" / "installed").touch()
    # Says how it was called: the supervisor runs nothing else here.
    program(
        folder / "env" / "bin" / "python",
        'if [ "$2" = uwm_jax.supervise ]; then echo supervised; shift 3; fi\nexec "$@"',
    )
    return folder


def program(file: Path, line: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\n{line}\n")
    file.chmod(0o755)


def worker(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A call, which must not wait for what it starts."""
    env = {"PATH": os.environ["PATH"], "HOME": str(folder.parents[1])} | variables
    command = ["bash", "launch/worker.sh", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=30)


def status(folder: Path, expected: str) -> bool:
    """Whether it comes to that status in time."""
    for _ in range(200):
        said = worker(folder, "status").stdout
        if said == f"uwm_jax worker: {expected}\n":
            return True
        time.sleep(0.05)
    return False


def log(folder: Path) -> str:
    return (folder.parent / "run.log").read_text()


def test_what_is_started_outlives_the_call_and_is_started_once(folder):
    assert status(folder, "not started")
    go = folder / "go"
    script = f'for i in $(seq 600); do [ ! -e {go} ] || exit 7; sleep 0.05; done; echo "not told" >&2'
    assert worker(folder, "start", "--", "bash", "-c", script).stdout == "uwm_jax worker: started\n"
    assert status(folder, "running")
    for arguments in (["--", "bash", "-c", script], ["--again", "--", "true"]):
        other = worker(folder, "start", *arguments)
        assert other.returncode == 3 and "another run is running: bash -c for i in" in other.stderr
    same = worker(folder, "start", "--again", "--", "bash", "-c", script)
    assert (same.returncode, same.stdout) == (0, "uwm_jax worker: running already\n")
    go.touch()
    assert status(folder, "ended 7")
    assert "with status 7" in log(folder) and "supervised" not in log(folder)
    assert worker(folder, "start", "--", "true").returncode == 0 and status(folder, "ended 0")


def test_a_command_with_a_workdir_is_supervised_in_the_folder(folder):
    worker(folder, "start", "--", "bash", "-c", "pwd", "--workdir=gs://b/x")
    assert status(folder, "ended 0")
    assert log(folder).splitlines()[1:-1] == ["supervised", str(folder)]


def test_a_run_that_was_killed_is_lost(folder, ends):
    worker(folder, "start", "--", "bash", "-c", f"echo $PPID > {folder}/parent; sleep 600")
    assert status(folder, "running")
    while not (file := folder / "parent").exists() or not file.read_text().strip():
        time.sleep(0.05)
    group = os.getpgid(int(file.read_text()))
    os.killpg(group, 9)
    assert status(folder, "lost")


def test_secrets_reach_the_run_and_nothing_else(folder):
    (folder.parent / "secrets").write_text("A_KEY='it'\"'\"'s $HOME'\n")
    programs = folder / "programs"
    programs.mkdir()
    program(programs / "gcloud", '[ "$*" = "secrets versions access 3 --secret=hf --quiet" ] && echo named-value')
    script = 'echo "$A_KEY" > a; echo "$B_TOKEN $C" > b; tr "\\0" " " < /proc/$PPID/cmdline'
    arguments = ("--secret", "B_TOKEN=hf:3", "C=x y", "--", "bash", "-c", script)
    said = worker(folder, "start", *arguments, PATH=f"{programs}:{os.environ['PATH']}")
    assert status(folder, "ended 0")
    assert (folder / "a").read_text() == "it's $HOME\n" and (folder / "b").read_text() == "named-value x y\n"
    assert not (folder.parent / "secrets").exists()
    shown = said.stdout + said.stderr + log(folder)
    assert "it's" not in shown and "named-value" not in shown
    assert (folder.parent / "run.log").stat().st_mode & 0o077 == 0


def test_a_secret_that_cannot_be_read_starts_nothing(folder):
    programs = folder / "programs"
    programs.mkdir()
    program(programs / "gcloud", "echo PERMISSION_DENIED >&2; exit 1")
    said = worker(folder, "start", "--secret", "A=a:1", "--", "true", PATH=f"{programs}:{os.environ['PATH']}")
    assert said.returncode == 1 and "PERMISSION_DENIED" in said.stderr and status(folder, "not started")


def test_without_an_environment_nothing_is_started(folder):
    (folder / "env" / "installed").unlink()
    said = worker(folder, "start", "--", "true")
    assert said.returncode == 2 and "c0ffee is not installed here: run launch.tpu install" in said.stderr


def test_an_environment_is_made_once(folder):
    """From a Python of the asked version, or where the machine has none from uv."""
    shutil.rmtree(folder / "env")
    programs = folder / "programs"
    programs.mkdir()
    python = 'mkdir -p env/bin; cp "$0" env/bin/python; [ "$1" != -c ] || echo 1.0+gc0ffee'
    called = f'echo "$(basename "$0") $*" >> {folder}/calls\n'
    program(programs / "uv", f"{called}{python}")
    path = f"{programs}:/usr/bin:/bin"
    install = ("install", "uwm_jax-1.0+gc0ffee-py3-none-any.whl", "3.99", "tpu,gcs")
    for _ in range(2):
        said = worker(folder, *install, PATH=path)
        assert (said.returncode, said.stdout) == (0, "uwm_jax worker: installed 1.0+gc0ffee\n"), said.stderr
    calls = (folder / "calls").read_text().splitlines()
    assert calls[0] == "uv venv --quiet --seed --python 3.99 env"
    assert "--constraint constraints.txt ./uwm_jax-1.0+gc0ffee-py3-none-any.whl[tpu,gcs]" in calls[1]
    assert not [call for call in calls[2:] if "install" in call.split()]
    assert os.readlink(folder.parent / "current") == "c0ffee"
    program(programs / "python3.99", f"{called}{python}")
    shutil.rmtree(folder / "env")
    (folder / "calls").unlink()
    assert worker(folder, *install, PATH=path).returncode == 0
    assert (folder / "calls").read_text().splitlines()[0] == "python3.99 -m venv env"
