"""The whole network from a configuration."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.config import base
from uwm_jax.systems.uwm.network import UWMNetwork, network_from_config

B, LATENT = 2, (1, 2, 8, 8, 12)


def quickstart_model():
    """Width 128 on 64 px frames with 12 latent channels: 16 video tokens."""
    model = base().model
    model.update(embed_dim=128, depth=2, num_heads=4, num_registers=4, timestep_embed_dim=64, patch=(2, 2, 2))
    model.encoder.update(stage_sizes=(1, 1, 1, 1), width=16, pool="flatten", use_low_dim=True)
    return model


def build(model=None) -> UWMNetwork:
    return network_from_config(
        model or quickstart_model(), action_dim=2, action_len=16, num_views=1, num_frames=2, latent_shape=LATENT
    )


@pytest.fixture(scope="module")
def batch() -> dict:
    rng = np.random.default_rng(0)
    return {
        "images": jnp.asarray(rng.random((B, 1, 2, 64, 64, 3), np.float32)),
        "low_dim": {"agent_pos": jnp.asarray(rng.normal(size=(B, 2, 2)).astype(np.float32))},
        "text": None,
        "noisy": {
            "action": jnp.asarray(rng.normal(size=(B, 16, 2)).astype(np.float32)),
            "next_obs": jnp.asarray(rng.normal(size=(B, *LATENT)).astype(np.float32)),
        },
        "timestep": {"action": jnp.array([3, 99]), "next_obs": jnp.array([0, 50])},
    }


def small() -> UWMNetwork:
    model = quickstart_model()
    model.update(embed_dim=32, timestep_embed_dim=8)
    model.encoder.update(stage_sizes=(1,), pool="average")
    return build(model)


def shapes_of(network: UWMNetwork, batch: dict) -> dict:
    init = partial(network.init, method="init_all")
    return jax.eval_shape(lambda: init(jax.random.key(0), **batch))["params"]


@pytest.fixture(scope="module")
def params(batch) -> dict:
    """Values everywhere, also where a start has zeros, so that every path carries something."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        return jnp.asarray(rng.normal(0.02, 0.1, leaf.shape).astype(np.float32))

    return jax.tree.map(draw, shapes_of(small(), batch))


def test_tree_and_quickstart_shapes(batch):
    params = shapes_of(build(), batch)
    assert set(params) == {"obs_encoder", "noise_pred_net"}
    assert params["obs_encoder"]["img_encoder"]["fc"]["kernel"].shape == (2 * 2 * 128, 128)
    net = params["noise_pred_net"]
    assert net["pos_embed"].shape == (1, 16 + 16 + 4, 128)
    assert net["patch_encoder"]["kernel"].shape == (2 * 2 * 2 * 12, 128)
    assert net["blocks"]["adaln"]["kernel"].shape == (2, 2 * 128 + 2 * 2 + 64, 6, 128)


def test_parts_make_the_whole(params, batch):
    """Encoding once, modulating all steps and predicting one equals the training path at equal timesteps."""
    network, steps = small(), {"action": jnp.array([90, 10]), "next_obs": jnp.array([90, 0])}
    variables = {"params": params}

    @jax.jit
    def both(variables):
        cond = network.apply(variables, batch["images"], batch["low_dim"], None, method="encode_obs")
        modulation = network.apply(variables, cond, steps, method="modulation")
        second = jax.tree.map(lambda m: m[1], modulation)
        sampling, _ = network.apply(variables, batch["noisy"], second, method="predict")
        rows = {"action": jnp.full(B, 10), "next_obs": jnp.full(B, 0)}
        training, _ = network.apply(variables, cond, batch["noisy"], rows)
        at_once, _ = network.apply(variables, **{**batch, "timestep": rows}, method="init_all")
        return sampling, training, at_once

    sampling, training, at_once = both(variables)
    for key, wanted in training.items():
        assert wanted.shape == batch["noisy"][key].shape
        scale = float(jnp.abs(wanted).max())
        assert scale > 0.01
        np.testing.assert_allclose(sampling[key], wanted, atol=3e-6 * scale)
        np.testing.assert_allclose(at_once[key], wanted, atol=3e-6 * scale)


@pytest.mark.slow
def test_gradients_reach_every_parameter(params, batch):
    def loss(params):
        pred, _ = small().apply({"params": params}, **batch, method="init_all")
        return sum(jnp.mean((p - 1) ** 2) for p in pred.values())

    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(params))[0]:
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_fields_come_from_the_config():
    model = quickstart_model()
    model.update(dtype="bfloat16", remat="dots", scan_blocks=False, qkv_bias=False, mlp_ratio=2)
    network = build(model)
    net, encoder = network.noise_pred_net, network.obs_encoder
    assert net.dtype == encoder.dtype == jnp.bfloat16
    assert (net.remat, net.scan_blocks, net.qkv_bias, net.mlp_ratio) == ("dots", False, False, 2)
    assert (encoder.stage_sizes, encoder.width, encoder.pool) == ((1, 1, 1, 1), 16, "flatten")
    assert hash(network) == hash(build(model))  # usable as a static argument


def test_other_number_of_next_frames_is_refused():
    with pytest.raises(ValueError, match="same views and frames"):
        network_from_config(
            quickstart_model(), action_dim=2, action_len=16, num_views=1, num_frames=1, latent_shape=LATENT
        )
