"""A trace of a few steps, for TensorBoard's profile plugin, XProf or Perfetto."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from uwm_jax.errors import UserError, warn
from uwm_jax.files import Place, copy_tree, is_remote
from uwm_jax.parallel.distributed import say


class Profile:
    """Writes `<workdir>/profile` while some steps of a run are made.

    The profiler writes local files alone: of a workdir in a bucket, a thread uploads them when the trace is complete.

    Args:
      first, steps: the trace holds steps `first` to `first + steps - 1`, counted from 1; 0 steps is no trace.
      workdir: the run's directory.
    """

    def __init__(self, first: int, steps: int, workdir: Place):
        self._first, self._end = first, first + steps
        self._directory = workdir / "profile"
        self._local: tempfile.TemporaryDirectory[str] | None = None  # where the profiler writes, if not there
        self._upload: threading.Thread | None = None
        self._running = False
        self._last = 0  # step that the trace holds so far

    @classmethod
    def parse(cls, text: str | None, workdir: Place, start_step: int, total_steps: int) -> Profile:
        """The flag `--profile=START:STEPS`; None or "" is no trace.

        Args:
          start_step, total_steps: the run makes the steps `start_step + 1` to `total_steps`. Where START is behind it,
            there is a line instead of a trace: whatever starts a run again does so with the same flags.

        Raises:
          UserError: another form, or steps that the run does not have.
        """
        if not text:
            return cls(0, 0, workdir)
        match = re.fullmatch(r"(\d+):(\d+)", text)
        first, steps = (int(match[1]), int(match[2])) if match else (0, 0)
        if not first or not steps:
            raise UserError(
                f"--profile={text}: expected START:STEPS, both at least 1, such as 100:5 for the steps 100 to 104."
            )
        if first + steps - 1 > total_steps:
            raise UserError(
                f"--profile={text}: asks for the steps {first} to {first + steps - 1}, but the run ends with step "
                f"{total_steps}."
            )
        if first <= start_step:
            say(f"--profile={text}: no trace, since the run continues after step {start_step}")
            return cls(0, 0, workdir)
        return cls(first, steps, workdir)

    @contextlib.contextmanager
    def step(self, step: int, before: Any) -> Iterator[None]:
        """Around the dispatch of every step, which gets a name and its number in the trace.

        Args:
          step: the step that comes.
          before: arrays of the step before. Where the trace begins and ends they are waited for, so that it holds whole
            steps and no other.
        """
        if step == self._first < self._end:
            jax.block_until_ready(before)
            self._running = self._tried(self._start)
        elif self._running and step == self._end:
            jax.block_until_ready(before)
            self._stop()
        self._last = step
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def close(self) -> None:
        """Ends a trace that is still running, and waits for its upload."""
        self._stop()
        if self._upload is not None:
            self._upload.join()

    def _start(self) -> None:
        if is_remote(self._directory):
            self._local = tempfile.TemporaryDirectory(prefix="uwm_profile.")
        jax.profiler.start_trace(self._local.name if self._local else str(self._directory))

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        if not self._tried(jax.profiler.stop_trace):
            return
        told = f"profile: steps {self._first} to {self._last} in {self._directory}"
        if self._local is None:
            say(told)
        else:  # not in the loop, where other processes may wait for this one
            send = functools.partial(self._send, told)
            self._upload = threading.Thread(target=self._tried, args=(send,), name="upload of the trace")
            self._upload.start()

    def _send(self, told: str) -> None:
        assert self._local is not None
        with self._local as folder:
            copy_tree(Path(folder), self._directory)
        say(told)

    def _tried(self, change: Callable[[], None]) -> bool:
        """Whether the profiler did it. A trace that fails (a full disk, another trace) is no reason to end a run."""
        try:
            change()
        except Exception as e:
            warn(f"{self._directory}: no profile can be written ({str(e) or type(e).__name__}). The run goes on.")
            return False
        return True
