"""Starts commands, kills them with SIGKILL, starts them again, and compares what they leave.

    commands = Commands("data_prep.reshard")                        # a fixture of the module; close() it
    outputs = kill_and_resume(commands, ["data_prep.reshard", ...], moments, lambda: (tmp_path / "out").exists())
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")

A command runs in a process that is forked from one that has imported it, so a start costs milliseconds, not seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.jobs.job_folder import RESULT

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds for a command to end, or for a moment to come

Moment = float | Callable[[], bool]  # seconds after the start, or a condition that is polled

_SERVER = """
import importlib, json, os, sys
from uwm_jax import cli
modules = {name: importlib.import_module(name) for name in sys.argv[1:]}
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        pid, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if not answer:
            os.setsid()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            os.close(0)
            name, *flags = request["run"]
            status = cli.call(modules[name].main, [name, *flags], modules[name].define_flags)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(json.dumps(answer), flush=True)
"""


class Commands:
    """Starts commands whose `main` and `define_flags` are in these modules."""

    def __init__(self, *modules: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        self._logs = tempfile.TemporaryDirectory()
        self._count = 0

    def start(self, command: Sequence[str]) -> Running:
        """Starts `[module, *flags]`."""
        self._count += 1
        log = Path(self._logs.name) / f"{self._count}.log"
        pid = self.ask({"run": [str(word) for word in command], "log": str(log)})
        while os.getpgid(pid) != pid:  # until then there is no group to kill
            time.sleep(0.001)
        return Running(self, pid, log)

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Exit status and output of a command."""
        running = self.start(command)
        return running.wait(), running.output

    def ask(self, request: dict) -> int:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(PATIENCE)
        self._process.stdout.close()  # type: ignore[union-attr]
        self._logs.cleanup()


@dataclasses.dataclass
class Running:
    """A command that was started."""

    commands: Commands
    pid: int
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self) -> int:
        return self.commands.ask({"wait": self.pid, "block": True})

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self.commands.ask({"wait": self.pid, "block": False})

    def kill(self, and_its_processes: bool = True) -> None:
        """SIGKILL, as a scheduler or the memory of the host has it."""
        (os.killpg if and_its_processes else os.kill)(self.pid, signal.SIGKILL)
        self.wait()

    def until(self, moment: Moment) -> int | None:
        """Waits for a moment; returns the exit status if the command ended before."""
        start = time.monotonic()
        while not (moment() if callable(moment) else time.monotonic() - start >= moment):
            if (status := self.poll()) is not None:
                return status
            assert time.monotonic() - start < PATIENCE, f"the moment does not come:\n{self.output}"
            time.sleep(0.001)
        return self.poll()


def kill_and_resume(
    commands: Commands,
    command: Sequence[str],
    moments: Iterable[Moment],
    is_published: Callable[[], bool],
    and_its_processes: bool = True,
) -> list[str]:
    """Starts a command and kills it at each moment in turn, then starts it once more and lets it end.

    A start that ends by itself, or was killed after it had published its result, is the last.

    Args:
        and_its_processes: kill its worker processes too, instead of leaving them to notice.
    Returns:
        The output of each start; the last one has succeeded.
    """
    outputs = []
    for moment in moments:
        running = commands.start(command)
        status = running.until(moment)
        if status is None:
            running.kill(and_its_processes)
        outputs.append(running.output)
        if status is not None or is_published():
            assert not status, running.output
            return outputs
    status, output = commands.run(command)
    assert status == 0, output
    return [*outputs, output]


def random_moments(seed: int, count: int, longest: float) -> list[float]:
    """Seconds after the start, uniform in [0, longest)."""
    numbers = random.Random(seed)
    return [numbers.random() * longest for _ in range(count)]


@contextlib.contextmanager
def held(output: Path, tasks: Iterable[str]) -> Iterator[None]:
    """Keeps tasks (such as "train.00003") of the job that makes `output` from being done; it does the others."""
    parts = output.with_name(f".{output.name}.building") / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for task in tasks:
            fcntl.flock(stack.enter_context((parts / f"{task}.lock").open("a")), fcntl.LOCK_EX)
        yield


def finished_tasks(output: Path) -> int:
    """How many tasks of the job that makes `output` are finished and recorded."""
    return len(list(output.parent.glob(f".{output.name}.building/parts/[!.]*/{RESULT}")))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
