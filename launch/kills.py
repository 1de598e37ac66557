"""Kills processes of a supervised run at random moments, and compares it with the same run left alone.

`launch.rehearse --kills=N` does this; every process stands for a host, with a supervisor of its own.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.rehearse import Processes, passing_on
from uwm_jax.files import Place, as_place
from uwm_jax.training.checkpoints.reader import CheckpointReader
from uwm_jax.training.telemetry.log import read_metrics

TIMINGS = ("samples_per_second", "data_wait_fraction", "goodput", "mfu", "time/")  # of a line; they may differ

WITHIN_STEPS = 5  # of a given step, at most, a kill comes

_LOOK_SECONDS = 0.02
_STEP = re.compile(r"step (\d+)/")
_STARTED = re.compile(r"supervisor: process (\d+) is started")

Say = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
      step: the start after the kill before must have printed the line of this step, or a later one; None: it is still
        starting.
      delay: seconds after that, or after the kill before; at most until `WITHIN_STEPS` more, or the first step.
      victim: process number.
      number: of the signal.
    """

    step: int | None
    delay: float
    victim: int
    number: int = signal.SIGKILL


def plan(
    kills: int, processes: int, total_steps: int, start_seconds: float, step_seconds: float, seed: int
) -> list[Kill]:
    """Random kills in the order of their steps, all before the last fifth of the run; every fourth is at any moment of
    a start, the others within five steps after a given one."""
    draw = random.Random(seed)
    steps = sorted(draw.randint(1, max(4 * total_steps // 5, 1)) for _ in range(kills))
    planned = []
    for i, step in enumerate(steps):
        victim = draw.randrange(processes)
        if i % 4 == 3:
            planned.append(Kill(None, draw.uniform(0, start_seconds), victim))
        else:
            planned.append(Kill(step, draw.uniform(0, WITHIN_STEPS * step_seconds), victim))
    return planned


def kill_as_planned(processes: Processes, kills: Sequence[Kill], say: Say) -> int:
    """Carries out a plan; returns how many kills there were before the run was over."""
    mark = 0  # lines of process 0 before the last kill
    for done, kill in enumerate(kills):
        latest = 1 if kill.step is None else kill.step + WITHIN_STEPS
        while kill.step is not None and not _reached(processes.lines[0], mark, kill.step):
            if not _running(processes):
                return done
            time.sleep(_LOOK_SECONDS)
        until = time.monotonic() + kill.delay
        while time.monotonic() < until and not _reached(processes.lines[0], mark, latest):
            time.sleep(_LOOK_SECONDS)
        while (pid := _process_of(processes, kill.victim)) is None or not _kill(pid, kill.number):
            if not _running(processes):
                return done
            time.sleep(_LOOK_SECONDS)
        mark = len(processes.lines[0])
        last = max(_steps(processes.lines[0]), default=0)
        name = signal.Signals(kill.number).name
        say(f"kill {done + 1} of {len(kills)}: {name} to process {kill.victim}, last step {last}")
    return len(kills)


def supervised(command: Sequence[str], restarts: int, pause: float = 1.0) -> list[str]:
    """A command under a supervisor; flags that are added to it go to the command."""
    return [sys.executable, "-m", "uwm_jax.supervise", f"--restarts={restarts}", f"--pause={pause}", "--", *command]


def differences(alone: Place, killed: Place) -> list[str]:
    """What of two runs is not equal to the bit: metrics of a step, arrays of the last checkpoint; [] if all is."""
    one, other = ({line["step"]: line for line in read_metrics(w / "metrics.jsonl")} for w in (alone, killed))
    found = [f"step {step} is logged in one of both only" for step in sorted(one.keys() ^ other.keys())]
    for step in sorted(one.keys() & other.keys()):
        x, y = one[step], other[step]
        names = [name for name in sorted(x.keys() | y.keys()) if not name.startswith(TIMINGS)]
        found += [f"step {step}: {n} is {x.get(n)!r} alone, {y.get(n)!r} killed" for n in names if x.get(n) != y.get(n)]
    if one and not found:
        digests = [CheckpointReader(w / "checkpoints", max(one)).assets["digests"]["arrays"] for w in (alone, killed)]
        found += [
            f"{name}: other bits"
            for name in digests[0].keys() | digests[1].keys()
            if digests[0].get(name) != digests[1].get(name)
        ]
    return found


def rehearse(
    count: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    workdir: str,
    kills: int,
    seed: int,
    on_line: Callable[[int, str], Any],
    say: Say,
) -> int:
    """Trains in `workdir/alone` and, with kills, in `workdir/killed`; the exit status, 1 if these are not equal.

    Args:
      command: of training, without `--workdir`.
    """
    alone, killed = as_place(workdir) / "alone", as_place(workdir) / "killed"
    times: list[float] = []

    def clocked(process: int, line: str) -> None:
        if process == 0 and _STEP.match(line):
            times.append(time.monotonic())
        on_line(process, line)

    began = time.monotonic()
    with Processes(count, [*command, f"--workdir={alone}"], environment, clocked) as processes, passing_on(processes):
        statuses = processes.wait()
    if any(statuses) or len(times) < 2:
        say(f"the run that is left alone failed (statuses {statuses}), or made no two steps")
        return max(statuses) or 1
    total, start = max(_steps(processes.lines[0])), times[0] - began
    planned = plan(kills, count, total, start, (times[-1] - times[0]) / (len(times) - 1), seed)

    began = time.monotonic()
    command = supervised([*command, f"--workdir={killed}"], restarts=5 + kills)
    with Processes(count, command, environment, on_line) as processes, passing_on(processes):
        done = kill_as_planned(processes, planned, say)
        statuses = processes.wait()
    seconds = time.monotonic() - began
    starts = sum(bool(_STARTED.match(line)) for lines in processes.lines for line in lines)
    last = read_metrics(killed / "metrics.jsonl")[-1:]
    if any(statuses) or not last:
        say(f"the run with kills failed: statuses {statuses}")
        return max(statuses) or 1
    spent = ", ".join(
        f"{name} {last[0][f'time/{name}']:.1f} s" for name in ("step", "start", "compile", "lost", "downtime")
    )
    say(f"{done} kills, {starts - count} restarts, {seconds:.0f} s; goodput {last[0]['goodput']:.3f}: {spent}")
    if done < kills:
        say(f"the run was over after {done} of {kills} kills: give it more steps (--config.total_steps)")
        return 1
    if found := differences(alone, killed):
        say("\n".join([f"{len(found)} differences:", *found[:20]]))
        return 1
    say(f"all metrics of {total} steps and the arrays of the last checkpoint are equal to the bit")
    return 0


def _steps(lines: Sequence[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := _STEP.match(line))]


def _reached(lines: Sequence[str], mark: int, step: int) -> bool:
    """Whether the start that began after the first `mark` lines has printed a step of at least this number."""
    starts = [i for i, line in enumerate(lines) if i >= mark and _STARTED.match(line)]
    return bool(starts) and any(found >= step for found in _steps(lines[starts[-1] :]))


def _running(processes: Processes) -> bool:
    return any(p.poll() is None for p in processes.popen)


def _process_of(processes: Processes, victim: int) -> int | None:
    """The pid of a process under its supervisor, while there is one."""
    told = [line for line in list(processes.lines[victim]) if line.startswith("supervisor: ")]
    started = _STARTED.match(told[-1]) if told else None
    return int(started[1]) if started else None


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
