"""Trains runs that differ in loss weights, learning rate and seed in one program.

    python -m launch.sweep --config=configs/sweeps/loss_weights.py --workdir=runs/loss_weights
    python -m launch.sweep --config=configs/quickstart.py --grid=loss.weights.action=1,5 --grid=seed=0,1 --workdir=DIR

A config file of a sweep has `get_members()`, which returns what each member changes, besides `get_config()`. Members
that differ in other fields train one group after another; the grouping is printed first. Each member is an ordinary
workdir, `DIR/members/<name>`, that every command understands. The same command continues a sweep that was stopped.
`DIR/sweep.json` holds what became of each member, `DIR/sweep.html` compares them. Exits with status 1 if a member has
diverged: it was frozen where its loss was no longer finite, and the others went on.
"""

from __future__ import annotations

from absl import flags

from uwm_jax import cli, config_help
from uwm_jax import config as config_lib
from uwm_jax.errors import RunError, warn
from uwm_jax.parallel import distributed
from uwm_jax.parallel.distributed import say
from uwm_jax.reporting import pictures, sweep_page
from uwm_jax.sweeps import members as members_lib
from uwm_jax.sweeps.run import run_sweep
from uwm_jax.training import provenance

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument] of a sweep, or of a run with --grid")
    flags.DEFINE_multi_string("grid", None, "FIELD=V1,V2 such as seed=0,1; several make all combinations")
    flags.DEFINE_string("workdir", None, "directory of the sweep: members, sweep.json, sweep.html")
    distributed.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    spec, directory = cli.required("config"), cli.required_path("workdir")
    base = config_lib.load(spec, call.overrides)
    overrides = members_lib.asked_for(spec, FLAGS.grid)
    members = members_lib.make_members(base, overrides)
    groups = members_lib.groups(members)

    def describe(member: members_lib.Member) -> dict:
        return provenance.describe(call.line, spec, member.config, [*call.changed, *member.overrides])

    def draw_page() -> None:
        try:
            say(f"wrote {sweep_page.write(directory)}")
        except Exception as e:  # never the end of a sweep
            warn(f"{directory / sweep_page.FILE} was not written: {e}")

    with distributed.session():
        say(members_lib.describe(groups))
        diverged = run_sweep(directory, groups, describe, pictures.draw, draw_page, call.began)
    if diverged:
        raise RunError(f"{len(diverged)} of {len(members)} members have diverged: {', '.join(diverged)}.")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
