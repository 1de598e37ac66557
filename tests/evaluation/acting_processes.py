"""Three rounds of three episodes with parameters far from those of a fresh model, on a mesh of all processes:

python -m tests.evaluation.acting_processes --output=OUTPUT.npz [flags of the processes]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tests.pusht_run import SIZE, make_config
from uwm_jax import cli, codecs, envs
from uwm_jax.backend import JaxBackend
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.evaluation import closed_loop
from uwm_jax.parallel import distributed
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.training.build import build

SEEDS = [100_000, 100_001, 100_002]


def act(output: Path) -> None:
    config = make_config(Path("nowhere"))
    config.model.codec.name, config.model.patch = "pixels", (2, 4, 4)
    config.mesh.fsdp = jax.process_count()
    config.eval.closed_loop.env = "pusht"
    half = (np.full(2, 256, np.float32), np.full(2, 256, np.float32))
    normalizer = Normalizer({"action": half, "agent_pos": half})
    window = WindowSpec.from_config(config.data.window)
    spec = DataSpec(window, {"image": (SIZE, SIZE)}, {"agent_pos": 2}, 2, 0, normalizer)
    program = build(config, spec, codecs.from_config(config), mesh_lib.make_mesh(config))
    params = program.compile_init()().params

    def changed(tree):
        return jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), tree)

    params = jax.jit(changed, out_shardings=program.shardings.params)(params)
    cut = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
    assert bool(cut) == (jax.process_count() > 1)
    params = program.system.held(params)
    sampler = closed_loop.MeshSampler(program.system, program.mesh, program.rules)
    sampler.compile(params, {})
    env = dataclasses.replace(envs.get("pusht"), max_steps=24)
    if distributed.is_main():
        with closed_loop.open_envs("pusht", program.system, SEEDS, 1) as opened:
            opened.spec = env
            backend = JaxBackend(program.system, params, {}, act=sampler)
            found = closed_loop.closed_loop(backend, opened, SEEDS, rows_of_a_call=sampler.rows)
        np.savez(output, actions=[e.actions for e in found], scores=[e.scores for e in found])
    else:
        closed_loop.follow(sampler, params, {}, env, execute=8)


def define_flags() -> None:
    flags.DEFINE_string("output", None, "file of actions and scores")
    distributed.define_flags()


def main(call: cli.Call) -> None:
    with distributed.session():
        act(cli.required_path("output"))


if __name__ == "__main__":
    sys.exit(cli.call(main, sys.argv, define_flags))
