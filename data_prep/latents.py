"""Encodes the frames of a dataset once, so that training reads latents in place of encoding frames in every step.

    python -m data_prep.latents --config=FILE.py --config.model.codec.posterior=mode --estimate
    python -m data_prep.latents --config=FILE.py --config.model.codec.posterior=mode --variants=2
    python -m uwm_jax.train --config=FILE.py --config.model.codec.posterior=mode --config.data.latents=vae --workdir=DIR

The config is that of the run: its frozen codec, its sources with their cameras, resize, crop and augmentation. It
first prints what the cache costs and whether it pays. The latents lie in the dataset, in `latents/<codec>/<camera>`,
and leave it as it is. A job that was killed continues when it is started again. Many machines share the work, each
with its `--task=I/N`; `--assemble` then finishes the caches. docs/latents.md says what training from latents is.
"""

from __future__ import annotations

import shlex

from absl import flags

from data_prep.caches.latents.caching import Options, make
from data_prep.jobs import shares
from uwm_jax import cli, config_help
from uwm_jax import config as config_lib
from uwm_jax.data.latents import DTYPES, MOST_PARTS

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument] of the run; fields change with --config.any.field=value")
    flags.DEFINE_integer("variants", 1, "draws of crop and jitter of each episode and camera", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of these draws", lower_bound=0)
    flags.DEFINE_bool("moments", False, "store mean and log-variance, for config.model.codec.posterior=sample")
    flags.DEFINE_enum("dtype", Options.dtype, DTYPES, "of the stored numbers")
    flags.DEFINE_enum("episodes", Options.episodes, ("all", "used"), "of the dataset, or those that the config selects")
    flags.DEFINE_integer(
        "steps_per_part",
        Options.steps_per_part,
        f"steps of a file, which is what a killed job loses; more where a split would have over {MOST_PARTS} files",
        lower_bound=1,
    )
    flags.DEFINE_bool("estimate", False, "only say what it costs and whether it pays")
    flags.DEFINE_bool("overwrite", False, "replace caches that are there; with --task, those of other settings")
    shares.define_flags("caches")
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    config = config_lib.load(cli.required("config"), call.overrides)
    options = Options(
        variants=FLAGS.variants,
        seed=FLAGS.seed,
        moments=FLAGS.moments,
        dtype=FLAGS.dtype,
        episodes=FLAGS.episodes,
        steps_per_part=FLAGS.steps_per_part,
        task=shares.from_flags(),
        assemble=FLAGS.assemble,
    )
    command = shlex.join(part for part in shares.without_flags(call.line) if part != "--overwrite")
    for cache in make(config, options, command=command, overwrite=FLAGS.overwrite, estimate=FLAGS.estimate):
        print(f"{cache.directory}: {cache.facts['steps']:,} steps of {cache.facts['episodes']:,} episodes")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
