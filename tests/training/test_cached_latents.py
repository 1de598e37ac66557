"""Training from cached latents is training from frames with the caches' draws, step for step."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.caching import Options, make
from tests.training import cached_case
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.training import cached_latents, codec_store
from uwm_jax.training import state as state_lib
from uwm_jax.training.build import build

STEPS = 3
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return cached_case.write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def cached(tiny_dataset, vae, tmp_path_factory):
    """A function that makes a dataset with caches of some options, once for each."""

    @functools.cache
    def made(augmented: bool, **options) -> Path:
        dataset = shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("cached") / "data")
        config = cached_case.config_of("uwm", dataset, vae, augmented=augmented)
        make(config, Options(seed=5, steps_per_part=30, **options), command="again", say=lambda line: None)
        return dataset

    return made


def steps_of(config, batches):
    """(losses of the steps, parameters after the last) of a run on these batches."""
    with cached_case.opened(config) as loader:
        data = loader.data
        codec, frozen = codec_store.open_codec(config, codec_store.in_dataset(config, data))
        cached_latents.check(config, data, codec, frozen)
        program = build(config, data.training_spec, codec, mesh_lib.data_mesh(jax.devices()))
        assert batches[0].keys() - {"augmentation"} == program.batch_like.keys() - {"augmentation"}
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(0.05 * rng.normal(size=x.shape), x.dtype), program.shapes.params)
        state = program.system.held(state_lib.create(config, params, program.optimizer))
        compiled = program.lower_step(frozen, batches[0]).compile(compiler_options=QUICKLY)
        losses = []
        for batch in batches:
            state, metrics = compiled(state, frozen, batch)
            losses.append({name: float(metrics[f"loss/{name}"].sum) for name in config.loss.weights})
        return losses, jax.device_get(state.params)


def assert_close(found, expected, tolerance):
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("augmented", [False, True])
def test_steps_are_those_from_frames_with_the_same_draws(augmented, cached, vae):
    kept = {}
    for dtype in ("float32", "float16"):
        dataset = cached(augmented, variants=2 if augmented else 1, dtype=dtype)
        config = cached_case.config_of("uwm", dataset, vae, augmented=augmented)
        kept[dtype] = cached_case.batches(cached_case.from_latents(config), STEPS)
        assert kept[dtype][0]["next_obs_latent"].dtype == dtype
        assert ("augmentation" in kept[dtype][0]) == augmented and "next_obs/wrist" not in kept[dtype][0]
    frames = cached_case.batches(config, STEPS)
    for ours, theirs in zip(frames, kept["float32"], strict=True):
        for key in ours.keys() & theirs.keys():  # the same windows
            np.testing.assert_array_equal(ours[key], theirs[key])
        if augmented:
            ours["augmentation"] = theirs["augmentation"]
    expected = steps_of(config, frames)
    assert_close(steps_of(cached_case.from_latents(config), kept["float32"]), expected, 1e-5)
    whole = [batch | {"next_obs_latent": np.float32(batch["next_obs_latent"])} for batch in kept["float16"]]
    assert_close(steps_of(cached_case.from_latents(config), whole), expected, 1e-3)
