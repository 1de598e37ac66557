"""A system as a backend: raw inputs and noise in, the keys and units of files out."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.small import SIZE, on_pusht, small_config
from uwm_jax import codecs, systems
from uwm_jax.backend import JaxBackend, episode_noise
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.systems.base import Promised

SCALE, OFFSET = np.array([250.0, 100.0], np.float32), np.array([256.0, 300.0], np.float32)
ROWS = 2


def make(variant: str) -> JaxBackend:
    """A small model of PushT's observations, with parameters that are nowhere zero."""
    config = on_pusht(small_config(variant), Path("nowhere"), 0.1)
    if "codec" in config.model:
        config.model.codec.name, config.model.patch = "pixels", (2, 4, 4)
    normalizer = Normalizer({"action": (SCALE, OFFSET), "agent_pos": (SCALE, OFFSET)})
    window = WindowSpec.from_config(config.data.window)
    spec = DataSpec(window, {"image": (SIZE, SIZE)}, {"agent_pos": 2}, 2, 0, normalizer)
    system = systems.make(config, spec, codecs.from_config(config) if "codec" in config.model else None)
    params = jax.jit(system.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.15 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    return JaxBackend(system, params, {}, step=3)


@pytest.fixture(scope="module")
def dp() -> JaxBackend:
    return make("dp")


def inputs(backend: JaxBackend, rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (rows, 2, SIZE, SIZE, 3), np.uint8)
    return {"obs/image": frames, "obs/agent_pos": rng.uniform(0, 512, (rows, 2, 2)).astype(np.float32)}


def test_a_rows_noise_is_that_of_its_episode_and_decision_alone(dp):
    noise = np.asarray(dp.noise("policy", 5, np.array([7, 8, 7]), np.array([0, 0, 2]))["action"])
    for row, (seed, decision) in enumerate([(7, 0), (8, 0), (7, 2)]):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), seed), decision)
        np.testing.assert_array_equal(noise[row], dp.model.noise(key, jnp.zeros(1, jnp.int32), "policy")["action"][0])
    others = episode_noise(dp.model, "policy", 5, np.array([9, 7]), np.array([1, 2]))
    np.testing.assert_array_equal(others["action"][1], noise[2])


def test_inputs_are_normalised_and_actions_are_raw(dp):
    raw, noise = inputs(dp), dp.noise("policy", 0, np.arange(ROWS), np.zeros(ROWS))
    made = dp.sample("policy", raw, noise)
    batch = {"obs/image": raw["obs/image"], "obs/agent_pos": (raw["obs/agent_pos"] - OFFSET) / SCALE}
    params, frozen = dp.arrays

    @jax.jit
    def sample(params, frozen, batch, noise):
        return dp.model.sample(params, dp.model.encode(frozen, batch), "policy", noise)["action"]

    expected = sample(params, frozen, batch, noise)
    assert made.keys() == {"action", "action_normalized"} and made["action"].dtype == np.float32
    np.testing.assert_array_equal(made["action_normalized"], expected)
    np.testing.assert_array_equal(made["action"], np.asarray(expected) * SCALE + OFFSET)
    assert (dp.system, dp.step, dp.parameters, dp.can_promise) == ("dp", 3, "raw", True)


@pytest.mark.parametrize("guided", [False, True])
def test_promised_rows_come_back_as_they_were_promised(dp, guided):
    raw, noise = inputs(dp), dp.noise("policy", 0, np.arange(ROWS), np.zeros(ROWS))
    plain = dp.sample("policy", raw, noise)["action_normalized"]
    values = np.random.default_rng(1).uniform(-1, 1, plain.shape).astype(np.float32)
    mask = np.arange(plain.shape[1]) < np.array([[2], [0]])
    made = dp.sample("policy", raw, noise, Promised(values, mask), guided=guided, actions_only=True)
    np.testing.assert_array_equal(made["action_normalized"][mask], values[mask])
    moved = np.abs(made["action_normalized"] - plain)
    assert moved[1].max() < 1e-6 < 5e-6 < moved[0, 2:].max()  # nothing is promised of the second row


@pytest.mark.slow
def test_every_use_answers_in_the_keys_of_files_alone_and_together():
    uwm = make("uwm")
    rng = np.random.default_rng(2)
    given = inputs(uwm) | {
        "action": rng.uniform(0, 512, (ROWS, 4, 2)).astype(np.float32),
        "next_obs/image": rng.integers(0, 256, (ROWS, 2, SIZE, SIZE, 3), np.uint8),
    }
    noise = {use: uwm.noise(use, 0, np.arange(ROWS), np.zeros(ROWS)) for use in uwm.uses}
    together = uwm.answers(tuple(uwm.uses), given, noise, float_frames=True)
    for name, use in uwm.uses.items():
        read = {k: x for k, x in given.items() if k.startswith("obs/") or k.partition("/")[0] in use.given}
        alone = uwm.sample(name, read, noise[name])
        keys = {"action", "action_normalized"} if "action" in use.makes else set()
        keys |= {"next_obs_latent", "next_obs/image"} if "next_obs" in use.makes else set()
        assert alone.keys() == keys
        assert together[name].keys() - keys == ({"next_obs_float/image"} if "next_obs" in use.makes else set())
        if "next_obs" in use.makes:
            assert alone["next_obs/image"].dtype == np.uint8
            assert alone["next_obs/image"].shape == (ROWS, 2, SIZE, SIZE, 3)
            shown = np.clip(together[name]["next_obs_float/image"], 0, 1) * 255
            assert np.abs(shown - alone["next_obs/image"]).max() <= 1.01
        if "action" in use.makes:
            np.testing.assert_allclose(
                alone["action_normalized"], together[name]["action_normalized"], rtol=0, atol=2e-5
            )
    only = uwm.sample("joint", inputs(uwm), noise["joint"], actions_only=True)
    assert only.keys() == {"action", "action_normalized"}
