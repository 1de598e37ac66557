"""Embeds the instructions of a training dataset with CLIP, each distinct one once.

    python -m data_prep.text --dataset=DIR --encoder=openai/clip-vit-base-patch32

writes the table `DIR/text/clip`, which training reads with `config.data.text_table = "clip"` and `config.data.text` = a
key of strings. DIR is a directory or a name in $UWM_DATA_DIR; the dataset itself is not changed. A job that was
interrupted continues when the same command is run again. Needs the extra `torch`.

    python -m data_prep.text --embed="put the cup on the plate" --dataset=DIR --output=text.npy

writes the embedding of one sentence, by the encoder of that table, or by `--encoder` alone: the `text` of a policy's
observation.
"""

from __future__ import annotations

import shlex

from absl import flags

from data_prep.caches import embedding
from data_prep.jobs.output import local_output
from uwm_jax import cli
from uwm_jax.data.places import find_dataset, local_dataset
from uwm_jax.envs.parallel import cores
from uwm_jax.errors import UserError
from uwm_jax.files import check_output_file

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "training dataset: a directory, or its name in $UWM_DATA_DIR")
    flags.DEFINE_string(
        "encoder", None, "CLIP: a folder as transformers saves it, or a hub name owner/name[@revision][/subfolder]"
    )
    flags.DEFINE_string("name", "clip", "of the table, for config.data.text_table")
    flags.DEFINE_list("keys", [], "keys of strings, of steps or episodes; by default those that are named as language")
    flags.DEFINE_integer("batch_size", 256, "strings that are embedded at once", lower_bound=1)
    flags.DEFINE_integer("workers", 0, "processes that read records; 0 = all cores", lower_bound=0)
    flags.DEFINE_bool("overwrite", False, "replace a table of this name")
    flags.DEFINE_string("embed", None, "a sentence: embed it alone and write --output")
    flags.DEFINE_string("output", None, "the .npy of --embed, (E,) float32")


def main(call: cli.Call) -> None:
    if FLAGS.embed is not None:
        _embed_sentence(FLAGS.embed)
        return
    if FLAGS.output is not None:
        raise UserError("--output requires --embed: a table lies inside its dataset.")
    directory, encoder = local_dataset(find_dataset(cli.required("dataset"))), cli.required("encoder")
    table, was_complete = embedding.make_table(
        directory,
        FLAGS.name,
        encoder,
        keys=FLAGS.keys,
        batch_size=FLAGS.batch_size,
        workers=FLAGS.workers or cores(),
        command=shlex.join(call.line),
        overwrite=FLAGS.overwrite,
    )
    print(embedding.summary(table))
    print(f"{'already complete' if was_complete else 'wrote'}: {table.directory}")


def _embed_sentence(sentence: str) -> None:
    output = local_output()
    check_output_file(output)
    try:
        sentence.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"--embed: {sentence!r} is not UTF-8.") from e
    encoder, sha256 = FLAGS.encoder, ""
    if FLAGS.dataset is not None:
        recorded, sha256 = embedding.encoder_of(find_dataset(FLAGS.dataset), FLAGS.name)
        encoder = encoder or recorded
    if not encoder:
        raise UserError("--embed: name the encoder by --encoder, or by the --dataset whose table it made.")
    made = embedding.write_embedding(sentence, output, encoder, sha256)
    print(f"wrote {output}: {made.shape[0]} numbers")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
