"""`report.html`: what a run did, in one offline file for someone who has never heard of it.

    python -m uwm_jax.report --workdir=DIR [--output=FILE]  writes DIR/report.html again
    python -m uwm_jax.report DIR DIR... [--output=FILE]     writes a comparison of the runs, comparison.html by default
    python -m uwm_jax.report --workdir=SWEEP [--x=METRIC] [--y=METRIC] [--output=FILE]  writes SWEEP/sweep.html again

`report DIR` is the same as `report --workdir=DIR`. Everything comes from the files of the workdirs, so that `evaluate`
and `rollout` write the report again too. `--output` writes it elsewhere, also for runs that can only be read.
"""

from __future__ import annotations

from absl import flags

from uwm_jax import cli
from uwm_jax.errors import UserError
from uwm_jax.files import as_place, place
from uwm_jax.reporting import run_page, sweep_page
from uwm_jax.reporting.comparison import compare
from uwm_jax.sweeps import record

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "the run's directory; several runs are given without a flag")
    cli.accept_arguments()
    flags.DEFINE_string(
        "output",
        None,
        "the page to write, FILE.html; DIR/report.html, comparison.html for several runs, or DIR/sweep.html, by "
        "default; or a folder for it, which may hold results that --output of evaluate or rollout wrote",
    )
    for axis, default in zip("xy", sweep_page.AXES, strict=True):
        flags.DEFINE_string(axis, None, f"of a sweep: metric of its picture's {axis} axis ({default} by default)")


def main(call: cli.Call) -> None:
    workdir = cli.optional_path("workdir")
    if workdir and call.arguments:
        other = call.arguments[0]
        raise UserError(f"--workdir={FLAGS.workdir}: found {other!r} too. To compare, give all without the flag.")
    runs = [workdir] if workdir else [place(a, "DIR") for a in call.arguments]
    if not runs:
        raise UserError("--workdir is required, or the directories of several runs to compare; found none.")
    is_sweep = not runs[1:] and (runs[0] / record.FILE).is_file()
    for axis in "xy" if not is_sweep else "":
        if FLAGS[axis].value is not None:
            raise UserError(f"--{axis}={FLAGS[axis].value} requires one directory of a sweep, with its {record.FILE}.")
    output = cli.optional_path("output")
    name = "comparison.html" if runs[1:] else sweep_page.FILE if is_sweep else "report.html"
    results = output if output and (output.is_dir() or output.suffix.lower() not in (".html", ".htm")) else None
    page = results / name if results else output or (as_place(name) if runs[1:] else runs[0] / name)
    try:
        if is_sweep:
            sweep_page.write(runs[0], page, FLAGS.x, FLAGS.y)
        elif runs[1:]:
            compare(runs, page)
        else:
            run_page.write(runs[0], page, results)
        print(f"wrote {page}")
    except OSError as e:
        if e.filename is None or as_place(e.filename) not in (page, *page.parents):
            raise
        raise UserError(f"{page} cannot be written: {e.strerror}. --output=FILE writes the page elsewhere.") from e


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
