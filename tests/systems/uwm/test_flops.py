"""Operations counted from shapes, against the products that the traced model really makes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from uwm_jax import config as config_lib
from uwm_jax.codecs import PCACodec, PixelsCodec, VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.systems.uwm.system import UWM


def droid() -> UWM:
    config = config_lib.load("configs/droid.py")
    return UWM(
        config,
        DataSpec(
            WindowSpec.from_config(config.data.window),
            dict.fromkeys(config.data.cameras, (180, 320)),
            {},
            10,
            0,
            Normalizer(),
        ),
        VAE,
    )


VAE = VAECodec(AutoencoderKL())
SMALL_VAE = VAECodec(
    AutoencoderKL(block_out_channels=(16, 24, 24), layers_per_block=1, norm_num_groups=8, latent_channels=3)
)


def small(codec=None, crop=(24, 40), **model) -> UWM:
    """Two views of odd sizes, state and text, widths that are all different."""
    c = config_lib.base()
    c.data.cameras, c.data.low_dim, c.data.text = ("left", "right"), ("state",), "text"
    c.data.resize = c.data.crop = crop
    c.data.window.action = tuple(range(1, 6))
    c.model.embed_dim, c.model.depth, c.model.num_heads, c.model.num_registers = 48, 3, 4, 3
    c.model.timestep_embed_dim, c.model.patch, c.model.mlp_ratio = 20, (2, 1, 1), 3
    c.model.encoder.stage_sizes, c.model.encoder.width = (1, 2), 16
    c.model.encoder.use_low_dim = c.model.encoder.use_language = True
    c.model.update(model)
    spec = DataSpec(
        WindowSpec.from_config(c.data.window), dict.fromkeys(c.data.cameras, crop), {"state": 7}, 6, 11, Normalizer()
    )
    return UWM(c, spec, codec or PCACodec(patch=8, channels=5))


def network_inputs(system, batch=1):
    params = jax.eval_shape(system.init, jax.random.key(0))
    noisy = {m: jnp.zeros((batch, *shape)) for m, shape in system.shapes.items()}
    time = {m: jnp.zeros((batch,), jnp.int32) for m in noisy}
    cond = jax.eval_shape(functools.partial(features, system), params, system.spec.zeros(batch))
    return params, cond, noisy, time


def features(system, params, batch):
    return system.encode_obs(params, system.encode({}, {k: x for k, x in batch.items() if k.startswith("obs/")}))


def evaluate(system, params, cond, noisy, time):
    return system.network.apply({"params": params}, cond, noisy, time)[0]


def test_the_papers_model_costs_what_is_known():
    sample = droid().flops()
    assert sample.trained["network"] / 1e9 == pytest.approx(31.1, abs=0.05)
    assert sample.trained["encoder"] / 6e9 == pytest.approx(3.63, abs=0.005)
    assert sample.frozen / 6e9 == pytest.approx(208.4, abs=0.05)
    assert sample.training / 1e9 == pytest.approx(1409, abs=0.5)
    assert (sample.training - sample.frozen) / 1e9 == pytest.approx(158.7, abs=0.05)


@pytest.mark.parametrize("pool", ["average", "flatten"])
@pytest.mark.parametrize("crop", [(24, 40), (56, 24)])
def test_every_product_of_network_and_encoder_is_counted(pool, crop, count_products):
    system = small(crop=crop)
    system.config.model.encoder.pool = pool
    system = UWM(system.config, system.spec, system.codec)
    sample = system.flops()
    inputs = network_inputs(system)
    assert count_products(functools.partial(evaluate, system), *inputs) == sample.trained["network"]
    encoded = system.encode({}, {k: x for k, x in system.spec.zeros(1).items() if k.startswith("obs/")})
    assert count_products(lambda p: system.encode_obs(p, encoded), inputs[0]) == sample.trained["encoder"]


def test_every_product_of_the_codecs_is_counted(count_products):
    frames = jnp.zeros((1, 2, 2, 24, 40, 3))
    key = jax.random.split(jax.random.key(0), 1)
    image = jnp.zeros((1, 24, 40, 3))
    params = jax.eval_shape(SMALL_VAE.vae.init, jax.random.key(0), image)["params"]
    assert count_products(lambda p: SMALL_VAE.encode(p, frames, key), params) == small(SMALL_VAE).flops().frozen
    pca = PCACodec(patch=8, channels=5)
    arrays = {"mean": jnp.zeros((2, 24, 40, 3)), "components": jnp.zeros((2, 192, 5)), "scale": jnp.ones(())}
    assert count_products(lambda p: pca.encode(p, frames, None), arrays) == small(pca).flops().frozen
    assert small(PixelsCodec()).flops().frozen == 0


def training_loss(system, batch_size):
    batch = system.spec.zeros(batch_size)

    def loss(params, frozen):
        draws = system.draws(jax.random.key(0), batch["row"])
        return sum(e.sum() for e in system.losses(params, system.encode(frozen, batch), draws).parts.values())

    return loss


def test_every_product_of_a_training_step_is_counted(count_products):
    system = small()
    frozen = {"mean": jnp.zeros((2, 24, 40, 3)), "components": jnp.zeros((2, 192, 5)), "scale": jnp.ones(())}
    params = jax.eval_shape(system.init, jax.random.key(0))
    # Three times the forward pass counts the gradients of the step's inputs, which nobody asks for.
    d, t, hidden, tokens = 48, 20, 4 * 48, 2 * 3 * 5
    inputs = 2 * (5 * 6 * hidden + tokens * 2 * 5 * d + 2 * t * 4 * t + 11 * d) + 4 * 2 * 49 * 3 * 16 * 12 * 20
    assert count_products(jax.grad(training_loss(system, 1)), params, frozen) == system.flops().training - inputs


@pytest.mark.slow
def test_xla_agrees_on_a_training_step():
    """Before optimisation, blocks unrolled; it counts what is no product too, and no padding of convolutions."""
    system = small(PixelsCodec(), crop=(64, 64), embed_dim=256, patch=(2, 8, 8), scan_blocks=False)
    params = jax.eval_shape(system.init, jax.random.key(0))
    step = jax.jit(jax.grad(training_loss(system, 2))).lower(params, {})
    assert step.cost_analysis()["flops"] == pytest.approx(2 * system.flops().training, rel=0.04)
