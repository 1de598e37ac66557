"""Exceptions whose message is all that a person needs: `cli.run` prints it without a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from uwm_jax.ending import drop_output


class UserError(Exception):
    """An unusable flag, config, file or shape; exit status 2.

    Says what is wrong, where, what was expected, what was found and what to do about it."""


class RunError(Exception):
    """A run that was well asked for went wrong (a loss that is not finite); exit status 1.

    Says at which step, what was seen and what to do about it.
    """


class Preempted(RunError):
    """The process was told to end by a signal and did so in good order: nothing is lost.

    Args:
      status: of the process, 128 and the signal's number: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP.
    """

    def __init__(self, message: str, status: int = 143):
        super().__init__(message)
        self.status = status


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean x?`, of what is spelt like `name` or ends in the same field; empty where nothing is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:2]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def warn(message: str) -> None:
    """A line on stderr, at once; raises nothing where nobody can read it any more."""
    try:
        print(f"warning: {message}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop_output(sys.stderr)
