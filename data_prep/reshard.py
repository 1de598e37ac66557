"""Cuts an RLDS dataset into the chunked training layout that `uwm_jax.data` reads.

    python -m data_prep.reshard --input=DIR --output=DIR

The input directory holds the TFDS `dataset_info.json`. Episodes are cut into records of `--chunk_steps` steps; encoded
images and all other values keep their bytes. `uwm_jax.data.records` describes the output. Finally the statistics are
computed and the PCA image codec is fitted on training episodes, so that the dataset is ready to train on.
"""

from __future__ import annotations

from absl import flags

from data_prep.conversion import layout_options
from data_prep.conversion.training_layout import run
from data_prep.sources.rlds import corpus
from uwm_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("input", None, "directory of an RLDS dataset, with dataset_info.json and features.json")
    flags.DEFINE_list("split", [], "splits to take, separated by commas; default all")
    flags.DEFINE_integer(
        "max_missing_files", 0, "how many files of the input may be missing; the manifest names them", lower_bound=0
    )
    layout_options.define_flags()


def main(call: cli.Call) -> None:
    source, output = cli.required_local_path("input"), layout_options.output()
    run(lambda: corpus(source, FLAGS.split, FLAGS.max_missing_files), output, layout_options.from_flags(call), source)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
