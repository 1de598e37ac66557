"""`report.html`: what a run did, in one offline file for someone who has never heard of it.

    python -m uwm_jax.report --workdir=DIR [--output=FILE]  writes DIR/report.html again
    python -m uwm_jax.report DIR DIR... [--output=FILE]     writes a comparison of the runs, comparison.html by default

`report DIR` is the same as `report --workdir=DIR`. Everything comes from the files of the workdirs, so that `evaluate`
and `rollout` write the report again too. `--output` writes it elsewhere, also for runs that can only be read.
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
    flags.DEFINE_string("workdir", None, "the run's directory; several runs are given without a flag")
    cli.accept_arguments()
    flags.DEFINE_string(
        "output",
        None,
        "the page to write, FILE.html; DIR/report.html, or comparison.html for several runs, by default; or a folder "
        "for it, which may hold results that --output of evaluate or rollout wrote",
    )


def main(call: cli.Call) -> None:
    workdir = cli.optional_path("workdir")
    if workdir and call.arguments:
        other = call.arguments[0]
        raise UserError(f"--workdir={FLAGS.workdir}: found {other!r} too. To compare, give all without the flag.")
    runs = [workdir] if workdir else [local_path(a, "DIR") for a in call.arguments]
    if not runs:
        raise UserError("--workdir is required, or the directories of several runs to compare; found none.")
    output, name = cli.optional_path("output"), "comparison.html" if runs[1:] else "report.html"
    results = output if output and (output.is_dir() or output.suffix.lower() not in (".html", ".htm")) else None
    page = results / name if results else output or (Path(name) if runs[1:] else runs[0] / name)
    try:
        print(f"wrote {compare(runs, page) if runs[1:] else write(runs[0], page, results)}")
    except OSError as e:
        if e.filename is None or Path(e.filename) not in (page, *page.parents):
            raise
        raise UserError(f"{page} cannot be written: {e.strerror}. --output=FILE writes the page elsewhere.") from e


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
