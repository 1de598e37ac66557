"""How a command's processes end."""

from __future__ import annotations

import errno
import multiprocessing.process
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.jobs.workers import pool
from uwm_jax.errors import RunError

ROOT = Path(__file__).parents[3]
COMMAND = """
import os, time
from data_prep.jobs.workers import pool
executor = pool(1)
print(executor.submit(os.getpid).result(), executor.submit(os.getppid).result(), flush=True)
executor.submit(time.sleep, 600).result()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_processes_end_with_the_command(how: signal.Signals, ends) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    try:
        worker, parent = map(int, command.stdout.readline().split())
        assert parent == command.pid
        assert not ends(worker, 0.1)
        if how is signal.SIGINT:
            os.killpg(command.pid, how)  # as a terminal does: to all of them
        else:
            command.kill()
        command.wait(30)
        assert ends(worker)
        errors = command.stderr.read()
        assert errors.count("Traceback") == (how is signal.SIGINT), errors  # the command's own
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_message() -> None:
    with pytest.raises(RunError, match="a worker process was killed or crashed.*fewer --workers"), pool(1) as executor:
        executor.submit(os._exit, 9).result()
    with pytest.raises(ZeroDivisionError), pool(1) as executor:
        executor.submit(divmod, 1, 0).result()


def test_a_worker_that_the_operating_system_refuses_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(process: multiprocessing.process.BaseProcess) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with pytest.raises(RunError, match="no further process.*fewer --workers"), pool(2) as executor:
        executor.submit(abs, 1)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refused)
        executor.submit(abs, 2)


ENDS_AT_ONCE = """
import multiprocessing
from data_prep.jobs.workers import pool
counter = multiprocessing.get_context("spawn").Value("q", 0)
executor = pool(1, id, (counter,))
executor.submit(abs, 1)
executor.shutdown(wait=False, cancel_futures=True)
del counter, executor
"""


def test_a_process_that_starts_while_the_command_fails_is_silent() -> None:
    command = [sys.executable, "-c", ENDS_AT_ONCE]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
