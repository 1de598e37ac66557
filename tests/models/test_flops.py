"""Operations that networks count from their fields, against the products that they trace to."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from uwm_jax.models import flops
from uwm_jax.models.obs_encoder import ObsEncoder
from uwm_jax.models.perceiver import Resampler
from uwm_jax.models.resnet import ResNet
from uwm_jax.models.unet1d import UNet1D
from uwm_jax.models.vit import ViT
from uwm_jax.systems.uwm.dit import DiT


def test_closed_forms(count_products):
    a, b = jnp.zeros((7, 3)), jnp.zeros((3, 5))
    assert flops.dense(3, 5, 7) == 2 * 7 * 3 * 5 == count_products(jnp.matmul, a, b)
    q, k = jnp.zeros((1, 6, 2, 4)), jnp.zeros((1, 9, 2, 4))
    assert flops.attention(6, 8, 9) == 4 * 6 * 9 * 8 == count_products(jax.nn.dot_product_attention, q, k, k)
    x, kernel = jnp.zeros((1, 3, 6, 9)), jnp.zeros((5, 3, 3, 3))
    conv = functools.partial(jax.lax.conv, window_strides=(1, 1), padding="SAME")
    assert flops.convolution(3, 3, 5, 6, 9) == 2 * 9 * 3 * 5 * 54 == count_products(conv, x, kernel)


@pytest.fixture
def traced(count_products):
    """(module, *arguments) -> operations of a forward pass of one sample."""

    def trace(module, *args):
        params = jax.eval_shape(module.init, jax.random.key(0), *args)
        return count_products(module.apply, params, *args)

    return trace


@pytest.mark.parametrize("pool", ["average", "flatten"])
def test_resnet_on_odd_sizes(traced, pool):
    resnet = ResNet((1, 2), 16, 24, pool)
    assert resnet.flops(25, 40) == traced(resnet, jnp.zeros((1, 25, 40, 3)))


def test_observation_encoder(traced):
    encoder = ObsEncoder((1,), 16, embed_dim=12, use_low_dim=True, use_language=True)
    images, low_dim, text = jnp.zeros((1, 2, 3, 24, 16, 3)), {"state": jnp.zeros((1, 3, 7))}, jnp.zeros((1, 11))
    assert encoder.flops(2, 3, 24, 16, 11) == traced(encoder, images, low_dim, text)
    params = jax.eval_shape(encoder.init, jax.random.key(0), images, low_dim, text)
    features = jax.eval_shape(encoder.apply, params, images, low_dim, text)
    assert features.shape == (1, encoder.num_features(2, 3, 7))
    assert ObsEncoder(embed_dim=12).num_features(2, 3, 7) == 72


def test_vision_transformer_and_resampler(traced):
    vit = ViT(patch=8, width=64, depth=2, mlp_dim=96)
    assert vit.flops(16, 24) == traced(vit, jnp.zeros((1, 16, 24, 3)))
    resampler = Resampler(num_latents=5, depth=2, heads=3, dim_head=7)
    assert resampler.flops(11, 20) == traced(resampler, jnp.zeros((1, 11, 20)))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_unet(count_products, kernel_size):
    unet = UNet1D(3, 8, (16, 24, 40), kernel_size, timestep_embed_dim=12)
    args = jnp.zeros((1, 10)), jnp.zeros((1, 8, 3)), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(unet.init, jax.random.key(0), *args)
    assert unet.flops(10) == count_products(unet.apply, params, *args)


@pytest.mark.parametrize("scan", [True, False])
def test_diffusion_transformer(traced, scan):
    dit = DiT(
        6, 5, (2, 2, 3, 4, 3), (2, 3, 2), embed_dim=24, depth=3, num_heads=4, mlp_ratio=3, num_registers=2,
        timestep_embed_dim=10, scan_blocks=scan,
    )  # fmt: skip
    noisy = {"action": jnp.zeros((1, 5, 6)), "next_obs": jnp.zeros((1, 2, 2, 3, 4, 3))}
    timestep = {m: jnp.zeros((1,), jnp.int32) for m in noisy}
    assert dit.flops(17) == traced(dit, jnp.zeros((1, 17)), noisy, timestep)
