"""Measures what a training step of `configs/droid.py` sends between eight simulated CPUs, for `test_collectives`.

Run as a program of its own, because the number of devices is fixed when jax starts:

    python -m tests.parallel.droid_collectives OUTPUT.json
"""

from __future__ import annotations

import json
import os
import sys

from tests import quick_compile

os.environ["XLA_FLAGS"] = quick_compile.with_devices(8)

import jax
from ml_collections import ConfigDict

from configs import droid
from uwm_jax import codecs
from uwm_jax.parallel import collectives, sharding
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.synthetic import synthetic_spec
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.systems.uwm.tree import TREE
from uwm_jax.training import state as state_lib
from uwm_jax.training.step import compile_for, make_train_step


def narrow(data: int, fsdp: int) -> ConfigDict:
    """DROID's config with three layers of width 48 on 16 x 16 pixels, nine rows on each device."""
    c = droid.get_config()
    c.batch_size = 72
    c.model.update(embed_dim=48, depth=3, num_heads=4, timestep_embed_dim=16)
    c.model.encoder.update(stage_sizes=(1, 1), width=16)
    c.model.codec.name = "pixels"
    c.data.resize, c.data.crop = (20, 20), (16, 16)
    c.mesh.data, c.mesh.fsdp = data, fsdp
    return c


def measure(config: ConfigDict) -> dict:
    mesh, rules = mesh_lib.make_mesh(config), sharding.load_rules(config.mesh.rules, "uwm", TREE.mesh_rules)
    system = UWM(config, synthetic_spec(config, action_dim=10), codecs.from_config(config))
    optimizer = state_lib.make_optimizer(config)
    shapes = jax.eval_shape(lambda key: state_lib.create(config, system.init(key), optimizer), jax.random.key(0))
    like = mesh_lib.with_sharding(shapes, sharding.state_sharding(mesh, rules, shapes))
    batch = system.spec.batch_like(config.batch_size)
    batch = mesh_lib.with_sharding(batch, mesh_lib.batch_sharding(mesh))
    step = make_train_step(config, system, optimizer, mesh)
    compiled = compile_for(mesh, rules, step, system.held(like), {}, batch, updates_state=True)
    found = collectives.read(compiled.as_text())
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(shapes.params)),
        "bytes": collectives.bytes_by_kind(found),
        "count": {kind: sum(c.times for c in found if c.kind == kind) for kind in {c.kind for c in found}},
    }


if __name__ == "__main__":
    meshes = {"data 8": narrow(8, 1), "fsdp 8": narrow(1, 8)}
    with open(sys.argv[1], "w") as file:
        json.dump({name: measure(config) for name, config in meshes.items()}, file)
