"""Plans a run before it is paid for: whether it fits TPUs that this machine lacks, and how fast it can be at best.

    python -m uwm_jax.plan --config=configs/droid.py --topology=v5e-16,v5p-128

It compiles the very step that `uwm_jax.train` runs, for each topology, with libtpu on a CPU machine (`pip install
'uwm-jax[plan]'`). Everything that it prints is predicted and was never run; docs/scale.md says how.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli, codecs, config_help, files
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.files import local_path
from uwm_jax.planning import children, search, sizes, topology
from uwm_jax.planning.programs import programs
from uwm_jax.planning.rows import Question, Row, refused, row, whole_sweep
from uwm_jax.planning.table import table
from uwm_jax.planning.topology import HERE

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_multi_string("grid", None, "FIELD=V1,V2 makes a sweep of the config, as launch.sweep does")
    flags.DEFINE_list("topology", None, f"v5e-16, v5p-128, 2xv5e-16, ..., or {HERE}: the devices of this machine")
    flags.DEFINE_string("json", None, "also write the rows to this file")
    flags.DEFINE_float("price", None, "of a chip-hour, in any currency; tells what all steps cost", lower_bound=0.0)
    flags.DEFINE_float("efficiency", 0.4, "share of the peak for which speed is told as well", 0.001, 1.0)
    flags.DEFINE_bool(
        "latents", False, "as --config.data.latents with the name of the codec: what a step costs without encoding"
    )
    flags.DEFINE_bool("search", False, "try meshes, remat policies, parts of a batch and nearby batches that divide")
    flags.DEFINE_integer("best", 4, "programs of each topology that --search compiles at most", lower_bound=1)
    flags.DEFINE_bool("measure", False, f"also run the step on the devices of this machine (--topology={HERE})")
    flags.DEFINE_list("sizes", [], "KEY=HEIGHTxWIDTH or KEY=WIDTH of data that are not there; before data_sizes()")
    flags.DEFINE_string("cache", None, 'directory that keeps what was compiled; "" = none, default ~/.cache/uwm_jax')
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    file = cli.required("config")
    config = config_lib.load(file, call.overrides)
    if FLAGS.latents and not config.data.latents:
        config = from_latents(config)
    names = _topologies(FLAGS.topology or [HERE] * FLAGS.measure or cli.required("topology"))
    output = cli.optional_path("json")
    if output:
        files.check_output_file(output, "--json")
    cache = children.default_cache() if FLAGS.cache is None else FLAGS.cache and local_path(FLAGS.cache, "--cache")
    asked = []
    found = programs(file, config, FLAGS.grid, say)
    if FLAGS.search and found[0][1]:
        raise UserError("--search tries meshes of single runs: leave it out for a sweep.")
    for number, (one, names_of) in enumerate(found, 1):
        data = sizes.of_data(one, file, FLAGS.sizes)
        question = Question(data, FLAGS.efficiency, FLAGS.price, cache or None, FLAGS.measure)
        question = dataclasses.replace(question, names=names_of, program=number, programs=len(found))
        asked.append((one, dataclasses.replace(question, members=len(names_of))))
    rows: list[Row] = []
    for name in names:
        made = [row for one, question in asked for row in plan(name, one, question)]
        rows += whole_sweep(made) if len(asked) > 1 else made
    print(table(rows))
    if output:
        files.write_text(output, json.dumps(rows, indent=2) + "\n")


def from_latents(config: ConfigDict) -> ConfigDict:
    """The same run from cached latents of its codec.

    Raises:
      UserError: it cannot train from latents.
    """
    codec = codecs.of_config(config)
    if codec is None:
        raise UserError(f"--latents: config.system={config.system!r} has no codec, hence no latents.")
    config = config.copy_and_resolve_references()
    config.data.latents = codec.name
    config_lib.validate(config)
    return config


def plan(name: str, config: ConfigDict, question: Question) -> list[Row]:
    """The row of a topology; with `--search` those of the search, the best first."""
    if not FLAGS.search:
        return [row(name, config, question, say)]
    try:
        return search.search(name, config, question, best=FLAGS.best, say=say)
    except UserError as e:
        return [refused(name, config, question, e)]


def _topologies(given: Sequence[str]) -> list[str]:
    """The names of `--topology`, each known."""
    names = [name.strip() for name in given if name.strip()]
    for name in names:
        if name != HERE:
            topology.find(name)
    if not names:
        raise UserError("--topology: expected at least one name, such as v5e-16.")
    if FLAGS.measure and HERE not in names:
        raise UserError(f"--measure runs on the devices of this machine: add {HERE} to --topology, or leave it out.")
    if FLAGS.search and HERE in names:
        raise UserError(f"--search requires topologies of TPUs, found --topology={HERE}.")
    if importlib.util.find_spec("libtpu") is None and set(names) != {HERE}:
        raise UserError("--topology: libtpu is not installed: `pip install 'uwm-jax[plan]'` (Linux on x86-64 only).")
    return names


def say(line: str) -> None:
    """Prints a line about progress."""
    print(line, file=sys.stderr, flush=True)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
