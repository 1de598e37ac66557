"""Cuts an RLDS dataset into the chunked training layout that `uwm_jax.data` reads.

    python -m data_prep.reshard --input=DIR --output=DIR

The input directory holds the TFDS `dataset_info.json`. Episodes are cut into records of `--chunk_steps` steps; encoded
images and all other values keep their bytes. `uwm_jax.data.records` describes the output. Finally the statistics are
computed and the PCA image codec is fitted on training episodes, so that the dataset is ready to train on.
"""

from __future__ import annotations

from absl import flags

from data_prep.training_layout import MAX_SKIPPED, reshard, summary
from uwm_jax import cli
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("input", None, "directory of an RLDS dataset, with dataset_info.json and features.json")
    flags.DEFINE_string("output", None, "directory to create")
    flags.DEFINE_list("split", [], "splits to take, separated by commas; default all")
    flags.DEFINE_integer("chunk_steps", 16, "steps per record", lower_bound=1)
    flags.DEFINE_integer("shard_mb", 256, "size of a shard in MiB", lower_bound=1)
    flags.DEFINE_list("codec_size", [], "H,W at which the PCA codec is fitted; default the cameras' size")
    flags.DEFINE_integer("pca_patch", 8, "side of the PCA codec's patches in pixels", lower_bound=1)
    flags.DEFINE_integer("pca_channels", 12, "latent channels of the PCA codec", lower_bound=1)
    flags.DEFINE_float("val_ratio", 0.05, "share of episodes held out of the codec's fit, as config.data.val_ratio")
    flags.DEFINE_integer("workers", 0, "processes; 0 = one per core", lower_bound=0)
    flags.DEFINE_bool("overwrite", False, "replace an existing output")
    flags.DEFINE_float(
        "max_skipped", MAX_SKIPPED, "largest share of episodes that may be skipped; one is always allowed"
    )


def main(call: cli.Call) -> None:
    source, output = cli.required_path("input"), cli.required_path("output")
    size = None
    if FLAGS.codec_size:
        if len(FLAGS.codec_size) != 2 or not all(n.isdigit() and int(n) > 0 for n in FLAGS.codec_size):
            raise UserError(f"--codec_size: expected H,W in pixels, found {','.join(FLAGS.codec_size)!r}.")
        size = (int(FLAGS.codec_size[0]), int(FLAGS.codec_size[1]))
    manifest = reshard(
        source,
        output,
        splits=FLAGS.split,
        chunk_steps=FLAGS.chunk_steps,
        shard_mb=FLAGS.shard_mb,
        codec_size=size,
        pca_patch=FLAGS.pca_patch,
        pca_channels=FLAGS.pca_channels,
        val_ratio=FLAGS.val_ratio,
        workers=FLAGS.workers,
        overwrite=FLAGS.overwrite,
        max_skipped=FLAGS.max_skipped,
    )
    print(f"{output}: {summary(manifest)}")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
