"""Trains one tiny model on several meshes of eight simulated CPU devices; writes what `test_accumulate` reads.

Run as a program of its own, because the number of devices is fixed when jax starts:

    python tests/parallel/eight_devices.py OUTPUT.json
"""

from __future__ import annotations

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.made_up import make_up_batch
from uwm_jax.models.codecs import VAECodec
from uwm_jax.models.vae import AutoencoderKL
from uwm_jax.parallel import collectives, sharding
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.system import DataFacts, System
from uwm_jax.training import state as state_lib
from uwm_jax.training.step import make_train_step

STEPS = 10
# name: (data, fsdp, tensor), accumulation steps; the sizes say how many of the devices are used
VARIANTS = {
    "one": ((1, 1, 1), 1),
    "data 8": ((8, 1, 1), 1),
    "data 8, accumulated": ((8, 1, 1), 2),
    "fsdp 8": ((1, 8, 1), 1),
    "2x2x2, accumulated": ((2, 2, 2), 2),
    "data 2, tensor 4": ((2, 1, 4), 1),
}


def tiny(sizes: tuple[int, int, int], accumulation_steps: int) -> ConfigDict:
    c = base()
    c.batch_size, c.accumulation_steps = 16, accumulation_steps
    c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.num_registers = 32, 2, 4, 2
    c.model.timestep_embed_dim, c.model.patch = 16, (2, 2, 2)
    c.model.encoder.stage_sizes, c.model.encoder.width, c.model.encoder.use_low_dim = (1,), 16, True
    c.model.codec.microbatch = 2  # of the 4 or more frames that each device has
    c.data.cameras, c.data.low_dim = ("left", "right"), ("state",)
    c.data.window.action = tuple(range(1, 5))
    c.data.resize = c.data.crop = (16, 16)
    c.optimizer.learning_rate, c.optimizer.ema_decay, c.optimizer.clip_norm = 1e-3, 0.9, 1.0
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
    return c


def drawn(shapes):
    """Arrays without zeros, which would keep most gradients at zero in the first steps; no compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(x.dtype), shapes)


def make_system(config: ConfigDict) -> tuple[System, dict]:
    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    frozen = drawn(jax.eval_shape(vae.init, jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"])
    facts = DataFacts(dict.fromkeys(config.data.cameras, (16, 16)), {"state": 7}, 10, 0, Normalizer())
    return System(config, facts, VAECodec(vae, microbatch=config.model.codec.microbatch)), frozen


def run(sizes: tuple[int, int, int], accumulation_steps: int) -> dict:
    config = tiny(sizes, accumulation_steps)
    mesh = mesh_lib.make_mesh(config, jax.devices()[: int(np.prod(sizes))])
    rules = sharding.load_rules(config.mesh.rules)
    system, frozen = make_system(config)
    optimizer = state_lib.make_optimizer(config)
    batch = make_up_batch(system, config.batch_size)
    batch["action_mask"] = batch["row"] % 5 != 3  # some rows without actions

    params = drawn(jax.eval_shape(system.init, jax.random.key(0)))
    state = state_lib.create(config, params, optimizer)
    shapes = jax.eval_shape(lambda: state)
    shardings = sharding.state_sharding(mesh, rules, shapes)
    whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    step = make_train_step(config, system, optimizer, mesh)

    def laid_out(state, frozen, batch):
        with sharding.activations(mesh, rules):
            return step(state, frozen, batch)

    state = jax.device_put(state, shardings)
    frozen, batch = jax.device_put(frozen, whole), jax.device_put(batch, rows)
    jitted = jax.jit(
        laid_out, in_shardings=(shardings, whole, rows), out_shardings=(shardings, whole), donate_argnums=0
    )
    compiled = jitted.lower(state, frozen, batch).compile()
    found = collectives.read(compiled.as_text())
    losses, norms = [], []
    for _ in range(STEPS):
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))

    def on_first_device(tree) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    adam = next(s for s in state.opt_state if hasattr(s, "mu"))
    trees = {"params": state.params, "ema": state.ema_params, "mu": adam.mu, "nu": adam.nu}
    adaln = {name: tree["noise_pred_net"]["blocks"]["adaln"]["kernel"] for name, tree in trees.items()}
    return {
        "losses": losses,
        "norms": norms,
        "bytes": {name: on_first_device(tree) for name, tree in trees.items()},
        "adaln_bytes": {name: on_first_device(x) for name, x in adaln.items()},
        "same_layout": all(
            jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, tree))
            for tree in trees.values()
        ),
        "gradient_bytes": sum(x.nbytes for x in jax.tree.leaves(state.params)),
        "token_bytes": config.batch_size // (sizes[0] * sizes[1]) * system.network.noise_pred_net.num_tokens * 32 * 4,
        "collectives": [[c.kind, c.bytes, c.group, c.times, c.source] for c in found],
    }


if __name__ == "__main__":
    names = sys.argv[2:] or VARIANTS
    results = {name: run(*VARIANTS[name]) for name in names}
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
