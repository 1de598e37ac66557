"""Seconds from the command to the end of the first step, by part: a line of every run's output.

imports   the interpreter and all modules
config    flags, the config's file, what an earlier start of the run says, devices
data      opening the datasets, and their statistics
model     the codec, and the shapes of the training state
state     making the training state, or restoring it; the workdir
compile   the programs of the loop, and what the first save runs
step      the first batch and the first step
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

PARTS: Sequence[str] = ("imports", "config", "data", "model", "state", "compile", "step")


class Startup:
    """The clock of a start.

    Args:
      began: when the process was started and its imports were done, on the clock of `time.perf_counter`; None, in a
        call from Python, starts the clock now.
    """

    def __init__(self, began: tuple[float, float] | None = None):
        command, imported = began or [time.perf_counter()] * 2
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._seconds["imports"] = imported - command
        self._part, self._mark = "config", imported
        self._compiled = len(_compilations)

    def reached(self, part: str) -> None:
        """The time from here on belongs to `part`, one of PARTS."""
        now = time.perf_counter()
        self._seconds[self._part] += now - self._mark
        self._part, self._mark = part, now

    def summary(self, results: Any) -> str:
        """Waits for the arrays of the first step; returns a line about the start.

        `first step after 9.10 s: imports 1.30, config 0.20, ..., step 0.70; XLA took 5.10 for 2 programs`.
        """
        jax.block_until_ready(results)
        self.reached(self._part)
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self._seconds.items())
        compiled = _compilations[self._compiled :]
        xla = f"XLA took {sum(compiled):.2f} for {len(compiled)} programs"
        return f"first step after {sum(self._seconds.values()):.2f} s: {parts}; {xla}"


def read_summary(line: str) -> dict[str, float] | None:
    """{part: seconds, "xla": seconds} of a line of `Startup.summary`; None for any other line."""
    if not line.startswith("first step after "):
        return None
    parts, _, xla = line.partition(": ")[2].partition("; XLA took ")
    pairs = (pair.split() for pair in parts.split(", "))
    return {**{name: float(seconds) for name, seconds in pairs}, "xla": float(xla.split()[0])}


_compilations: list[float] = []  # seconds of each program of this process, also where a cache had it


def _note(event: str, duration_secs: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_note)
