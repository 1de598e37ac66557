"""Shares of a job's tasks, for commands that many machines may run together: the flags `--task` and `--assemble`."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from uwm_jax.errors import UserError

FLAGS = flags.FLAGS

Share = tuple[int, int]  # (i, n): every n-th task from the i-th on, of 0 to n - 1


def define_flags(made: str) -> None:
    """Declares the flags; `made` is what the tasks make together."""
    flags.DEFINE_string(
        "task", "", "I/N, from 0/N to N-1/N: do this share of the tasks only, for N processes on one or more hosts"
    )
    flags.DEFINE_bool("assemble", False, f"make the {made} of tasks that --task has done, all of them")


def from_flags() -> Share | None:
    """The value of `--task`, None if it is not given.

    Raises:
        UserError: it has another form.
    """
    if not FLAGS.task:
        return None
    part, _, parts = FLAGS.task.partition("/")
    if not part.isdecimal() or not parts.isdecimal():
        raise UserError(f"--task={FLAGS.task}: expected I/N, as 0/8 to 7/8.")
    return int(part), int(parts)


def check(task: Share | None, assemble: bool) -> None:
    """Raises UserError if there is no such share, or both flags are given."""
    if task is not None and not 0 <= task[0] < task[1]:
        raise UserError(f"--task={task[0]}/{task[1]}: expected I/N with 0 <= I < N, as 0/8 to 7/8.")
    if task is not None and assemble:
        raise UserError("--task does a share of the tasks, and --assemble follows when all are done: give one.")


def without_flags(line: Sequence[str]) -> list[str]:
    """A command line as it does all that is left in one process."""
    kept: list[str] = []
    value_follows = False
    for word in line:
        name, equals, _ = word.partition("=")
        flag = name.lstrip("-") if name.startswith("-") else ""
        if not value_follows and flag not in ("task", "assemble", "noassemble"):
            kept.append(word)
        value_follows = flag == "task" and not equals
    return kept
