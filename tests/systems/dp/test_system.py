"""Diffusion Policy between a batch and its loss: draws, shares, what a row's loss is, counts and tables."""

from __future__ import annotations

import dataclasses
import fnmatch
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax import synthetic, systems
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.systems.dp.system import DP

KINDS = [("transformer", "ddim"), ("unet", "ddim"), ("transformer", "flow")]


def small(predictor: str = "transformer", kind: str = "ddim", count: int = 1) -> DP:
    """Two views of odd sizes, state and text, widths that are all different."""
    c = config_lib.base("dp")
    c.data.cameras, c.data.low_dim, c.data.text = ("left", "right"), ("state",), "text"
    c.data.resize = c.data.crop = (24, 40)
    c.data.window.action = tuple(range(1, 9))
    c.model.predictor, c.diffusion.kind, c.diffusion.num_train_noise_samples = predictor, kind, count
    c.model.embed_dim, c.model.depth, c.model.num_heads = 48, 3, 4
    c.model.timestep_embed_dim, c.model.mlp_ratio = 20, 3
    c.model.unet.down_dims, c.model.unet.kernel_size = (16, 24, 40), 5
    c.model.encoder.stage_sizes, c.model.encoder.width = (1, 2), 16
    c.model.encoder.use_low_dim = c.model.encoder.use_language = True
    config_lib.validate(c)
    window, cameras = WindowSpec.from_config(c.data.window), dict.fromkeys(c.data.cameras, (24, 40))
    return systems.make(c, DataSpec(window, cameras, {"state": 7}, 6, 11, Normalizer()))


def filled(shapes):
    """Parameters of a plausible size everywhere: those of a fresh network hide what zeros multiply."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def system(request) -> DP:
    return small(*request.param)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_draws_of_a_row_depend_on_the_key_and_its_number_alone(kind, count):
    system, key = small(kind=kind, count=count), jax.random.key(1)
    draws = jax.jit(system.draws)
    all_rows, some = draws(key, jnp.arange(64)), draws(key, jnp.array([5, 2]))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[jnp.array([5, 2])], y), all_rows, some)
    noise, time = all_rows["noise"]["action"], np.asarray(all_rows["timestep"]["action"])
    lead = (64,) if count == 1 else (64, count)
    assert noise.shape == (*lead, 8, 6) and time.shape == lead
    assert len(np.unique(noise)) > 0.99 * noise.size
    if kind == "flow":
        assert time.dtype == np.float32 and 0 <= time.min() < 0.1 and 0.9 < time.max() < 1
    else:
        assert time.dtype == np.int32 and 0 <= time.min() < 10 and 90 <= time.max() < 100
    other = draws(jax.random.key(2), jnp.arange(64))
    assert not np.array_equal(other["timestep"]["action"], time)


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_the_loss_of_a_row_is_the_mean_over_its_draws(kind):
    system = small(kind=kind, count=2)
    batch = synthetic.synthetic_batch(system, 2)
    encoded = system.encode({}, batch)
    several = system.draws(jax.random.key(3), batch["row"])

    @jax.jit
    def losses(params):
        apart = [system.losses(params, encoded, jax.tree.map(lambda x, i=i: x[:, i], several)) for i in range(2)]
        return system.losses(params, encoded, several), apart

    together, apart = losses(filled(jax.eval_shape(system.init, jax.random.key(0))))
    wanted = (apart[0].parts["action"] + apart[1].parts["action"]) / 2
    np.testing.assert_allclose(together.parts["action"], wanted, rtol=2e-6)
    outputs = jnp.stack([found.outputs["noise_pred/action"] for found in apart], axis=1)
    np.testing.assert_allclose(together.outputs["noise_pred/action"], outputs, atol=2e-6)
    buckets = together.buckets.values()
    assert sum(float(bucket.rows) for bucket in buckets) == 4
    total = sum(float(bucket.total) for bucket in buckets)
    assert total == pytest.approx(2 * float(together.parts["action"].sum()), rel=1e-6)


def test_shares_are_those_of_a_mean(system):
    batch = {"action_mask": jnp.array([True, True, False, True])}
    np.testing.assert_allclose(system.shares(batch, jax.random.key(0))["action"], [1 / 3, 1 / 3, 0, 1 / 3])


def test_every_product_is_counted(system, count_products):
    batch = synthetic.synthetic_batch(system, 1)
    params = jax.eval_shape(system.init, jax.random.key(0))
    encoded = system.encode({}, batch)
    draws = system.draws(jax.random.key(0), batch["row"])
    counted = system.flops()
    encoder = count_products(lambda p: system.encode_obs(p, encoded), params)
    assert counted.trained["encoder"] == encoder
    assert (
        counted.trained["network"] == count_products(lambda p: system.losses(p, encoded, draws).parts, params) - encoder
    )
    twice = small(system.config.model.predictor, system.config.diffusion.kind, 2)
    assert twice.flops().trained == {**counted.trained, "network": 2 * counted.trained["network"]}


@pytest.mark.parametrize("predictor", ["transformer", "unet"])
def test_the_tables_cover_the_official_network(predictor):
    c = config_lib.base("dp")
    c.model.predictor = predictor
    spec = dataclasses.replace(synthetic.synthetic_spec(c, action_dim=10), text_dim=0)
    system = systems.make(c, spec)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    }
    rules = system.tree.mesh_rules
    used = set()
    for name, x in names.items():
        pattern, entries = next(rule for rule in rules if fnmatch.fnmatchcase(name, rule[0]))
        used.add(pattern)
        assert len(entries) <= len(x.shape), name
        whole = pattern == "*" and name.endswith("/kernel")
        assert not whole or 4 * math.prod(x.shape) < 1 << 16, f"{name} is whole on every device"
    unused = {pattern for pattern, _ in rules} - used - {"obs_encoder/text_head/kernel"}
    assert not unused or predictor == "transformer"
    for patterns in (*system.tree.interfaces.values(), system.tree.misfits):
        assert all(fnmatch.filter(names, pattern) for pattern in patterns), patterns
