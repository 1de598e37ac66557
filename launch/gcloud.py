"""Calls of gcloud, the cloud's command line: each has a time limit, is shown before it runs, or is only printed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from uwm_jax.errors import RunError, UserError

PROGRAM = "gcloud"
CALL_SECONDS = 600.0

_RETRY_SECONDS = 20.0


class Gcloud:
    """Runs gcloud, or with `dry_run` prints the commands that would run.

    Args:
      project: of all calls; "" for the one that gcloud is configured with.
      say: prints a line.
    """

    def __init__(
        self,
        dry_run: bool = False,
        project: str = "",
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.dry_run = dry_run
        self._project = [f"--project={project}"] if project else []
        self._say, self._sleep = say, sleep

    def remark(self, text: str) -> None:
        """A line about the next call, a comment of the shell in a dry run."""
        self._say("\n".join(f"# {line}" for line in text.splitlines()) if self.dry_run else text)

    def run(self, *arguments: str, seconds: float = CALL_SECONDS, retry_seconds: float = 0.0) -> None:
        """A call whose output goes to the terminal.

        Args:
          seconds: after which it is ended.
          retry_seconds: how long a call that fails is tried again.

        Raises:
          RunError: it failed, or did not end in time.
        """
        command = self._command(arguments)
        self._say(shlex.join(command))
        if self.dry_run:
            return
        deadline = time.monotonic() + retry_seconds
        while True:
            status, _, _ = _call(command, seconds, capture=False)
            if status == 0:
                return
            if time.monotonic() > deadline:
                raise RunError(f"status {status}: {shlex.join(command)}")
            self._say(f"status {status}, trying again in {_RETRY_SECONDS:.0f} s")
            self._sleep(_RETRY_SECONDS)

    def output(self, *arguments: str, seconds: float = CALL_SECONDS) -> str:
        """The stdout of a call; "" in a dry run.

        Raises:
          RunError: it failed or did not end in time; names its last line of stderr.
        """
        command = self._command(arguments)
        if self.dry_run:
            self._say(shlex.join(command))
            return ""
        status, out, err = _call(command, seconds, capture=True)
        if status:
            said = (err.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"status {status}: {shlex.join(command)}: {said}")
        return out

    def read(self, *arguments: str) -> Any | None:
        """The JSON that a call prints; None in a dry run, and for what does not exist."""
        try:
            text = self.output(*arguments, "--format=json")
        except RunError as e:
            if "NOT_FOUND" in str(e):
                return None
            raise
        try:
            return json.loads(text) if text else None
        except ValueError as e:
            raise RunError(f"{shlex.join(self._command(arguments))}: expected JSON, found {text[:200]!r}") from e

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [PROGRAM, *arguments, *self._project, "--quiet"]


def _call(command: Sequence[str], seconds: float, capture: bool) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command; 124 for one that was ended after `seconds`."""
    pipe = subprocess.PIPE if capture else None
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, process_group=0
        )
    except FileNotFoundError as e:
        raise UserError(
            f"{PROGRAM}: not installed. Install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then "
            f"`{PROGRAM} auth login`; --dry_run prints what would run without it."
        ) from e
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124, "", f"it did not end within {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # also where Ctrl-C ends the launcher
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    return process.returncode, out or "", err or ""
