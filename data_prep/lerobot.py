"""Converts a LeRobot dataset (codebase v2.0, v2.1, v3.x) into the training layout that `uwm_jax.data` reads.

    python -m data_prep.lerobot --input=DIR --output=DIR

The input directory holds `meta/info.json`. Frames of videos are decoded by exact time stamps and stored as single
images; images in parquet files keep their bytes. `docs/data.md` lists how features are named, `uwm_jax.data.records`
describes the output. Statistics and the PCA image codec are made as by `data_prep.reshard`.
"""

from __future__ import annotations

from absl import flags

from data_prep.conversion import layout_options
from data_prep.conversion.training_layout import run
from data_prep.sources.decoding import time_limit
from data_prep.sources.lerobot.episodes import corpus
from uwm_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("input", None, "directory of a LeRobot dataset, with meta/info.json")
    flags.DEFINE_list("split", [], "splits of info.json to take, separated by commas; default all")
    flags.DEFINE_list("cameras", [], "cameras to take, separated by commas; default all but depth")
    flags.DEFINE_float("seconds", 300.0, "time limit for decoding one camera of an episode", lower_bound=0)
    layout_options.define_flags_of_pictures("frames that come from videos")


def main(call: cli.Call) -> None:
    source, output = cli.required_local_path("input"), layout_options.output()
    options, pictures = layout_options.from_flags(call), layout_options.pictures()
    seconds = time_limit(FLAGS.seconds)
    run(
        lambda: corpus(source, cameras=FLAGS.cameras, splits=FLAGS.split, pictures=pictures, seconds=seconds),
        output,
        options,
        source,
    )


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
