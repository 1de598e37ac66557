"""Promised actions through every system that samples in steps: they come back exactly, and cost nothing if none is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.small import SYSTEMS, small_config
from uwm_jax import systems
from uwm_jax.synthetic import synthetic_batch, synthetic_system
from uwm_jax.systems.base import Promised

ROWS, ACTIONS, COLUMNS = 3, 4, 2
COUNTS = np.array([1, 2, 0])  # promised actions of each row
MASK = np.arange(ACTIONS) < COUNTS[:, None]


def made(variant):
    config = small_config(variant)
    config.data.cameras, config.data.low_dim = ("front",), ("state",)
    config.diffusion.num_inference_steps = 3
    system, frozen = synthetic_system(config, COLUMNS)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    return system, params, frozen


def test_systems_say_whether_they_can():
    can = {variant: systems.get(kind).make.can_promise for variant, kind in SYSTEMS.items()}
    assert can == {"uwm": True, "dp": True, "dp_unet": True, "dp_flow": True, "pad": True, "gr1": False}


@pytest.mark.parametrize("variant", ["uwm", "dp_unet", "dp_flow", "pad"])
def test_promised_actions(variant):
    system, params, frozen = made(variant)
    batch = synthetic_batch(system, ROWS)
    noise = system.noise(jax.random.key(0), batch["row"], system.acting)
    action = jax.random.normal(jax.random.key(1), (ROWS, ACTIONS, COLUMNS))

    @jax.jit
    def plain(params):
        return system.sample(params, system.encode(frozen, batch), system.acting, noise)

    def with_promised(guided):
        def run(params, mask):
            promised = Promised(action, mask)
            encoded = system.encode(frozen, batch)
            return system.sample(params, encoded, system.acting, noise, promised=promised, guided=guided)

        return jax.jit(run)

    free, held, guided = plain(params), with_promised(False), with_promised(True)
    none = held(params, jnp.zeros(MASK.shape, bool))
    for name, x in free.items():
        np.testing.assert_array_equal(none[name], x)
    for run in (held, guided):
        kept = run(params, jnp.asarray(MASK))
        np.testing.assert_array_equal(kept["action"][MASK], action[MASK])
        for name, x in free.items():
            np.testing.assert_allclose(kept[name][2], x[2], rtol=0, atol=1e-5)  # that row promises nothing
            assert np.isfinite(kept[name]).all()
        assert np.abs(kept["action"] - free["action"])[~MASK].max() > 1e-3, "the others follow the promised ones"


def test_gr1_refuses_promised_actions():
    config = small_config("gr1")
    config.data.cameras = ("front",)
    system, _ = synthetic_system(config, COLUMNS)
    promised = Promised(jnp.zeros((ROWS, ACTIONS, COLUMNS)), jnp.asarray(MASK))
    with pytest.raises(ValueError, match="cannot hold promised actions"):
        system.sample({}, {}, "joint", {}, promised=promised)
