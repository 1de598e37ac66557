"""Trains a few steps in several processes on this machine's CPU: the rehearsal of a run on several hosts.

    bash launch/rehearse.sh --processes 4
    bash launch/rehearse.sh --processes 2 --config=configs/droid.py --workdir=runs/rehearsal --config.batch_size=2
    bash launch/rehearse.sh --processes 4 --kills=10

Everything but --processes, --kills and --seed goes to `uwm_jax.train`, in each process with its number. Without
--config this is configs/quickstart.py in tiny form; where `data_prep.demo` has not made its dataset yet, a few
demonstrations are made in a temporary directory. Without --workdir the run is thrown away at the end. Output lines
carry the number of their process. The exit status is that of the first process that failed; none is ever left behind.

--kills=N rehearses lost hosts: the run is trained twice, in WORKDIR/alone and in WORKDIR/killed. In the second each
process has a supervisor (`uwm_jax.supervise`), and N times one of the processes is killed at a random moment; --seed
draws both. The exit status is 1 if metrics of any step, or arrays of the last checkpoint, differ in a bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uwm_jax.files import data_dir

# What a few steps need; a flag of the same name on the command line comes later and wins.
SHORT = ("total_steps=6", "batch_size=8", "log_every=1", "checkpoint.every=3", "data.num_threads=1")
TINY = (
    *("model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.timestep_embed_dim=32"),
    *("model.encoder.stage_sizes=1,", "model.num_registers=2"),
)
MAKE_DATA = (sys.executable, "-m", "data_prep.demo", "--episodes=4", "--workers=1")

_OTHERS_SECONDS = 120.0  # for the other processes to end after the first that failed
_SAVE_SECONDS = 60.0  # for all of them to save and end after this command was told to end


class Processes:
    """One command in several processes of one run, on this machine.

    Use as a context manager: no process outlives it.

    Args:
        command: without the flags that name the processes, which are added.
        env: of the processes; each sees one CPU device.
        on_line: gets (process, line) for every line of output, stderr included.

    Attributes:
        popen: by process number.
        lines: the output so far, by process number.
        first_failed: the first process that `wait` saw end with another status than 0.
    """

    def __init__(
        self,
        count: int,
        command: Sequence[str],
        env: Mapping[str, str],
        on_line: Callable[[int, str], Any] = lambda process, line: None,
    ):
        address = f"127.0.0.1:{_free_port()}"
        self.lines: list[list[str]] = [[] for _ in range(count)]
        self.first_failed: int | None = None
        self._on_line = on_line
        self._readers = []
        self.popen = [
            subprocess.Popen(
                [*command, f"--coordinator-address={address}", f"--num-processes={count}", f"--process-id={p}"],
                env=one_device(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # an interrupt from the keyboard reaches this command alone, and is passed on
            )
            for p in range(count)
        ]
        for p in range(count):
            reader = threading.Thread(target=self._read, args=(p,), daemon=True)
            reader.start()
            self._readers.append(reader)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: Any) -> None:
        for p in self.popen:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
        for p in self.popen:
            p.wait()
        for reader in self._readers:
            reader.join()

    def send(self, number: int) -> None:
        """A signal to all that still run."""
        for p in self.popen:
            if p.poll() is None:
                p.send_signal(number)

    def wait(self, seconds: float | None = None, others: float = _OTHERS_SECONDS) -> list[int]:
        """The exit statuses, 128 + n for signal n, once all have ended.

        Args:
            seconds: kills what runs longer; None = no limit.
            others: kills what still runs so long after the first process has failed.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while any(p.poll() is None for p in self.popen):
            if self._look_for_failure():
                soon = time.monotonic() + others
                deadline = soon if deadline is None else min(deadline, soon)
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        self._look_for_failure()
        for reader in self._readers:
            reader.join()
        return [p.returncode if p.returncode >= 0 else 128 - p.returncode for p in self.popen]

    def _look_for_failure(self) -> bool:
        """True the one time that a process is seen to have failed."""
        if self.first_failed is None:
            self.first_failed = next((i for i, p in enumerate(self.popen) if p.poll()), None)
            return self.first_failed is not None
        return False

    def _read(self, process: int) -> None:
        stream = self.popen[process].stdout
        assert stream is not None
        for line in stream:
            self.lines[process].append(line.rstrip("\n"))
            self._on_line(process, line.rstrip("\n"))


def one_device(env: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a process has one CPU device and talks to the others without a proxy between."""
    flags = [f for f in env.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    kept = {k: v for k, v in env.items() if not k.lower().endswith("_proxy")}
    return {**kept, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def main(argv: Sequence[str]) -> int:
    taken, rest = _take(argv, {"processes": "4", "kills": "0", "seed": "0"})
    count, kills, seed = (
        _number(name, taken[name], least) for name, least in (("processes", 1), ("kills", 0), ("seed", 0))
    )
    if {"--help", "-h"} & set(rest):
        print(__doc__)
        return 0
    given = {a.lstrip("-").split("=")[0] for a in rest if a.startswith("-")}
    steps = (f"total_steps={12 * kills + 12}",) if kills else ()  # enough for all kills
    flags = [f"--config.{field}" for field in (*SHORT, *steps)]
    if "config" not in given:
        flags = ["--config=configs/quickstart.py", *flags, *(f"--config.{field}" for field in TINY)]
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uwm_rehearsal_")))
        if "config" not in given and "config.data.path" not in given and not _demo_is_there():
            print(f"no dataset in {data_dir() / 'pusht'}: making a few demonstrations", flush=True)
            made = temporary / "pusht"
            status = subprocess.run([*MAKE_DATA, f"--output={made}"], env=one_device(os.environ)).returncode
            if status:
                print("error: data_prep.demo failed; it needs pip install -e '.[demo]'.", file=sys.stderr)
                return status
            flags.append(f"--config.data.path={made}")
        if kills:
            taken, rest = _take(rest, {"workdir": str(temporary)})
            flags.append(f"--config.compilation_cache_dir={temporary / 'programs'}")  # every start compiles
        elif "workdir" not in given:
            flags.append(f"--workdir={temporary / 'workdir'}")
        # Compiling takes most of the time, and more so with each process: a few steps need no fast program.
        env = dict(os.environ)
        env["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {env.get('XLA_FLAGS', '')}"
        command = [sys.executable, "-m", "uwm_jax.train", *flags, *rest]
        if kills:
            from launch.kills import rehearse  # imports jax, which a command that only starts others does not need

            return rehearse(count, command, env, taken["workdir"], kills, seed, _show, _say)
        return _rehearse(count, command, env)


def _rehearse(count: int, command: Sequence[str], env: Mapping[str, str]) -> int:
    with Processes(count, command, env, _show) as processes, passing_on(processes):
        statuses = processes.wait()
    if processes.first_failed is None:
        print(f"rehearsed: {count} processes, all with status 0")
        return 0
    failed = processes.first_failed
    print(f"process {failed} was the first to fail; statuses of all: {statuses}", file=sys.stderr)
    return statuses[failed]


_lock = threading.Lock()


def _say(line: str) -> None:
    with _lock:
        print(line, flush=True)


def _show(process: int, line: str) -> None:
    _say(f"[{process}] {line}")


@contextlib.contextmanager
def passing_on(processes: Processes) -> Iterator[None]:
    """SIGTERM and an interrupt tell the processes to save and end; the second time, or after a minute, they are
    killed."""
    told = threading.Event()

    def pass_on(*_: Any) -> None:
        if told.is_set():
            processes.send(signal.SIGKILL)
            return
        told.set()
        processes.send(signal.SIGTERM)
        timer = threading.Timer(_SAVE_SECONDS, processes.send, (signal.SIGKILL,))
        timer.daemon = True
        timer.start()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _take(argv: Sequence[str], defaults: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The values of `--name VALUE` or `--name=VALUE` for the names of `defaults`, and what is left."""
    values, rest = dict(defaults), []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name[2:] in values:
            values[name[2:]] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return values, rest


def _number(name: str, value: str, least: int) -> int:
    if not value.isdigit() or int(value) < least:
        print(f"error: --{name}: expected a number of at least {least}, found {value!r}.", file=sys.stderr)
        sys.exit(2)
    return int(value)


def _demo_is_there() -> bool:
    return (data_dir() / "pusht").is_dir()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
