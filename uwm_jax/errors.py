"""Exceptions whose message is all that a person needs: `cli.run` prints it without a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from uwm_jax.ending import drop_output


class UserError(Exception):
    """An unusable flag, config, file or shape; exit status 2.

    Names what is wrong, where, what was expected, what was found and what to do about it."""


class RunError(Exception):
    """A valid run failed (a loss that is not finite, a full disk); exit status 1.

    Names the step, what was found and what to do about it.
    """


class Preempted(RunError):
    """A signal ended the process, after everything was saved.

    Args:
      status: exit status, 128 plus the signal's number: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP.
    """

    def __init__(self, message: str, status: int = 143):
        super().__init__(message)
        self.status = status


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """At most two of the known names that are spelt like `name`, the closest first.

    Args:
      cutoff: similarity from 0 to 1 below which a name does not count.
    """
    return difflib.get_close_matches(name, list(known), n=2, cutoff=cutoff)


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean x?` for known names that are spelt like `name` or end in the same field; "" if there are none."""
    known = list(known)
    close = closest(name, known)
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:2]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def warn(message: str) -> None:
    """Prints a line to stderr and flushes it; does nothing if stderr is closed."""
    try:
        print(f"warning: {message}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop_output(sys.stderr)
