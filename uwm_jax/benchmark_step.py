"""Times one training step and one policy sample of a config's model, on made-up data and random weights.

    python -m uwm_jax.benchmark_step --config=configs/droid.py --config.batch_size=1

Nothing is read from disk or a hub, so any config runs anywhere: it answers whether a model fits the machine and
what a step costs there. Compilation is reported apart from the steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli
from uwm_jax import config as config_lib
from uwm_jax.data.normalize import Normalizer
from uwm_jax.errors import UserError
from uwm_jax.models.codecs import Codec, PCACodec, PixelsCodec, VAECodec
from uwm_jax.models.vae import AutoencoderKL
from uwm_jax.system import DataFacts, System
from uwm_jax.torch_bridge import weights
from uwm_jax.training import state as state_lib
from uwm_jax.training.step import make_train_step

FLAGS = flags.FLAGS

LOW_DIM, TEXT_DIM = 7, 512  # widths of made-up low-dim keys and text embeddings
PCA_PATCH, PCA_CHANNELS = 8, 12


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_integer("steps", 3, "timed repetitions of each part; the median counts", lower_bound=1)
    flags.DEFINE_integer("action_dim", 10, "columns of the made-up actions", lower_bound=1)
    flags.DEFINE_string("json", None, "also write the numbers to this file")
    cli.accept_config_overrides()


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}: flags are written --flag=value.")
    config = config_lib.load(cli.required("config"), cli.config_overrides())
    if FLAGS.json:
        weights.check_output_file(FLAGS.json, "--json")
    results = benchmark(config, FLAGS.steps, FLAGS.action_dim)
    for name, value in results.items():
        print(f"{name:<28} {value:12.4f}" if isinstance(value, float) else f"{name:<28} {value!s:>12}")
    if FLAGS.json:
        with weights.atomic(FLAGS.json, "--json") as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n")


def benchmark(config: ConfigDict, steps: int, action_dim: int) -> dict[str, Any]:
    """Medians in seconds of a training step (pixels to new parameters) and of a policy sample of one observation."""
    system, frozen = make_up_system(config, action_dim)
    optimizer = state_lib.make_optimizer(config)
    state = jax.jit(lambda key: state_lib.create(config, system.init(key), optimizer))(jax.random.key(config.seed))
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    batch = make_up_batch(system, config.batch_size)

    train_step = jax.jit(make_train_step(config, system, optimizer), donate_argnums=0)

    def step(state: Any) -> Any:
        state, metrics = train_step(state, frozen, batch)
        step.loss = float(metrics["loss"])  # type: ignore[attr-defined]
        return state

    first_step, step_seconds, state = _time(step, state, steps)

    observation = make_up_batch(system, 1)

    @jax.jit
    def policy(params: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        noise = system.draw_noise(jax.random.key(0), batch["row"])
        return system.sample(params, frozen, batch, "policy", noise)["action"]

    def act(params: Any) -> Any:
        jax.block_until_ready(policy(params, frozen, observation))
        return params

    first_sample, sample_seconds, _ = _time(act, state.params, steps)
    return {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "network_parameters_m": count["noise_pred_net"] / 1e6,
        "encoder_parameters_m": count["obs_encoder"] / 1e6,
        "codec_parameters_m": sum(x.size for x in jax.tree.leaves(frozen)) / 1e6,
        "loss_after_steps": step.loss,  # type: ignore[attr-defined]
        "compile_and_first_step_s": first_step,
        "train_step_s": step_seconds,
        "samples_per_second": config.batch_size / step_seconds,
        "compile_and_first_sample_s": first_sample,
        "policy_sample_s": sample_seconds,
    }


def make_up_system(config: ConfigDict, action_dim: int) -> tuple[System, Any]:
    """A system of the config's shapes and random codec arrays; a VAE is SDXL's."""
    facts = DataFacts(
        cameras=dict.fromkeys(config.data.cameras, tuple(config.data.resize)),
        low_dim=dict.fromkeys(config.data.low_dim, LOW_DIM),
        action_dim=action_dim,
        text_dim=TEXT_DIM if config.data.text else 0,
        normalizer=Normalizer(),
    )
    codec, frozen = make_up_codec(config)
    return System(config, facts, codec), frozen


def make_up_codec(config: ConfigDict) -> tuple[Codec, Any]:
    rng = np.random.default_rng(0)
    name, views, crop = config.model.codec.name, len(config.data.cameras), config.data.crop
    if name == "pixels":
        return PixelsCodec(), {}
    if name == "pca":
        size = PCA_PATCH * PCA_PATCH * 3
        components = np.linalg.qr(rng.normal(size=(views, size, PCA_CHANNELS)))[0]
        arrays = {"mean": np.full((views, *crop, 3), 0.5), "components": components, "scale": np.ones(())}
        return PCACodec(PCA_PATCH, PCA_CHANNELS), {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
    module = AutoencoderKL(dtype=jnp.dtype(config.model.codec.dtype))
    image = jnp.zeros((1, module.downsampling, module.downsampling, 3))
    params = jax.jit(module.init)(jax.random.key(0), image)["params"]
    return VAECodec(module, microbatch=config.model.codec.microbatch), params


def make_up_batch(system: System, batch_size: int) -> dict[str, jax.Array]:
    """Random pixels and numbers in the shapes of `System.example_batch`."""
    rng = np.random.default_rng(0)

    def fill(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, x.shape, np.uint8))
        if x.dtype == jnp.float32:
            return jnp.asarray(rng.uniform(-1, 1, x.shape).astype(np.float32))
        return x

    return {name: fill(x) for name, x in system.example_batch(batch_size).items()}


def _time(run: Callable[[Any], Any], carry: Any, repetitions: int) -> tuple[float, float, Any]:
    """Seconds of the first call and the median of later ones; `run` waits for its own results."""
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        carry = run(carry)
        seconds.append(time.perf_counter() - start)
    return seconds[0], float(np.median(seconds[1:])), carry


if __name__ == "__main__":
    cli.run(main, define_flags)
