"""The row of a plan, before anything is paid for: shown where it is cached, made where it is not.

What does not fit its topology is refused. A command without a config, a machine without libtpu and `--no_plan` have no
row, and a line says so.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from launch import training_command
from launch.training_command import TRAINS, TrainingCommand
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.planning import children, sizes
from uwm_jax.planning.programs import programs
from uwm_jax.planning.rows import Question, Row, known_row, row
from uwm_jax.planning.table import overview


def check(
    topology: str,
    command: Sequence[str],
    *,
    no_plan: bool,
    dry_run: bool,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Shows the plan of a command on a topology.

    Args:
      topology: as `uwm_jax.plan` names it: `v5e-16`, `2xv5e-16`.
      command: `python -m uwm_jax.train --config=...`, one argument an entry.
      no_plan: starts without one.
      dry_run: compiles nothing; where nothing is cached, a line has the command that makes the row.

    Raises:
      UserError: the command's program does not fit the topology, cannot run on it, or its plan failed.
    """
    asked = training_command.read(command)
    if no_plan:
        return say("no plan: --no_plan")
    if asked.module not in TRAINS or not asked.config:
        return say(f"no plan: {asked.module or 'the command'} has no --config that trains")
    if importlib.util.find_spec("libtpu") is None:
        return say("no plan: libtpu is not installed here: `pip install 'uwm-jax[plan]'` (Linux on x86-64)")
    rows = []
    for config, question in _questions(asked, say):
        found = known_row(topology, config, question)
        if found is None and dry_run:
            flags = [f"--config={asked.config}", *(f"--config.{name}={value}" for name, value in asked.overrides)]
            flags += [f"--grid={values}" for values in asked.grid]
            return say(f"no plan yet: python -m uwm_jax.plan --topology={topology} {shlex.join(flags)}")
        rows.append(found or row(topology, config, question, say))
    say(overview(rows))
    _refuse(rows, topology)
    for found in rows:
        if found["failure"]:  # of evaluations alone
            say(f"not planned: {found['failure']}")


def _refuse(rows: Sequence[Row], topology: str) -> None:
    for found in rows:
        if found["fits"] is False or "collectives" not in found:  # there is no program
            why = found["failure"] or "the step needs more memory than a chip has"
            ways = f" To try: {', '.join(found['to_try'])}." if found.get("to_try") else ""
            raise UserError(
                f"the plan for {topology} says that this run cannot train there: {why.rstrip('.')}.{ways} "
                "--no_plan starts it all the same."
            )


def _questions(command: TrainingCommand, say: Callable[[str], None]) -> list[tuple[ConfigDict, Question]]:
    config = config_lib.load(command.config, command.overrides)
    found = programs(command.config, config, command.grid, say)
    asked = []
    for number, (one, names) in enumerate(found, 1):
        question = Question(sizes.of_data(one, command.config), cache=children.default_cache())
        asked.append(
            (one, dataclasses.replace(question, names=names, members=len(names), program=number, programs=len(found)))
        )
    return asked
