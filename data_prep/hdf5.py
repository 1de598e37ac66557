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
from data_prep.sources.inputs import Corpus
from uwm_jax import cli
from uwm_jax.data.episodes import JPEG_QUALITY

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
    flags.DEFINE_enum("encoding", "jpeg", ["jpeg", "png"], "encoding of pictures")
    flags.DEFINE_integer("quality", JPEG_QUALITY, "JPEG quality", lower_bound=1, upper_bound=100)
    layout_options.define_flags(resize="H,W of all cameras: resized to it before they are encoded; default: their own")


def main(call: cli.Call) -> None:
    source, output = cli.required_local_path("input"), layout_options.output()

    options = layout_options.from_flags(call)

    def opened() -> Corpus:
        return corpus(
            source,
            splits=FLAGS.split,
            flip=FLAGS.flip,
            encoding=FLAGS.encoding,
            quality=FLAGS.quality,
            resize=options.resize,
        )

    run(opened, output, options, source)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
