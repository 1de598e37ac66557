"""The whole network from a configuration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.config import base
from uwm_jax.models.network import UWMNetwork, network_from_config

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


def perturbed(params):
    """Zero-initialised layers get values, so that every path carries something."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, drawn)


@pytest.fixture(scope="module")
def params(batch):
    return jax.jit(lambda: build().init(jax.random.key(0), **batch, method="init_all"))()["params"]


def test_tree_and_quickstart_shapes(params):
    assert set(params) == {"obs_encoder", "noise_pred_net"}
    assert params["obs_encoder"]["img_encoder"]["fc"]["kernel"].shape == (2 * 2 * 128, 128)
    net = params["noise_pred_net"]
    assert net["pos_embed"].shape == (1, 16 + 16 + 4, 128)
    assert net["patch_encoder"]["kernel"].shape == (2 * 2 * 2 * 12, 128)
    assert net["blocks"]["adaln"]["kernel"].shape == (2, 2 * 128 + 2 * 2 + 64, 6, 128)


def test_starts_at_zero(params, batch):
    network = build()

    def run(params):
        return network.apply({"params": params}, **batch, method="init_all")

    pred, _ = jax.jit(run)(params)
    assert {name: value.shape for name, value in pred.items()} == {"action": (B, 16, 2), "next_obs": (B, *LATENT)}
    assert all((np.asarray(value) == 0).all() for value in pred.values())


def test_parts_make_the_whole(params, batch):
    """Encoding once, modulating all steps and predicting one equals the training path at equal timesteps."""
    network, variables = build(), {"params": perturbed(params)}
    steps = {"action": jnp.array([90, 10]), "next_obs": jnp.array([90, 0])}

    @jax.jit
    def sampling(variables):
        cond = network.apply(variables, batch["images"], batch["low_dim"], None, method="encode_obs")
        modulation = network.apply(variables, cond, steps, method="modulation")
        second = jax.tree.map(lambda m: m[1], modulation)
        return network.apply(variables, batch["noisy"], second, method="predict")[0]

    @jax.jit
    def training(variables):
        cond = network.apply(variables, batch["images"], batch["low_dim"], method="encode_obs")
        rows = {"action": jnp.full(B, 10), "next_obs": jnp.full(B, 0)}
        return network.apply(variables, cond, batch["noisy"], rows)[0]

    for actual, wanted in zip(*map(jax.tree.leaves, (sampling(variables), training(variables))), strict=True):
        assert float(jnp.abs(wanted).max()) > 0.01
        np.testing.assert_allclose(actual, wanted, atol=3e-6 * float(jnp.abs(wanted).max()))


def test_gradients_reach_every_parameter(params, batch):
    network = build()

    def loss(params):
        pred, _ = network.apply({"params": params}, **batch, method="init_all")
        return sum(jnp.mean((p - 1) ** 2) for p in pred.values())

    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(perturbed(params)))[0]:
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
