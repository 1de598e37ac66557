"""Writes the steps of a training dataset at which a window's present frame may lie: not where the robot stands idle.

    python -m data_prep.ranges --dataset=DIR     (or its name in $UWM_DATA_DIR)

writes `DIR/ranges/idle`, which training uses with `config.data.ranges = "idle"`. Nothing is cut, so that windows do not
jump in time: a window keeps the frames before and after its present one, idle or not. The default rule is openpi's for
DROID: a step is idle when all joint velocities differ from those before by less than 1e-3; idle runs of 7 or more go;
what is kept in runs of 16 or more stays, less its last 10 steps. Other data name another `--key` and `--threshold`.

Reads one column, no records or images. openpi's own JSON needs no conversion: `config.data.ranges = "FILE.json"`.
"""

from __future__ import annotations

import shlex

from absl import flags
from tqdm import tqdm

from data_prep.caches.idle import IdleRule, make_ranges, summary
from uwm_jax import cli
from uwm_jax.data.limits import NO_RANGES
from uwm_jax.data.places import find_dataset, local_dataset
from uwm_jax.data.records import read_manifest
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS
DEFAULT = IdleRule()


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "training dataset: a directory, or its name in $UWM_DATA_DIR")
    flags.DEFINE_string("name", "idle", "of the ranges, for config.data.ranges")
    flags.DEFINE_string("key", DEFAULT.key, "numbers of a step that tell whether the robot moves")
    flags.DEFINE_float("threshold", DEFAULT.threshold, "a step is idle when all of them change by less")
    flags.DEFINE_integer("min_idle", DEFAULT.min_idle, "idle steps in a row that are left out", lower_bound=1)
    flags.DEFINE_integer("min_kept", DEFAULT.min_kept, "steps in a row that stay", lower_bound=1)
    flags.DEFINE_integer("drop_last", DEFAULT.drop_last, "steps at the end of each of these that go", lower_bound=0)
    flags.DEFINE_bool("overwrite", False, "replace ranges of this name")


def main(call: cli.Call) -> None:
    directory = local_dataset(find_dataset(cli.required("dataset")))
    if FLAGS.name == NO_RANGES or FLAGS.name.endswith(".json"):
        raise UserError(
            f"--name={FLAGS.name}: config.data.ranges gives this value another meaning. Choose another name."
        )
    if not 0 < FLAGS.threshold < float("inf"):
        raise UserError(f"--threshold={FLAGS.threshold}: expected a number above 0.")
    rule = IdleRule(FLAGS.key, FLAGS.threshold, FLAGS.min_idle, FLAGS.min_kept, FLAGS.drop_last)
    steps = sum(split["steps"] for split in read_manifest(directory)["splits"].values())
    with tqdm(total=steps, unit="step", unit_scale=True, desc="steps", delay=1) as bar:
        ranges, was_complete = make_ranges(
            directory,
            FLAGS.name,
            rule,
            shlex.join(call.line),
            bar.update,
            overwrite=FLAGS.overwrite,
        )
    print(f"{summary(ranges)}\n{'already complete' if was_complete else 'wrote'}: {ranges.directory}")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
