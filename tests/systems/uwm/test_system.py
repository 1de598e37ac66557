"""The wiring between a batch and its loss: what reaches the network, and what a config field changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.codecs import PixelsCodec, VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.systems.uwm import objective
from uwm_jax.systems.uwm.system import UWM

SPEC = DataSpec(
    window=WindowSpec({"obs": (0, 1), "action": (1, 2, 3, 4), "next_obs": (5, 6)}),
    cameras={"wrist": (16, 16)},
    low_dim={"state": 3},
    action_dim=10,
    text_dim=0,
    normalizer=Normalizer({"action": (np.full(10, 2.0, np.float32), np.ones(10, np.float32))}),
)


class Recorder:
    """A network that keeps what it is given and predicts the timestep and what it sees."""

    def __init__(self):
        self.seen = {}

    def apply(self, variables, *args, method=None):
        if method == "encode_obs":
            images, low_dim, _ = args
            self.seen |= {"images": images, "state": low_dim["state"]}
            return images.reshape(len(images), -1)[:, :4]
        cond, noisy, timestep = args
        self.seen |= {"noisy": noisy, "timestep": timestep}
        level = 0.01 * timestep["action"] + cond.mean(axis=1)
        return {m: x * 0.1 + level.reshape(-1, *[1] * (x.ndim - 1)) for m, x in noisy.items()}, {}


@pytest.fixture
def config(tiny_config):
    tiny_config.model.codec.name = "pixels"
    return tiny_config


def make(config, codec=None):
    system = UWM(config, SPEC, codec or PixelsCodec())
    system.network = Recorder()
    return system


def batch(rows=64, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "obs/wrist": jnp.asarray(rng.integers(0, 256, (rows, 2, 16, 16, 3)), jnp.uint8),
        "next_obs/wrist": jnp.asarray(rng.integers(0, 256, (rows, 2, 16, 16, 3)), jnp.uint8),
        "obs/state": jnp.asarray(rng.normal(size=(rows, 2, 3)), jnp.float32),
        "action": jnp.asarray(rng.uniform(-1, 1, (rows, 4, 10)), jnp.float32),
        "action_mask": jnp.ones(rows, bool),
        "row": jnp.arange(rows, dtype=jnp.int32),
    }


def evaluate(system, params, frozen, data, key, augment=True):
    """One training evaluation, as the trainer makes it, or without augmentation."""
    encoded = system.encode(frozen, data, key if augment else None)
    return system.losses(params, encoded, system.draws(key, data["row"]))


def loss(system, data, seed=0, frozen=None, **options):
    """{modality: loss} and what reached the network."""

    @jax.jit
    def run(frozen, data, key):
        errors, shares = evaluate(system, {}, frozen, data, key, **options).parts, system.shares(data, key)
        return {m: (shares[m] * errors[m]).sum() for m in errors}, system.network.seen

    return run(frozen or {}, data, jax.random.key(seed))


def test_rows_without_actions_are_hidden_and_may_be_dropped(config):
    data = batch() | {"action_mask": jnp.arange(64) % 4 != 0}
    kept, seen = loss(make(config), data)
    assert (seen["timestep"]["action"][::4] == 99).all()
    assert len(set(np.asarray(seen["timestep"]["action"][1::4]).tolist())) > 5
    config.loss.action_free = "dropped"
    dropped, _ = loss(make(config), data)
    assert kept["action"] != dropped["action"]
    assert kept["next_obs"] == dropped["next_obs"]


def test_timesteps_follow_the_config(config):
    _, uniform = loss(make(config), batch(256))
    config.diffusion.next_obs_timesteps = "high_noise"
    _, noisy = loss(make(config), batch(256))
    late = [float((s["timestep"]["next_obs"] >= 75).mean()) for s in (uniform, noisy)]
    assert late[0] < 0.4 < 0.5 < late[1]
    np.testing.assert_array_equal(uniform["timestep"]["action"], noisy["timestep"]["action"])


def test_augmentation_reaches_both_images_and_is_off_for_held_out_data(config):
    data = batch(8)
    _, plain = loss(make(config), data, augment=False)
    expected = data["obs/wrist"][:, None] / 255.0
    np.testing.assert_allclose(plain["images"], expected, atol=1e-6)
    _, augmented = loss(make(config), data)
    assert float(jnp.abs(augmented["images"] - expected).max()) > 0.05
    # At the first timesteps the noisy latent is nearly the clean one, which shows the augmented pixels too.
    early = np.flatnonzero(np.asarray(augmented["timestep"]["next_obs"]) < 100)
    difference = jnp.abs(augmented["noisy"]["next_obs"] - plain["noisy"]["next_obs"])[early]
    assert float(difference.max()) > 0.05


def test_a_row_depends_on_its_index_alone(config):
    """Shuffled rows give the same rows, and a smaller batch the same first rows.

    Draws are equal to the bit; the jitter's arithmetic, compiled for another batch size, to float32 rounding.
    """
    data = batch(8)
    noise = make(config).noise(jax.random.key(0), data["row"], "policy")
    for name, value in make(config).noise(jax.random.key(0), data["row"][:3], "policy").items():
        np.testing.assert_array_equal(value, noise[name][:3])
    _, whole = loss(make(config), data)
    order = np.array([3, 0, 7, 1, 2, 6, 5, 4])
    _, shuffled = loss(make(config), {k: v[order] for k, v in data.items()})
    _, part = loss(make(config), {k: v[:3] for k, v in data.items()})
    for name in ("action", "next_obs"):
        np.testing.assert_array_equal(shuffled["timestep"][name], whole["timestep"][name][order])
        np.testing.assert_allclose(shuffled["noisy"][name], whole["noisy"][name][order], atol=1e-5)
        np.testing.assert_allclose(part["noisy"][name], whole["noisy"][name][:3], atol=1e-5)
    np.testing.assert_allclose(shuffled["images"], whole["images"][order], atol=1e-5)


@pytest.mark.slow
def test_one_draw_for_the_batch_is_that_of_the_step_whichever_rows_are_at_hand(config):
    config.data.augment.draw = "batch"
    data = batch(8)
    _, whole = loss(make(config), data)
    _, part = loss(make(config), {k: v[5:] for k, v in data.items()})
    np.testing.assert_allclose(part["images"], whole["images"][5:], atol=1e-5)


def test_steps_differ(config):
    data = batch(8)
    first, second = (loss(make(config), data, seed=seed)[0] for seed in (0, 1))
    assert first != second


@pytest.mark.slow
def test_the_posterior_is_sampled_or_its_mode(config):
    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    frozen = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    data = batch(4)
    results = {}
    for posterior in ("sample", "mode"):
        config.model.codec.posterior = posterior
        results[posterior] = loss(make(config, VAECodec(vae)), data, frozen=frozen)[1]["noisy"]["next_obs"]
        held_out = loss(make(config, VAECodec(vae)), data, frozen=frozen, augment=False)[1]["noisy"]["next_obs"]
        results[f"{posterior}, held out"] = held_out
    assert float(jnp.abs(results["sample"] - results["mode"]).max()) > 1e-3
    np.testing.assert_array_equal(results["sample, held out"], results["mode, held out"])


@pytest.mark.slow
def test_the_loss_at_the_start_is_the_variance_of_the_noise(config):
    """The real network's outputs are zero at initialisation, so both losses are the mean square of the noise."""
    config.data.augment.hue = 0.0
    system = UWM(config, SPEC, PixelsCodec())
    params = jax.jit(system.init)(jax.random.key(0))
    data = batch(16)
    key = jax.random.key(3)
    errors = jax.jit(lambda params, data: evaluate(system, params, {}, data, key).parts)(params, data)
    noise = system.noise(jax.random.fold_in(key, 0), data["row"], "policy")
    for m in noise:
        np.testing.assert_allclose(errors[m], jnp.square(noise[m]).reshape(16, -1).mean(axis=1), rtol=1e-5)


class Nudged:
    """A network that adds something to the noisy action that it is given."""

    def __init__(self, network, nudge):
        self.network, self.nudge = network, nudge

    def apply(self, variables, *args, method=None):
        if method is not None:
            return self.network.apply(variables, *args, method=method)
        cond, noisy, self.timestep = args
        return self.network.apply(variables, cond, {**noisy, "action": noisy["action"] + self.nudge}, self.timestep)


@pytest.mark.slow
def test_what_of_a_row_without_actions_reaches_the_action_loss(config):
    """Its derivatives with respect to all that a row holds, with the real network.

    At initialisation the gates and the head are zero and nothing would reach the loss, so the parameters are moved.
    Dropped: nothing of such rows. Kept: what they observe, and of their (zero) actions what the noisiest timestep lets
    through.
    """
    rows = 8
    data = batch(rows) | {"action_mask": jnp.arange(rows) % 2 == 1}
    system = UWM(config, SPEC, PixelsCodec())
    params = jax.jit(system.init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
    network, (images, following) = system.network, system.images(data)

    def action_losses(inputs):
        system.images = lambda *_: (inputs["images"], None)
        system.network = Nudged(network, inputs["noisy action"])
        given = {k: v for k, v in data.items() if not k.startswith("next_obs/")}
        given |= {"obs/state": inputs["state"], "action": inputs["action"], "next_obs_latent": inputs["latents"]}
        errors = evaluate(system, params, {}, given, jax.random.key(3), augment=False).parts
        weights = [objective.shares(given["action_mask"], kind)["action"] for kind in ("kept", "dropped")]
        return jnp.stack(weights) @ errors["action"], system.network.timestep["action"]

    inputs = {
        "images": images,
        "state": data["obs/state"],
        "latents": system.encode_frames({}, following),
        "action": data["action"],
        "noisy action": jnp.zeros_like(data["action"]),
    }
    gradients, timestep = jax.device_get(jax.jit(jax.jacrev(action_losses, has_aux=True))(inputs))
    for name, gradient in gradients.items():
        kept, dropped = np.abs(gradient).reshape(2, rows, -1).max(axis=2)
        assert (kept[1::2] > 1e-7).all() and (dropped[1::2] > 1e-7).all(), name
        assert (dropped[::2] == 0).all(), name
        assert name == "action" or (kept[::2] > 1e-7).all(), name
    passes = np.sqrt(system.schedule.alphas_cumprod.astype(np.float64)[timestep])[:, None, None]
    assert (timestep[::2] == 99).all() and (passes[::2] < 1e-3).all()
    np.testing.assert_allclose(gradients["action"], passes * gradients["noisy action"], rtol=1e-4, atol=1e-12)


def test_latents_take_the_place_of_frames(config):
    """With the codec's own latents in the batch the loss is that of the frames they came from."""
    config.data.augment.random_crop = False
    data = batch(8)
    system = make(config)
    latents = system.encode_frames({}, system.images(data)[1])
    cached = {k: v for k, v in data.items() if not k.startswith("next_obs/")} | {"next_obs_latent": latents}
    frames, seen = loss(system, data, augment=False)
    from_latents, seen_latents = loss(system, cached, augment=False)
    np.testing.assert_allclose(seen_latents["noisy"]["next_obs"], seen["noisy"]["next_obs"], atol=1e-6)
    for m in frames:
        np.testing.assert_allclose(from_latents[m], frames[m], rtol=1e-6)


def test_the_spec_survives_storage():
    again = DataSpec.from_json(SPEC.to_json())
    assert (again.cameras, again.low_dim, again.action_dim, again.text_dim) == (
        {"wrist": (16, 16)},
        {"state": 3},
        10,
        0,
    )
    np.testing.assert_array_equal(again.normalizer.entries["action"][0], SPEC.normalizer.entries["action"][0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("patch", (2, 3, 3), r"config.model.patch=\(2, 3, 3\) does not divide"), ("crop", (12, 12), "config.data.crop")],
)
def test_shapes_that_do_not_fit_are_named(config, field, value, message):
    if field == "patch":
        config.model.patch = value
        codec = PixelsCodec()
    else:
        config.data.crop = value
        codec = VAECodec(AutoencoderKL())  # divides by 8
    with pytest.raises(UserError, match=message):
        UWM(config, SPEC, codec)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_an_estimate_is_the_clean_data_that_the_output_means(config, prediction):
    """Against the formulas; forward mode: the action is given at timestep 0, the next frames at the one asked for."""
    config.diffusion.prediction.next_obs = prediction
    system, data = make(config), batch(4)
    noise = system.noise(jax.random.key(1), data["row"], "policy")
    found = system.estimate({}, system.encode({}, data), "forward", noise, 90)
    assert set(found) == {"next_obs_latent"}
    seen = system.network.seen
    assert (seen["timestep"]["action"] == 0).all() and (seen["timestep"]["next_obs"] == 90).all()
    np.testing.assert_array_equal(seen["noisy"]["action"], data["action"])
    latent = np.asarray(data["next_obs/wrist"], np.float32)[:, None] / 255 * 2 - 1
    signal, sigma = (np.sqrt(x, dtype=np.float32) for x in (0.0195443742, 1 - 0.0195443742))
    noisy = signal * latent + sigma * np.asarray(noise["next_obs"])
    np.testing.assert_allclose(seen["noisy"]["next_obs"], noisy, atol=1e-5)
    level = np.asarray(seen["images"]).reshape(4, -1)[:, :4].mean(axis=1).reshape(-1, 1, 1, 1, 1, 1)
    output = noisy * 0.1 + level
    clean = {"epsilon": (noisy - sigma * output) / signal, "sample": output, "v": signal * noisy - sigma * output}
    np.testing.assert_allclose(found["next_obs_latent"], clean[prediction], atol=1e-4)


@pytest.mark.parametrize(("hide_at", "hidden"), [("first", 90), ("train", 99)])
def test_an_estimate_hides_what_the_mode_hides(config, hide_at, hidden):
    config.diffusion.hide_at = hide_at
    system, data = make(config), batch(4)
    noise = system.noise(jax.random.key(1), data["row"], "policy")
    assert set(system.estimate({}, system.encode({}, data), "policy", noise, 70)) == {"action"}
    seen = system.network.seen
    np.testing.assert_array_equal(seen["noisy"]["next_obs"], noise["next_obs"])
    assert (seen["timestep"]["action"] == 70).all() and (seen["timestep"]["next_obs"] == hidden).all()
    assert system.schedule.describe()["sampler_hidden_timestep"] == hidden
