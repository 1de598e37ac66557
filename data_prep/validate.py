"""Checks a training dataset from end to end, before hours are spent on it.

    python -m data_prep.validate --dataset=DIR [--strict]     (or its name in $UWM_DATA_DIR)

Reads every record once: its checksum, its keys and numbers of values, its columns, the header of every image; decodes
`--decode` frames of each camera and episode. Columns are checked for values that are not finite, constant dimensions
and outliers, sidecars (latents, texts, ranges) for their checksums. What training refuses is an error and gives exit
status 2; what is legal and often a mistake is a warning, which counts only with `--strict`.
"""

from __future__ import annotations

import collections
import json

from absl import flags

from data_prep.checks.validation import ERROR, Limits, validate
from uwm_jax import cli
from uwm_jax.data.places import find_dataset
from uwm_jax.errors import UserError
from uwm_jax.files import write_text

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "training dataset: a directory, or its name in $UWM_DATA_DIR")
    flags.DEFINE_list("split", [], "splits to check, separated by commas; default all")
    flags.DEFINE_bool("strict", False, "exit with status 2 for warnings too")
    flags.DEFINE_integer("min_steps", Limits.min_steps, "episodes with fewer steps are too short", lower_bound=1)
    flags.DEFINE_float(
        "bound",
        Limits.bound,
        "largest distance of a value from its column's middle, in halves of the range of 98 % of its values",
        lower_bound=1.0,
    )
    flags.DEFINE_integer("decode", Limits.decode, "frames decoded of each camera and episode; -1 = all", lower_bound=-1)
    flags.DEFINE_integer("workers", 0, "processes; 0 = one per core", lower_bound=0)
    flags.DEFINE_string("json", "", "file for the findings: a list of level, where and text")


def main(call: cli.Call) -> None:
    directory = find_dataset(cli.required("dataset"))
    if not FLAGS.bound < float("inf"):
        raise UserError(f"--bound={FLAGS.bound:g}: expected a number of at least 1.")
    limits = Limits(FLAGS.min_steps, FLAGS.bound, FLAGS.decode)
    found = validate(directory, limits, FLAGS.split, FLAGS.workers)
    if file := cli.optional_path("json"):
        write_text(file, json.dumps([finding._asdict() for finding in found], indent=1))
    for finding in found:
        print(finding)
    levels = collections.Counter(finding.level for finding in found)
    errors, warnings = levels[ERROR], levels.total() - levels[ERROR]
    print(f"{directory}: {errors} errors, {warnings} warnings")
    if errors or (FLAGS.strict and warnings):
        what = "errors" if errors else "warnings, which --strict does not allow"
        raise UserError(f"{directory} has {what}, listed above.")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
