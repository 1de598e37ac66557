"""Calls of other programs: each has a time limit, is shown before it runs, or is only printed."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from uwm_jax.errors import RunError, UserError

CALL_SECONDS = 600.0

_RETRY_SECONDS = 20.0
_END_SECONDS = 10.0  # for a call that is ended to end by itself
_HEREDOC = "END"  # of what is shown of a call's stdin


class Program:
    """Runs a program, or with `dry_run` prints the commands that would run.

    Args:
      name: of the program.
      advice: how to install it, for the message that it is not there.
      common: arguments of all calls, after the others.
      say: prints a line.
    """

    def __init__(
        self,
        name: str,
        advice: str,
        dry_run: bool = False,
        common: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.dry_run = dry_run
        self._name, self._advice, self._common = name, advice, list(common)
        self._say, self._sleep = say, sleep

    def remark(self, text: str) -> None:
        """A line about the next call, a comment of the shell in a dry run."""
        self._say("\n".join(f"# {line}" for line in text.splitlines()) if self.dry_run else text)

    def run(
        self, *arguments: str, seconds: float = CALL_SECONDS, retry_seconds: float = 0.0, text: str | None = None
    ) -> None:
        """A call whose output goes to the terminal.

        Args:
          text: for its stdin, which is shown too.
          seconds: after which it is ended.
          retry_seconds: how long a call that fails is tried again.

        Raises:
          RunError: it failed, or did not end in time.
        """
        command = self._command(arguments)
        self._say(shlex.join(command) + (f" <<'{_HEREDOC}'\n{text.rstrip()}\n{_HEREDOC}" if text is not None else ""))
        if self.dry_run:
            return
        deadline = time.monotonic() + retry_seconds
        while True:
            status, _, _ = self._call(command, seconds, capture=False, text=text)
            if status == 0:
                return
            if time.monotonic() > deadline:
                raise RunError(f"status {status}: {shlex.join(command)}")
            self._say(f"status {status}, trying again in {_RETRY_SECONDS:.0f} s")
            self._sleep(_RETRY_SECONDS)

    def output(self, *arguments: str, seconds: float = CALL_SECONDS) -> str:
        """The stdout of a call; "" in a dry run.

        Raises:
          RunError: it failed or did not end in time; names the line of stderr that tells why.
        """
        command = self._command(arguments)
        if self.dry_run:
            self._say(shlex.join(command))
            return ""
        status, out, err = self._call(command, seconds, capture=True)
        if status:
            lines = err.strip().splitlines() or ["it said nothing"]
            said = next((line for line in lines if line.startswith("ERROR")), lines[-1])  # details may follow it
            raise RunError(f"status {status}: {shlex.join(command)}: {said}")
        return out

    def line(self, *arguments: str) -> str:
        """A call as a line of the shell."""
        return shlex.join(self._command(arguments))

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [self._name, *arguments, *self._common]

    def _call(
        self, command: Sequence[str], seconds: float, capture: bool, text: str | None = None
    ) -> tuple[int, str, str]:
        """(status, stdout, stderr) of a command; 124 for one that was ended after `seconds`."""
        pipe = subprocess.PIPE if capture else None
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                stdout=pipe,
                stderr=pipe,
                text=True,
                process_group=0,
            )
        except FileNotFoundError as e:
            raise UserError(
                f"{self._name}: not installed. {self._advice} --dry_run prints what would run without it."
            ) from e
        try:
            out, err = process.communicate(text, timeout=seconds)
        except subprocess.TimeoutExpired:
            return 124, "", f"it did not end within {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also where Ctrl-C ends the launcher
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SECONDS)
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode, out or "", err or ""
