"""Trains one tiny model on several meshes of eight simulated CPU devices; writes what `test_accumulate` reads.

Run as a program of its own, because the number of devices is fixed when jax starts:

    python -m tests.parallel.eight_devices OUTPUT.json
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["NPROC"] = "32"  # XLA's threads: with few cores' 8, all may wait for devices that have none to run on

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from uwm_jax.codecs import VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.evaluation.evaluator import make_evaluation
from uwm_jax.models import target
from uwm_jax.parallel import collectives, sharding
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.accumulate import each_value_and_grad
from uwm_jax.sweeps.program import encode_once
from uwm_jax.synthetic import synthetic_batch
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.systems.uwm.tree import TREE
from uwm_jax.training import state as state_lib
from uwm_jax.training.step import compile_for, make_eval_step, make_train_step

STEPS = 10
RAW = (24, 30)
# name: (data, fsdp, tensor), accumulation steps; the sizes say how many of the devices are used
VARIANTS = {
    "one": ((1, 1, 1), 1),
    "data 8": ((8, 1, 1), 1),
    "data 8, accumulated": ((8, 1, 1), 2),
    "fsdp 8": ((1, 8, 1), 1),
    "2x2x2, accumulated": ((2, 2, 2), 2),
    "data 2, tensor 4": ((2, 1, 4), 1),
}
EVALUATED = ("one", "data 8", "2x2x2, accumulated")


def tiny(sizes: tuple[int, int, int], accumulation_steps: int) -> ConfigDict:
    c = base()
    c.batch_size, c.accumulation_steps = 16, accumulation_steps
    c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.num_registers = 32, 2, 4, 2
    c.model.timestep_embed_dim, c.model.patch = 16, (2, 2, 2)
    c.model.encoder.stage_sizes, c.model.encoder.width, c.model.encoder.use_low_dim = (1,), 16, True
    c.model.codec.microbatch = 64 if sizes[2] == 4 else 2  # of the 4 or more frames that each device has
    c.data.cameras, c.data.low_dim = ("left", "right"), ("state",)
    c.data.window.action = tuple(range(1, 5))
    c.data.resize, c.data.crop = (20, 18), (16, 16)  # of RAW frames
    c.loss.action_free = "dropped"
    c.optimizer.learning_rate, c.optimizer.ema_decay, c.optimizer.clip_norm = 1e-3, 0.9, 1.0
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
    return c


def drawn(shapes):
    """Arrays without zeros, which would keep most gradients at zero in the first steps; no compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(x.dtype), shapes)


def make_system(config: ConfigDict) -> tuple[UWM, dict]:
    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    frozen = drawn(jax.eval_shape(vae.init, jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"])
    spec = DataSpec(
        WindowSpec.from_config(config.data.window),
        dict.fromkeys(config.data.cameras, RAW),
        {"state": 7},
        10,
        0,
        Normalizer(),
    )
    return UWM(config, spec, VAECodec(vae, microbatch=config.model.codec.microbatch)), frozen


def evaluate_modes(system: UWM, mesh, rules, params, frozen, batch) -> dict:
    """The evaluation of all modes for a batch, and the bytes that it moves between devices."""
    rng = np.random.default_rng(1)
    extra = {
        "shuffled_action": rng.normal(size=batch["action"].shape).astype(np.float32),
        "last_action": rng.normal(size=batch["action"][:, 0].shape).astype(np.float32),
        "has_last_action": np.arange(len(batch["row"])) % 3 != 0,
    }
    references = {
        "mean_action": rng.normal(size=system.spec.action_dim).astype(np.float32),
        "mean_image": rng.uniform(size=(len(system.cameras), 1, *system.config.data.crop, 3)).astype(np.float32),
    }
    batch = {**batch, **jax.device_put(extra, mesh_lib.batch_sharding(mesh))}
    rest = jax.device_put((references, np.array([1, 9, 14])), mesh_lib.replicated(mesh))
    program = compile_for(
        mesh, rules, make_evaluation(system, "joint"), params, frozen, batch, *rest, updates_state=False
    )
    scores, windows = jax.device_get(program(params, frozen, batch, *rest))
    return {
        "scores": {name: x.tolist() for name, x in scores.items()},
        "windows": {name: x.reshape(3, -1)[:, ::5].tolist() for name, x in windows.items()},
        "output_bytes": sum(x.nbytes for x in (*scores.values(), *windows.values())),
        "moved_bytes": sum(c.bytes * c.times for c in collectives.read(program.as_text())),
    }


def frames_of_convolutions(text: str) -> list[int]:
    """How many frames each convolution of the VAE's encoder takes on a device, by a compiled program's text."""
    found = re.findall(r"= f32\[(\d+),[\d,]*\]\S* convolution\(.*AutoencoderKL", text)
    return [int(frames) for frames in found]


def run(sizes: tuple[int, int, int], accumulation_steps: int) -> dict:
    config = tiny(sizes, accumulation_steps)
    mesh = mesh_lib.make_mesh(config, jax.devices()[: int(np.prod(sizes))])
    rules = sharding.load_rules(config.mesh.rules, "uwm", TREE.mesh_rules)
    system, frozen = make_system(config)
    optimizer = state_lib.make_optimizer(config)
    batch = synthetic_batch(system, config.batch_size)
    batch["action_mask"] = batch["row"] % 5 != 3  # some rows without actions

    params = drawn(jax.eval_shape(system.init, jax.random.key(0)))
    state = state_lib.create(config, params, optimizer)
    state = jax.device_put(state, sharding.state_sharding(mesh, rules, jax.eval_shape(lambda: state)))
    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
    batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    train_step = make_train_step(config, system, optimizer, mesh)
    compiled = compile_for(mesh, rules, train_step, state, frozen, batch, updates_state=True)
    found = collectives.read(compiled.as_text())

    evaluated, modes = None, None
    if (sizes, accumulation_steps) in (VARIANTS[name] for name in EVALUATED):
        eval_step = make_eval_step(system)
        evaluate = compile_for(mesh, rules, eval_step, state.eval_params, frozen, batch, updates_state=False)
        evaluated = {name: value.tolist() for name, value in evaluate(state.eval_params, frozen, batch).items()}
        modes = evaluate_modes(system, mesh, rules, state.params, frozen, batch)

    def on_first_device(tree) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    state_bytes, metrics = on_first_device(state), []
    for _ in range(STEPS):
        state, values = compiled(state, frozen, batch)
        metrics.append({name: [x.item() for x in jax.tree.leaves(value)] for name, value in values.items()})

    adam = next(s for s in state.opt_state if hasattr(s, "mu"))
    trees = {"params": state.params, "ema": state.ema_params, "mu": adam.mu, "nu": adam.nu}
    adaln = {name: tree["noise_pred_net"]["blocks"]["adaln"]["kernel"] for name, tree in trees.items()}
    return {
        "metrics": metrics,  # of each step
        "evaluated": evaluated,  # losses of every row before the first step
        "modes": modes,  # likewise
        "state_bytes": state_bytes,
        "reused_bytes": compiled.memory_analysis().alias_size_in_bytes,
        "bytes": {name: on_first_device(tree) for name, tree in trees.items()},
        "adaln_bytes": {name: on_first_device(x) for name, x in adaln.items()},
        "convolution_bytes": sum(x.nbytes for x in jax.tree.leaves(state.params["obs_encoder"]) if x.ndim == 4),
        "same_layout": all(
            jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, tree))
            for tree in trees.values()
        ),
        "gradient_bytes": sum(x.nbytes for x in jax.tree.leaves(state.params)),
        "token_bytes": config.batch_size // (sizes[0] * sizes[1]) * system.network.noise_pred_net.num_tokens * 32 * 4,
        "encoded_frames": frames_of_convolutions(compiled.as_text()),
        "collectives": [[c.kind, c.bytes, c.group, c.times, c.source] for c in found],
    }


def encode_six_frames() -> dict:
    """Latents of one row with three views of two frames, whole and over fsdp 2 x tensor 4, which do not divide them."""
    config = tiny((1, 2, 4), 1)
    mesh = mesh_lib.make_mesh(config, jax.devices())
    system, frozen = make_system(config)
    frames = jnp.asarray(np.random.default_rng(2).uniform(size=(1, 3, 2, 16, 16, 3)), jnp.float32)

    def encode(frozen, frames):
        return system.codec.encode(frozen, frames, None)

    rules = sharding.load_rules(config.mesh.rules, "uwm", TREE.mesh_rules)
    inputs = jax.device_put((frozen, frames), mesh_lib.replicated(mesh))
    compiled = compile_for(mesh, rules, encode, *inputs, updates_state=False)
    latents = {"whole": jax.jit(encode)(frozen, frames), "spread": compiled(*inputs)}
    encoded = {"encoded_frames": frames_of_convolutions(compiled.as_text())}
    return encoded | {name: x.ravel().tolist() for name, x in latents.items()}


def encode_for_members() -> dict:
    """What a sweep encodes of two rows on sweep 4 x data 2, and the same of one device."""
    config = tiny((2, 1, 1), 1)
    config.batch_size, config.sweep.devices = 2, 4
    mesh = mesh_lib.make_mesh(config, jax.devices(), members=4)
    system, frozen = make_system(config)
    inputs = (frozen, {**synthetic_batch(system, 2), "row": jnp.arange(2)}, jax.random.key(3))
    rules = sharding.load_rules(config.mesh.rules, "uwm", TREE.mesh_rules)

    def encode(frozen, batch, key):
        return encode_once(system, mesh, frozen, batch, key)

    placed = jax.device_put(inputs, mesh_lib.replicated(mesh))
    compiled = compile_for(mesh, rules, encode, *placed, updates_state=False)
    one = jax.jit(system.encode)(*inputs)
    return {
        "encoded_frames": frames_of_convolutions(compiled.as_text()),
        "whole": [np.asarray(x, np.float64).ravel().tolist() for x in jax.tree.leaves(one)],
        "spread": [np.asarray(x, np.float64).ravel().tolist() for x in jax.tree.leaves(compiled(*placed))],
    }


def members_in_turn() -> dict:
    """Gradients of four small members on sweep 2 x data 2 x fsdp 2, in the forms of accelerators and of CPUs."""
    config = tiny((2, 2, 1), 1)
    config.sweep.devices = 2
    mesh = mesh_lib.make_mesh(config, jax.devices(), members=4)
    rng = np.random.default_rng(4)
    kernel = jax.device_put(rng.normal(size=(4, 6, 8)), NamedSharding(mesh, PartitionSpec("sweep", None, "fsdp")))
    scale = jax.device_put(np.arange(1.0, 5.0), NamedSharding(mesh, PartitionSpec("sweep")))
    rows = jax.device_put(rng.normal(size=(16, 6)), mesh_lib.batch_sharding(mesh))

    def loss(kernel, scale, rows):
        return scale * jnp.tanh(rows @ kernel).sum(), {"rows": jnp.float32(len(rows))}

    found = {}
    for platform in ("tpu", "cpu"):
        gradients = functools.partial(each_value_and_grad, loss, mesh=mesh, at_once=1)  # traced anew
        with target.tracing_for(platform, 8):
            lowered = jax.jit(gradients).lower(kernel, scale, rows)
        made = jax.tree.leaves(lowered.compile()(kernel, scale, rows))
        values = [value for x in made for value in np.asarray(x).ravel().tolist()]
        found[platform] = {"loops": lowered.as_text().count("stablehlo.while"), "values": values}
    return found


if __name__ == "__main__":
    names = sys.argv[2:] or VARIANTS
    results = {name: run(*VARIANTS[name]) for name in names}
    results |= {"six frames": encode_six_frames(), "two rows": encode_for_members()}
    results |= {"members in turn": members_in_turn()}
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
