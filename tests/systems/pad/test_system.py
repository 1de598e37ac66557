"""The wiring of PAD between a batch and its losses and samples."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import reference
from tests.golden.reference import channels_last
from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.codecs import PixelsCodec
from uwm_jax.codecs.base import Codec
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.sample import check_inputs
from uwm_jax.synthetic import synthetic_batch, synthetic_system
from uwm_jax.systems.pad import official
from uwm_jax.systems.pad.system import PAD
from uwm_jax.torch_bridge import layout
from uwm_jax.training.patterns import matches

MODALITIES = ("action", "next_obs")


def small(**fields) -> config_lib.ConfigDict:
    """Two cameras of 8 x 8 pixels as latents, four actions of three columns."""
    c = config_lib.base("pad")
    c.data.cameras, c.data.resize, c.data.crop = ("left", "right"), (8, 8), (8, 8)
    c.data.window.action, c.data.window.next_obs = (1, 2, 3, 4), (5, 6)
    c.model.update({"embed_dim": 24, "depth": 2, "num_heads": 3, "timestep_embed_dim": 16, "patch": (2, 4, 4)})
    c.model.codec.name = "pixels"
    c.update_from_flattened_dict(fields)
    config_lib.validate(c)
    return c


def make(**fields) -> PAD:
    return synthetic_system(small(**fields), action_dim=3)[0]


@pytest.fixture(scope="module")
def system() -> PAD:
    return make()


@pytest.fixture(scope="module")
def params(system) -> dict:
    """Parameters none of which is zero, as a new network's heads are."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(system.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32) for x in leaves])


@functools.cache
def program(system: PAD):
    """(params, batch, key) -> losses by part as the trainer sums them, their gradients, encoded, draws."""

    def run(params, batch, key):
        shares = system.shares(batch, key)
        encoded, draws = system.encode({}, batch, key), system.draws(key, batch["row"])

        def loss(params):
            found = system.losses(params, encoded, draws, train=True)
            parts = {m: (shares[m] * x).sum() for m, x in found.parts.items()}
            return sum(parts.values()), (parts, found)

        gradients, (parts, found) = jax.grad(loss, has_aux=True)(params)
        return parts, gradients, found, encoded, draws

    return jax.jit(run)


def test_protocol(system):
    assert isinstance(system, PAD) and systems.get("pad").make is PAD
    assert list(system.uses) == ["joint"] and system.acting == "joint"
    assert system.uses["joint"].makes == MODALITIES and not system.uses["joint"].given
    assert set(system.config.loss.weights) == set(MODALITIES)
    assert system.tree.untrained == () and system.tree.pretrained == ()


def test_one_timestep_and_independent_noise(system):
    rows = jnp.arange(64)
    draws = jax.jit(system.draws)(jax.random.key(3), rows)
    np.testing.assert_array_equal(draws["timestep"]["action"], draws["timestep"]["next_obs"])
    steps = np.asarray(draws["timestep"]["action"])
    assert steps.min() >= 0 and steps.max() < 100 and len(set(steps.tolist())) > 20
    noise = draws["noise"]
    assert {m: x.shape[1:] for m, x in noise.items()} == {"action": (4, 3), "next_obs": (2, 2, 8, 8, 3)}
    for m in MODALITIES:
        assert abs(np.asarray(noise[m]).std() - 1) < 0.1
    again = jax.jit(system.draws)(jax.random.key(3), rows[10:12])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[10:12]), again, draws)


def test_unequal_timesteps_are_refused(system):
    batch = synthetic_batch(system, 2)
    arrays = {key: np.asarray(x) for key, x in batch.items() if key not in ("row", "action_mask")}
    arrays |= {f"noise/{m}": np.zeros((2, *shape), np.float32) for m, shape in system.shapes.items()}
    arrays |= {"timestep/action": np.array([3, 7]), "timestep/next_obs": np.array([3, 7])}
    assert check_inputs(system, ["denoise"], arrays).batch_size == 2
    with pytest.raises(UserError, match=r"timestep/next_obs: expected timestep/action, \[3 7\].* found \[3 8\]"):
        check_inputs(system, ["denoise"], {**arrays, "timestep/next_obs": np.array([3, 8])})


def test_rows_without_actions(system, params):
    """Masked rows count for the video alone; their placeholder actions reach nothing."""
    batch = synthetic_batch(system, 4)
    mask = jnp.array([True, False, True, False])
    key = jax.random.key(1)
    parts, gradients, found, _, _ = program(system)(params, {**batch, "action_mask": mask}, key)
    errors = {m: np.asarray(x) for m, x in found.parts.items()}
    np.testing.assert_allclose(parts["action"], errors["action"][::2].mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["next_obs"], errors["next_obs"].mean(), rtol=1e-5)
    assert sum(float(b.rows) for name, b in found.buckets.items() if name.startswith("action/")) == 2
    assert sum(float(b.rows) for name, b in found.buckets.items() if name.startswith("next_obs/")) == 4
    assert not np.asarray(gradients["noise_pred_net"]["pad_tokens"]).any()
    other = {**batch, "action_mask": mask, "action": batch["action"].at[1::2].add(3.0)}
    again, other_gradients, _, _, _ = program(system)(params, other, key)
    np.testing.assert_allclose([*again.values()], [*parts.values()], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), other_gradients, gradients
    )


def test_a_batch_of_video_alone_trains_no_actions(system, params):
    batch = {**synthetic_batch(system, 4), "action_mask": jnp.zeros(4, bool)}
    parts, gradients, _, _, _ = program(system)(params, batch, jax.random.key(1))
    shares = system.shares(batch, jax.random.key(1))
    assert not np.asarray(shares["action"]).any() and float(shares["next_obs"].sum()) == pytest.approx(1)
    assert float(parts["action"]) == 0 and float(parts["next_obs"]) > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    network = gradients["noise_pred_net"]
    assert not any(np.asarray(g).any() for g in jax.tree.leaves((network["action_encoder"], network["action_decoder"])))
    assert np.asarray(network["patch_decoder"]["kernel"]).any()


class Posterior(PixelsCodec):
    """Pixels with a posterior: a row's key moves its latents."""

    def encode(self, params, frames, rng):
        latents = super().encode(params, frames, None)
        if rng is None:
            return latents
        return latents + jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(rng)


def with_codec(config: config_lib.ConfigDict, codec: Codec) -> PAD:
    spec = DataSpec(
        WindowSpec.from_config(config.data.window),
        dict.fromkeys(config.data.cameras, config.data.resize),
        {},
        3,
        0,
        Normalizer(),
    )
    return systems.make(config, spec, codec)


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_latents_of_current_and_next_frames(posterior):
    """Samples of the posterior in training, independent of each other; the mode without a key."""
    system = with_codec(small(**{"model.codec.posterior": posterior}), Posterior())
    encode = jax.jit(lambda batch, key=None: system.encode({}, batch, key))
    batch = synthetic_batch(system, 2)
    mode = encode(batch)
    for name, group in (("obs_latent", "obs"), ("next_obs_latent", "next_obs")):
        frames = np.stack([batch[f"{group}/{c}"] for c in ("left", "right")], axis=1) / 255
        np.testing.assert_allclose(mode[name], 2 * frames - 1, atol=1e-5)
    black = {k: jnp.zeros_like(x) if k.endswith(("left", "right")) else x for k, x in batch.items()}  # so augmented too
    drawn = encode(black, jax.random.key(0))
    noise = [np.asarray(drawn[name]) + 1 for name in ("obs_latent", "next_obs_latent")]
    if posterior == "mode":
        np.testing.assert_allclose(noise, 0, atol=1e-5)
        return
    assert all(abs(x.std() - 1) < 0.1 for x in noise)
    assert abs(np.corrcoef(*(x.ravel() for x in noise))[0, 1]) < 0.1


def test_latents_that_are_given_or_not_asked_for(system):
    batch = synthetic_batch(system, 2)
    mode = system.encode({}, batch)
    current = {k: x for k, x in batch.items() if not k.startswith("next_obs/")}
    assert set(system.encode({}, current)) == {"obs_latent", "action", "action_mask"}
    given = system.encode({}, {**batch, "next_obs_latent": mode["next_obs_latent"] + 1})
    np.testing.assert_array_equal(given["next_obs_latent"], mode["next_obs_latent"] + 1)
    np.testing.assert_array_equal(given["obs_latent"], mode["obs_latent"])


def test_sample_goes_with_its_noise_and_observation(system, params):
    encoded = system.encode({}, synthetic_batch(system, 3))
    noise = system.noise(jax.random.key(0), jnp.arange(3), "joint")
    sample = jax.jit(functools.partial(system.sample, use="joint"), static_argnames="trace")
    made = sample(params, encoded, noise=noise)
    assert {k: x.shape for k, x in made.items()} == {"action": (3, 4, 3), "next_obs_latent": (3, 2, 2, 8, 8, 3)}
    assert all(np.abs(x).max() <= 1 for x in made.values())
    traced = sample(params, encoded, noise=noise, trace=True)
    np.testing.assert_array_equal(traced["action"][0], noise["action"])
    np.testing.assert_allclose(traced["next_obs_latent"][-1], made["next_obs_latent"], atol=1e-5)
    moved = sample(params, {**encoded, "obs_latent": encoded["obs_latent"].at[1].add(0.5)}, noise=noise)
    for name, before in made.items():
        np.testing.assert_allclose(moved[name][::2], before[::2], atol=1e-5)
        assert np.abs(moved[name][1] - before[1]).max() > 1e-3


def test_official_losses():
    """The official class's losses with a mask, through shares and parts."""
    numbers = reference.numbers("pad_libero_small")
    c = small(
        **{
            "model.embed_dim": 48,
            "model.timestep_embed_dim": 32,
            "data.window.action": tuple(range(1, 17)),
            "data.window.next_obs": (17, 18),
        }
    )
    c.data.resize = c.data.crop = (64, 64)

    class Latents(PixelsCodec):
        def latent_shape(self, num_views, num_frames, height, width):
            return num_views, num_frames, height // 8, width // 8, 4

    spec = DataSpec(
        WindowSpec.from_config(c.data.window), dict.fromkeys(c.data.cameras, (64, 64)), {}, 7, 0, Normalizer()
    )
    system = systems.make(c, spec, Latents())
    tensors = {n: x for n, x in reference.weights("pad_libero_small").items() if ".vae." not in n}
    like = jax.eval_shape(system.init, jax.random.key(0))
    params = layout.from_official(tensors, like, official.entry_of(c.model.patch), "official")
    encoded = {
        "obs_latent": channels_last(numbers["obs_latent"]),
        "next_obs_latent": channels_last(numbers["next_obs_latent"]),
        "action": numbers["action_normalized"],
    }
    draws = {
        "timestep": {m: numbers[f"timestep/{m}"].astype(np.int32) for m in MODALITIES},
        "noise": {"action": numbers["noise/action"], "next_obs": channels_last(numbers["noise/next_obs"])},
    }
    losses = jax.jit(system.losses)
    for prefix, mask in (("", None), ("masked/", numbers["action_mask"])):
        found = losses(params, encoded if mask is None else {**encoded, "action_mask": mask}, draws)
        shares = system.shares({"action_mask": jnp.ones(3, bool) if mask is None else mask}, jax.random.key(0))
        for m in MODALITIES:
            np.testing.assert_allclose((shares[m] * found.parts[m]).sum(), numbers[f"{prefix}loss/{m}"], rtol=2e-5)
        assert {"obs_latent", "next_obs_latent", "noise_pred/action", "noise_pred/next_obs"} <= set(found.outputs)


def test_parameters_by_name(system):
    """Every kernel has a rule of its own, every interface and position exists, and every group has parameters."""
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    rules = [pattern for pattern, _ in system.tree.mesh_rules]
    for name in names:
        if name.endswith("kernel"):
            assert matches(name, rules[:-1]), name
    for patterns in (*system.tree.interfaces.values(), tuple(system.tree.misfits)):
        assert all(any(matches(name, [pattern]) for name in names) for pattern in patterns)
    groups = [next(group for part, group in system.tree.gradient_groups if part in name) for name in names]
    assert set(groups) == {group for _, group in system.tree.gradient_groups}


def test_operations(system, count_products):
    latent = jnp.zeros((1, *system.latent_shape))
    noisy = {"action": jnp.zeros((1, *system.action_shape)), "next_obs": latent}
    params = jax.eval_shape(system.init, jax.random.key(0))["noise_pred_net"]

    def evaluate(params):
        return system.network.apply({"params": params}, latent, noisy, jnp.zeros(1, int))[0]

    assert system.flops().trained == {"network": count_products(evaluate, params)}
    assert system.flops().frozen == 0  # pixels


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model.patch": (2, 3, 4)}, "config.model.patch"),
        ({"model.num_heads": 5}, "num_heads=5 does not divide"),
        ({"model.timestep_embed_dim": 7}, "timestep_embed_dim"),
        ({"data.window.next_obs": ()}, "config.data.window.next_obs"),
        ({"data.window.next_obs": (5,)}, "config.data.window.next_obs has 1 frames"),
        ({"diffusion.num_inference_steps": 101}, "num_inference_steps=101"),
        ({"data.cameras": ()}, "config.data.cameras"),
    ],
)
def test_unusable_fields_are_named(fields, words):
    with pytest.raises(UserError, match=words):
        make(**fields)


def test_state_is_told_to_be_unused():
    (line,) = systems.get("pad").remarks(small(**{"data.low_dim": ("state",)}))
    assert "config.data.low_dim=('state',)" in line
