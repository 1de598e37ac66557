"""Measures what sharing a program saves: members of a sweep together against the same members one after another.

    python -m uwm_jax.benchmark_sweep
    python -m uwm_jax.benchmark_sweep --config=configs/pusht_cpu.py:short --members=4 --members_at_once=1,0

Both sides make the same steps of the same members, which differ in a loss weight: as single runs, each of which encodes
its batch, and in one program, which encodes it once. Blocks of both alternate in one process; compilation is excluded,
and data and weights are synthetic. Without `--config` it is a small model whose frozen VAE has about as many times the
network's operations as that of `configs/droid.py` (7.9; the network counts its forward pass three times): the ratio is
what sharing can save, and is printed with the result.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from uwm_jax import cli, codecs, config_help, files, synthetic
from uwm_jax import config as config_lib
from uwm_jax.benchmarking import clock
from uwm_jax.codecs import Codec
from uwm_jax.errors import UserError
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.sweeps.members import make_members
from uwm_jax.sweeps.program import SweepProgram
from uwm_jax.training.build import build

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; by default a small model with DROID's share of the VAE")
    flags.DEFINE_integer("members", 8, "members of the sweep", lower_bound=2)
    flags.DEFINE_list("members_at_once", ["1"], "how many are computed side by side, a row for each; 0 = all")
    flags.DEFINE_integer("blocks", 5, "timed blocks of either side", lower_bound=2)
    flags.DEFINE_string("json", None, "also write the numbers to this file")
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    output = cli.optional_path("json")
    if output:
        files.check_output_file(output, "--json")
    codec = None
    if FLAGS.config:
        config = config_lib.load(FLAGS.config, call.overrides)
    else:
        config, codec = small_model()
        config_lib.apply_overrides(config, call.overrides)
        config_lib.validate(config)
    sizes = [_count(text) for text in FLAGS.members_at_once]
    rows = [benchmark(config, FLAGS.members, size, FLAGS.blocks, codec) for size in sizes]
    print(cli.table([(name, *(_text(row[name]) for row in rows)) for name in rows[0]]))
    if output:
        files.write_text(output, json.dumps(rows, indent=2) + "\n")


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"--members_at_once={text}: expected numbers of members such as 1,2,0 (0 = all).")
    return int(text)


def small_model() -> tuple[ConfigDict, Codec]:
    """The quickstart's network on 64-pixel frames with a narrow VAE, so that a CPU makes steps of it in a second."""
    c = config_lib.base()
    c.batch_size = 32
    c.data.cameras, c.data.low_dim = ("image",), ("agent_pos",)
    c.data.resize = c.data.crop = (64, 64)
    c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.num_registers = 128, 3, 4, 4
    c.model.timestep_embed_dim, c.model.patch = 128, (2, 2, 2)
    c.model.encoder.stage_sizes, c.model.encoder.width, c.model.encoder.pool = (1, 1, 1), 16, "flatten"
    c.model.encoder.use_low_dim = True
    kind: Any = codecs.get("vae")
    return c, kind.of_widths((32, 64, 96, 96), norm_num_groups=8)


def benchmark(
    config: ConfigDict, count: int, at_once: int, blocks: int, codec: Codec | None = None
) -> dict[str, float]:
    """Seconds of `count` member-steps both ways, medians over blocks, and their ratio with its range.

    Args:
      config: of the members, which differ in the weight of their first loss part.
      at_once: `config.sweep.members_at_once`.
      codec: in place of the config's.

    Returns:
      `members`, `members_at_once`, `codec_to_network` (operations of the frozen codec over those of the network, three
      times its forward pass), `seconds/single`, `seconds/sweep`, `member_steps_per_s/...`, `ratio` and its `ratio/min`,
      `ratio/max`, and `cpu_ratio` of CPU seconds.
    """
    weight = sorted(config.loss.weights)[0]
    config = config.copy_and_resolve_references()
    config.sweep.members_at_once = at_once
    members = make_members(config, [{f"loss.weights.{weight}": 1.0 + i} for i in range(count)])
    mesh = mesh_lib.make_mesh(members[0].config, jax.devices()[:1], count)
    if codec is None:
        codec, arrays = synthetic.synthetic_codec(config)
    else:
        arrays = synthetic.synthetic_arrays(config, codec)
    program = build(members[0].config, synthetic.synthetic_spec(config, action_dim=2), codec, mesh)
    system = program.system
    frozen = jax.device_put(arrays, mesh_lib.replicated(mesh))
    batch = jax.device_put(synthetic.synthetic_batch(system, config.batch_size), mesh_lib.batch_sharding(mesh))
    sweep = SweepProgram(program, count)
    init, together = program.compile_init(), sweep.empty()
    singles: list[Any] = [system.held(init()) for _ in members]
    for i, single in enumerate(singles):
        together = sweep.put(together, i, single, True)
    step, sweep_step = program.compile_step(frozen), sweep.compile_step(frozen)

    def run_singles(repeats: int) -> None:
        for _ in range(repeats):
            for i, single in enumerate(singles):
                singles[i], metrics = step(single, frozen, batch)
                jax.block_until_ready(metrics)

    def run_together(repeats: int) -> None:
        nonlocal together
        for _ in range(repeats):
            together, metrics = sweep_step(together, frozen, batch)
            jax.block_until_ready(metrics)

    sides = {"single": run_singles, "sweep": run_together}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for run in sides.values():
        run(1)
    for _ in tqdm(range(blocks), "blocks", disable=None):
        for name, run in sides.items():
            times[name].append(clock.block(run, 1))
    wall = {name: np.array([w for w, _ in pairs]) for name, pairs in times.items()}
    cpu = {name: float(np.median([c for _, c in pairs])) for name, pairs in times.items()}
    medians = {name: float(np.median(seconds)) for name, seconds in wall.items()}
    flops, ratios = system.flops(), wall["single"] / wall["sweep"]
    return {
        "members": count,
        "members_at_once": at_once,
        "codec_to_network": flops.frozen / (flops.training - flops.frozen),
        **{f"seconds/{name}": seconds for name, seconds in medians.items()},
        **{f"member_steps_per_s/{name}": count / seconds for name, seconds in medians.items()},
        "ratio": medians["single"] / medians["sweep"],
        "ratio/min": float(ratios.min()),
        "ratio/max": float(ratios.max()),
        "cpu_ratio": cpu["single"] / cpu["sweep"],
    }


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
