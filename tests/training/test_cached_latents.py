"""Training from cached latents is training from frames with the caches' draws, step for step."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.caches.latents.caching import Options, make
from tests.training import cached_case
from uwm_jax import codecs, synthetic, systems, train
from uwm_jax import config as config_lib
from uwm_jax.data.held_out import windows_like
from uwm_jax.data.sources import of_episodes
from uwm_jax.errors import UserError
from uwm_jax.evaluation.evaluator import make_evaluation
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.training import cached_latents, codec_store
from uwm_jax.training import state as state_lib
from uwm_jax.training.build import build

STEPS = 3


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
        compiled = program.lower_step(frozen, batches[0]).compile()
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


def test_the_episodes_of_a_run_from_latents_are_those_of_one_from_frames(cached, vae):
    """So that its evaluations, which read held-out frames, know them for its own."""
    config = cached_case.config_of("uwm", cached(False, dtype="float32"), vae, augmented=False)
    config.data.sources.robot = config_lib.source(include=("/robot/",), exclude=(" latents ",))
    found = []
    for run in (config, cached_case.from_latents(config)):
        with cached_case.opened(run) as loader:
            found.append(loader.state(0)["datasets"]["robot"])
    frames, latents = found
    assert latents != frames and of_episodes(latents) == frames == of_episodes(frames)


def test_samples_of_stored_moments_are_those_of_the_posterior(cached, vae):
    """PAD reads all its frames as latents, and one draw of the posterior serves the current and the next ones."""
    dataset = cached(False, moments=True, dtype="float32")
    config = cached_case.config_of("pad", dataset, vae, augmented=False)
    config.model.codec.posterior = "sample"
    encoded = {}
    for latents, run in ((False, config), (True, cached_case.from_latents(config))):
        (batch,) = cached_case.batches(run, 1)
        assert ("obs/wrist" in batch) is not latents and ("obs_moments" in batch) is latents
        with cached_case.opened(run) as loader:
            codec, frozen = codec_store.open_codec(run, codec_store.in_dataset(run, loader.data))
            system = systems.make(run, loader.data.spec, codec)
        for key in (None, jax.random.key(3)):
            encode = jax.jit(system.encode).lower(frozen, batch, key).compile()
            found = encode(frozen, batch, key)
            encoded[latents, key is None] = {
                name: np.asarray(found[name]) for name in ("obs_latent", "next_obs_latent")
            }
    for mode in (True, False):
        for name, expected in encoded[False, mode].items():
            np.testing.assert_allclose(encoded[True, mode][name], expected, atol=1e-5, rtol=1e-5)
    assert np.abs(encoded[True, True]["obs_latent"] - encoded[True, False]["obs_latent"]).max() > 0.01


def test_a_cache_of_another_encoder_is_refused_before_the_first_step(cached, vae, tmp_path):
    config = cached_case.config_of("uwm", cached(False, variants=1, dtype="float32"), vae, augmented=False)
    config = cached_case.from_latents(config)
    for seed, fits in ((0, True), (1, False)):
        config.model.codec.vae = str(cached_case.write_vae(tmp_path / str(seed), seed))
        with cached_case.opened(config) as loader:
            codec, frozen = codec_store.open_codec(config, codec_store.in_dataset(config, loader.data))
            if fits:
                cached_latents.check(config, loader.data, codec, frozen)
            else:
                with pytest.raises(UserError, match=r"latents/vae/exterior/train: encoder: expected sha256"):
                    cached_latents.check(config, loader.data, codec, frozen)


def test_sampling_of_stored_modes_is_refused(cached, vae):
    config = cached_case.config_of("uwm", cached(False, variants=1, dtype="float32"), vae, augmented=False)
    config.model.codec.posterior = "sample"
    with pytest.raises(UserError, match=r"config.model.codec.posterior is 'sample': set it to 'mode', or .*--moments"):
        cached_case.batches(cached_case.from_latents(config), 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.latents": "pca"}, "config.data.latents='pca' names another codec than config.model.codec.name='vae'"),
        ({"data.augment.draw": "batch"}, "requires config.data.augment.draw='sample', found 'batch'"),
    ],
)
def test_configs_that_do_not_fit_latents_are_refused(fields, message, tmp_path):
    config = cached_case.from_latents(cached_case.config_of("uwm", tmp_path, tmp_path, augmented=True))
    with pytest.raises(UserError, match=message):
        config.update_from_flattened_dict(fields)
        cached_case.config_lib.validate(config)


def test_operations_of_a_step_from_latents_have_no_codec_in_them(tmp_path):
    for variant in ("uwm", "pad"):
        config = cached_case.config_of(variant, tmp_path, tmp_path, augmented=True)
        codec, spec = codecs.from_config(config), synthetic.synthetic_spec(config, action_dim=4)
        pixels, latents = (systems.make(c, spec, codec).flops() for c in (config, cached_case.from_latents(config)))
        assert latents.frozen == 0.0 < pixels.frozen and latents.trained == pixels.trained


@pytest.mark.slow
def test_an_evaluation_decodes_only_the_windows_that_it_shows(tmp_path, count_products):
    """Counted in what it traces to, for 8 windows of which 2 are shown: nothing runs."""
    config = cached_case.config_of("uwm", tmp_path, tmp_path, augmented=True)
    codec, spec = codecs.VAECodec.of_widths((8, 8), 4), synthetic.synthetic_spec(config, action_dim=4)
    frozen = jax.eval_shape(lambda: codec.synthetic_arrays(2, 16, 16))
    system, cheap = (systems.make(c, spec, codec) for c in (config, cached_case.from_latents(config)))
    params = jax.eval_shape(system.init, jax.random.key(0))
    batch = windows_like(spec, 8)
    views = len(spec.cameras)
    shape = jax.ShapeDtypeStruct((1, *system.latent_shape), np.float32)
    decoding = count_products(system.codec.decode, frozen, shape)
    references = {
        "mean_action": jax.ShapeDtypeStruct((4,), np.float32),
        "mean_image": jax.ShapeDtypeStruct((views, 1, 16, 16, 3), np.float32),
    }
    shown = jax.ShapeDtypeStruct((2,), np.int32)

    def made(system):
        evaluate = make_evaluation(system)
        names = jax.eval_shape(evaluate, params, frozen, batch, references, shown)
        return count_products(evaluate, params, frozen, batch, references, shown), names

    (all_of_them, (scores, windows)), (few, (own, shows)) = made(system), made(cheap)
    # video, forward and joint make frames, as does forward with other actions; from pixels also the codec's own bound
    assert all_of_them - few == pytest.approx((5 * 8 - 4 * 2) * decoding, rel=0.01)
    assert shows.keys() == windows.keys() and shows["forward/next_obs"].shape == windows["forward/next_obs"].shape
    assert "forward/psnr" in scores and {name for name in own if name.endswith(("psnr", "pixel_mse"))} == set()
    assert {"forward/latent_mse", "policy/action_mse", "baseline/copied_frame/latent_mse"} <= own.keys()


@pytest.mark.slow
def test_a_run_trains_from_latents_and_continues_with_the_same_alone(tiny_config, tmp_path):
    """Through the command, with the codec `pca`, whose arrays are one entry a view."""
    tiny_config.data.path = str(shutil.copytree(tiny_config.data.path, tmp_path / "data"))
    tiny_config.data.cameras, tiny_config.model.encoder.use_low_dim = ("wrist",), True
    tiny_config.total_steps = tiny_config.checkpoint.every = 2
    tiny_config.log_every = 1
    caches = dict(command="again", say=lambda line: None)
    make(tiny_config, Options(variants=2), **caches)
    tiny_config.data.latents = "pca"
    train.train(tiny_config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(np.isfinite(line["loss"]) for line in lines)
    make(tiny_config, Options(variants=2, seed=1), overwrite=True, **caches)
    tiny_config.total_steps = 4
    with pytest.raises(UserError, match="the checkpoint's data order has datasets/"):
        train.train(tiny_config, tmp_path / "run")
