"""Converts hdf5 files of robomimic or LIBERO into the training layout that `uwm_jax.data` reads.

    python -m data_prep.hdf5 --input=FILE_OR_DIR --output=DIR

The input is a file, or a directory of files such as those of a LIBERO suite. Pictures are encoded, and turned upright
(`--flip`); `docs/data.md` lists how keys are named, `uwm_jax.data.records` describes the output. Statistics and the PCA
image codec are made as by `data_prep.reshard`.
"""

from __future__ import annotations

from absl import flags

from data_prep.conversion import layout_options
from data_prep.conversion.training_layout import run
from data_prep.sources.hdf5.episodes import FLIPS, corpus
from uwm_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("input", None, "hdf5 file of robomimic or LIBERO, or a directory of such files")
    flags.DEFINE_list("split", [], "masks to take, separated by commas; default all that share no demonstration")
    flags.DEFINE_enum(
        "flip",
        None,
        FLIPS,
        "how stored pictures become upright: rows in reverse order, a turn by 180 degrees, or none; default rows for "
        "LIBERO and none for robomimic",
    )
    layout_options.define_flags_of_pictures("pictures")


def main(call: cli.Call) -> None:
    source, output = cli.required_local_path("input"), layout_options.output()
    options, pictures = layout_options.from_flags(call), layout_options.pictures()
    run(lambda: corpus(source, splits=FLAGS.split, flip=FLAGS.flip, pictures=pictures), output, options, source)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
