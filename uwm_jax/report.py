"""`report.html`: what a run did, in one offline file for someone who has never heard of it.

    python -m uwm_jax.report DIR                         writes DIR/report.html again
    python -m uwm_jax.report DIR DIR... [--output=FILE]  writes a comparison of the runs, comparison.html by default

Everything comes from the files of the workdirs, so that `evaluate` and `rollout` write the report again too.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from uwm_jax import cli
from uwm_jax.errors import UserError
from uwm_jax.files import local_path
from uwm_jax.reporting.comparison import compare
from uwm_jax.reporting.run_page import write

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("output", None, "the page to write; DIR/report.html, or comparison.html for several runs")


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("expected the directory of a run, or of several to compare; found none.")
    runs, output = [local_path(a, "DIR") for a in argv], cli.optional_path("output")
    if len(runs) == 1:
        print(f"wrote {write(runs[0], output)}")
    else:
        print(f"wrote {compare(runs, output or Path('comparison.html'))}")


if __name__ == "__main__":
    cli.run(main, define_flags)
