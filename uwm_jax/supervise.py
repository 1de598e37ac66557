"""Starts a training command on this host and starts it again whenever it ends abnormally.

    python -m uwm_jax.supervise [--restarts=5] -- python -m uwm_jax.train --workdir=DIR [flags of uwm_jax.train]

One supervisor runs on each host of a run. The command continues from its newest durable checkpoint by itself. It is
final that it ends with status 0 (done), 2 (an unusable flag, config or file) or 130 (Ctrl-C), and that the supervisor
itself is told to end (SIGTERM, Ctrl-C, SIGHUP), which it passes on and which the command saves on. After any other end,
also by a signal that only the command got, it is started again. So are not the members of a sweep that have all ended.
Pauses between starts double until there is a new checkpoint; --restarts of them in a row without one are the bound,
and the supervisor then ends with status 1. Otherwise its status is the command's, 128 + n for signal n.
`goodput` and `time/downtime` in `metrics.jsonl` count from the supervisor's start (docs/scale.md).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from absl import flags

from uwm_jax import cli
from uwm_jax.errors import UserError
from uwm_jax.files import place
from uwm_jax.supervision import Process, Supervisor, Workdir, flag_of

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run or sweep; by default that of the command's --workdir")
    flags.DEFINE_integer("restarts", 5, "the most in a row without a new durable checkpoint", lower_bound=0)
    flags.DEFINE_float("pause", 5.0, "seconds before the first of them; each further one waits twice as long", 0.0)
    cli.pass_on()


def main(call: cli.Call) -> None:
    command = call.passed_on
    if not command:
        raise UserError("expected a command after --, such as: -- python -m uwm_jax.train --workdir=DIR")
    named = FLAGS.workdir or flag_of(command, "workdir")
    if not named:
        raise UserError(
            "the command after -- has no --workdir, where checkpoints are looked for: give supervise its own --workdir."
        )
    workdir = Workdir(place(named, "--workdir"))

    def start(variables: Mapping[str, str]) -> Process:
        return Process(command, os.environ | variables)

    supervisor = Supervisor(start, workdir, FLAGS.restarts, FLAGS.pause)
    with supervisor.signals():
        status = supervisor.run()
    if status:
        sys.exit(status)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
