"""Trains small models of all systems on several meshes of eight simulated CPU devices, for `test_meshes`.

Run as a program of its own, because the number of devices is fixed when jax starts:

    python -m tests.systems.meshes OUTPUT.json [VARIANT...]
"""

from __future__ import annotations

import json
import math
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["NPROC"] = "32"  # XLA's threads: with few cores' 8, all may wait for devices that have none to run on

import jax
import numpy as np

from tests.golden.reference import filler
from tests.systems.small import small_config
from uwm_jax import config as config_lib
from uwm_jax import synthetic
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.training import state as state_lib
from uwm_jax.training.build import build

STEPS, ROWS = 10, 16
VARIANTS = ("uwm", "dp", "dp_unet", "dp_flow", "pad", "gr1")
ADALN = {"uwm": "shared", "dp": "low_rank"}  # on meshes that cut its kernels
# name: (data, fsdp, tensor), accumulation steps; the sizes say how many of the devices are used
MESHES = {
    "one": ((1, 1, 1), 1),
    "accumulated": ((1, 1, 1), 2),
    "data 8": ((8, 1, 1), 1),
    "fsdp 4, tensor 2": ((1, 4, 2), 1),
}


def formula(shapes):
    """Formula parameters: at initialisation AdaLN and heads are zero, and hide what happens before them."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    made = [
        (0.2 * filler(math.prod(x.shape), k)).astype(np.float32).reshape(x.shape) + np.float32(path[-1].key == "scale")
        for k, (path, x) in enumerate(leaves)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), made)


def run(
    variant: str, sizes: tuple[int, int, int], accumulation_steps: int, adaln: str = "official"
) -> list[dict[str, float]]:
    """Loss and gradient norms of each step."""
    config = small_config(variant)
    if adaln != "official":
        config.model.adaln, config.model.adaln_rank = adaln, 8
    config.batch_size, config.accumulation_steps = ROWS, accumulation_steps
    config.data.cameras, config.data.low_dim = ("left", "right"), ("state",)
    if variant == "dp_unet":  # normalisation of fewer values amplifies what rounding leaves of their differences
        config.data.window.action, config.model.unet.down_dims = tuple(range(1, 17)), (32, 64)
    if variant == "dp_flow":  # Adam's usual epsilon makes whole steps of gradients that are zero but for rounding
        config.optimizer.eps = 1e-5
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    config_lib.validate(config)
    codec, frozen = synthetic.synthetic_codec(config)
    mesh = mesh_lib.make_mesh(config, jax.devices()[: math.prod(sizes)])
    program = build(config, synthetic.synthetic_spec(config, action_dim=5, frame_size=(20, 18)), codec, mesh)
    batch = synthetic.synthetic_batch(program.system, ROWS)
    if config.data.window.next_obs:
        batch["action_mask"] = batch["row"] % 5 != 3  # some rows without actions
    state = state_lib.create(config, formula(program.shapes.params), program.optimizer, program.system.tree.untrained)
    state = jax.device_put(state, program.shardings)
    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
    batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    state, step = program.system.held(state), program.compile_step(frozen)
    found = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        shown = {name: x for name, x in metrics.items() if name == "loss" or name.startswith("grad_norm")}
        found.append({name: jax.tree.leaves(x)[0].item() for name, x in shown.items()})
    return found


if __name__ == "__main__":
    variants = sys.argv[2:] or VARIANTS
    results = {variant: {name: run(variant, *mesh) for name, mesh in MESHES.items()} for variant in variants}
    for variant, adaln in ADALN.items():
        cut = {name: MESHES[name] for name in ("one", "fsdp 4, tensor 2")}
        results[f"{variant} {adaln}"] = {name: run(variant, *mesh, adaln) for name, mesh in cut.items()}
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
