"""PAD's network against published numbers and those of the official class."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import reference
from tests.golden.reference import channels_last, filler
from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.errors import UserError
from uwm_jax.models import layers
from uwm_jax.systems.pad import official
from uwm_jax.systems.pad.network import PADNet
from uwm_jax.torch_bridge import layout

PATCH = (2, 4, 4)
ENTRY_OF = official.entry_of(PATCH)
TINY = {
    "action_dim": 3,
    "action_len": 4,
    "latent_shape": (2, 2, 8, 8, 4),
    "patch": PATCH,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "timestep_embed_dim": 16,
}
GOLDEN = {
    "pad_small": {**TINY, "latent_shape": (3, 2, 8, 8, 4), "embed_dim": 64, "depth": 3, "num_heads": 4},
    "pad_libero_small": {**TINY, "embed_dim": 48},
}
MODALITIES = ("action", "next_obs")


def network(name: str, **fields) -> PADNet:
    numbers = reference.numbers(name)
    shape = {"action_len": numbers["action"].shape[1], "action_dim": numbers["action"].shape[2]}
    return PADNet(**{**GOLDEN[name], **shape, "timestep_embed_dim": 32, **fields})


def shapes_of(net: PADNet) -> dict:
    latent = jnp.zeros((1, *net.latent_shape))
    noisy = {"action": jnp.zeros((1, net.action_len, net.action_dim)), "next_obs": latent}
    return {"noise_pred_net": jax.eval_shape(net.init, jax.random.key(0), latent, noisy, jnp.zeros(1, int))["params"]}


def converted(tensors: dict[str, np.ndarray], net: PADNet) -> dict:
    tensors = {name: value for name, value in tensors.items() if ".vae." not in name}
    return layout.from_official(tensors, shapes_of(net), ENTRY_OF, "official")["noise_pred_net"]


def random_tensors(net: PADNet) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    entries = layout.table(shapes_of(net), ENTRY_OF)
    return {e.name: rng.normal(0, 0.2, e.torch_shape).astype(np.float32) for e in entries}


@functools.cache
def evaluate(net: PADNet):
    """(params, latents, noisy, timestep, mask) -> predictions, exact."""

    def run(params, obs_latent, noisy, timestep, action_mask=None):
        with jax.default_matmul_precision("highest"):
            return net.apply({"params": params}, obs_latent, noisy, timestep, action_mask)[0]

    return jax.jit(run)


# --- published numbers ---------------------------------------------------------------------------------


def test_published_predictions():
    """Formula weights in torch's registration order, with and without a mask."""
    net = PADNet(**TINY)
    shapes = {e.name.removeprefix("noise_pred_net."): e.torch_shape for e in layout.table(shapes_of(net), ENTRY_OF)}
    linear = ["action_encoder.0", "action_encoder.2", "action_decoder.0", "action_decoder.2"]
    linear += ["timestep_embedding.proj.0", "timestep_embedding.proj.2"]
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    linear += [f"blocks.{i}.{part}" for i in range(2) for part in parts] + ["head.linear", "head.adaLN_modulation.1"]
    modules = ["obs_patchifier.patch_encoder", "obs_patchifier.patch_decoder", *linear]
    order = ["pos_embed", "pad_tokens", *(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))]
    assert sorted(order) == sorted(shapes) and len(order) == 42

    def formula(shape, k, scale):
        return (scale * filler(int(np.prod(shape)), k)).astype(np.float32).reshape(shape)

    params = converted({f"noise_pred_net.{n}": formula(shapes[n], k, 0.2) for k, n in enumerate(order)}, net)
    latents = [channels_last(formula((2, 2, 4, 2, 8, 8), k, 2.0)) for k in (1003, 1002)]
    noisy = {"action": formula((2, 4, 3), 1001, 2.0), "next_obs": latents[1]}
    plain = evaluate(net)(params, latents[0], noisy, jnp.array([7, 41]))
    masked = evaluate(net)(params, latents[0], noisy, jnp.array([7, 41]), jnp.array([True, False]))
    video = {name: np.moveaxis(pred["next_obs"], -1, 2) for name, pred in (("plain", plain), ("masked", masked))}
    for array, moments, first, last in (
        (
            plain["action"],
            [0.0470477, 0.0352153],
            [-0.008121, 0.064701, 0.059948, 0.012417, 0.081776],
            [-0.01707, 0.058355, 0.051603],
        ),
        (
            video["plain"],
            [-0.0152611, 0.1144726],
            [0.069396, 0.113127, 0.042399, 0.086616, 0.076275],
            [0.053303, 0.171293, 0.169956],
        ),
        (masked["action"], [0.047589, 0.0343516], [-0.008121], [0.017491, 0.10844, 0.044013]),
        (video["masked"], [-0.0152628, 0.1144907], [0.069396], [0.053155, 0.17106, 0.169491]),
    ):
        array = np.asarray(array)
        np.testing.assert_allclose([array.mean(), array.std()], moments, atol=2e-6)
        np.testing.assert_allclose(array.ravel()[: len(first)], first, atol=2e-6)
        np.testing.assert_allclose(array.ravel()[-3:], last, atol=2e-6)
    for m in MODALITIES:
        np.testing.assert_allclose(masked[m][0], plain[m][0], atol=1e-6)


# --- the official class --------------------------------------------------------------------------------


@functools.cache
def case(name: str) -> tuple[PADNet, dict, dict]:
    """Network, parameters and golden arrays, channels last."""
    net, numbers = network(name), reference.numbers(name)
    last = {key: channels_last(x) if x.ndim == 6 and "grad" not in key else x for key, x in numbers.items()}
    return net, converted(reference.weights(name), net), last


def noisy_and_target(numbers: dict, m: str) -> tuple[np.ndarray, np.ndarray]:
    clean = numbers[{"action": "action_normalized", "next_obs": "next_obs_latent"}[m]]
    noise = numbers[f"noise/{m}"]
    return np.asarray(Schedule().add_noise(clean, noise, numbers[f"timestep/{m}"])), noise


@functools.cache
def with_gradients(name: str, masked: bool) -> tuple[dict, dict, dict]:
    """Predictions, losses, and gradients of the sum of the losses under official names."""
    net, params, numbers = case(name)
    noisy, noise = ({m: noisy_and_target(numbers, m)[i] for m in MODALITIES} for i in range(2))
    mask = numbers["action_mask"] if masked else np.ones(3, bool)

    @jax.jit
    def run(params):
        def loss(params):
            pred, _ = net.apply(
                {"params": params},
                numbers["obs_latent"],
                noisy,
                numbers["timestep/action"],
                mask if masked else None,
            )
            losses = {
                "action": jnp.mean((pred["action"] - noise["action"])[mask] ** 2),
                "next_obs": jnp.mean((pred["next_obs"] - noise["next_obs"]) ** 2),
            }
            return losses["action"] + losses["next_obs"], (pred, losses)

        with jax.default_matmul_precision("highest"):
            return jax.grad(loss, has_aux=True)(params)

    gradients, (pred, losses) = run(params)
    return pred, losses, layout.to_official({"noise_pred_net": gradients}, ENTRY_OF)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", GOLDEN)
def test_official_evaluation(name, masked):
    numbers, prefix = case(name)[2], "masked/" if masked else ""
    pred, losses, gradients = with_gradients(name, masked)
    for m in MODALITIES:
        np.testing.assert_allclose(pred[m], numbers[f"{prefix}noise_pred/{m}"], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(losses[m], numbers[f"{prefix}loss/{m}"], rtol=2e-5, atol=2e-5)
    stored = {k.removeprefix(f"{prefix}grad/"): v for k, v in numbers.items() if k.startswith(f"{prefix}grad/")}
    assert len(stored) >= 4
    for tensor, wanted in stored.items():
        np.testing.assert_allclose(gradients[tensor], wanted, atol=1e-3 * np.abs(wanted).max(), err_msg=tensor)
    assert not gradients["noise_pred_net.pad_tokens"].any()


@pytest.mark.parametrize("name", GOLDEN)
def test_official_sample(name):
    """Ten steps of DDIM from the official noise, with all modulations made before."""
    net, params, numbers = case(name)
    schedule = Schedule()

    @jax.jit
    def run(params, obs_latent, x):
        with jax.default_matmul_precision("highest"):
            modulation = net.apply({"params": params}, jnp.asarray(schedule.timesteps), method="modulation")
            steps = (jnp.asarray(schedule.timesteps), jnp.asarray(schedule.previous_timesteps), modulation)

            def body(x, step):
                t, landing, now = step
                pred, _ = net.apply({"params": params}, obs_latent, x, now, method="predict")
                return {m: schedule.ddim_step("epsilon", pred[m], x[m], t, landing, 1.0) for m in x}, None

            return jax.lax.scan(body, x, steps)[0]

    got = run(params, numbers["obs_latent"], {m: numbers[f"init_noise/{m}"] for m in MODALITIES})
    np.testing.assert_allclose(got["action"], numbers["joint/action_normalized"], atol=1e-4)
    np.testing.assert_allclose(got["next_obs"], numbers["joint/next_obs_latent"], atol=1e-4)


# --- properties ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[PADNet, dict, tuple]:
    net, rng = PADNet(**TINY), np.random.default_rng(1)
    latents = [rng.normal(0, 1, (2, *net.latent_shape)).astype(np.float32) for _ in range(2)]
    noisy = {"action": rng.normal(0, 1, (2, 4, 3)).astype(np.float32), "next_obs": latents[1]}
    return net, converted(random_tensors(net), net), (latents[0], noisy, jnp.array([7, 41]))


def test_placeholder_actions_are_never_seen(tiny):
    net, params, (obs_latent, noisy, timestep) = tiny
    mask = jnp.array([True, False])
    first = evaluate(net)(params, obs_latent, noisy, timestep, mask)
    moved = {**noisy, "action": noisy["action"] + 5}
    second = evaluate(net)(params, obs_latent, moved, timestep, mask)
    for m in MODALITIES:
        np.testing.assert_array_equal(first[m][1], second[m][1])
        assert np.abs(first[m][0] - second[m][0]).max() > 1e-2
    every = evaluate(net)(params, obs_latent, noisy, timestep, jnp.ones(2, bool))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        every,
        evaluate(net)(params, obs_latent, noisy, timestep),
    )


def test_current_frames_matter_row_by_row(tiny):
    net, params, (obs_latent, noisy, timestep) = tiny
    before = evaluate(net)(params, obs_latent, noisy, timestep)
    after = evaluate(net)(params, obs_latent + np.array([0, 1.0]).reshape(2, 1, 1, 1, 1, 1), noisy, timestep)
    for m in MODALITIES:
        np.testing.assert_allclose(after[m][0], before[m][0], atol=1e-5)
        assert np.abs(after[m][1] - before[m][1]).max() > 1e-2


def test_layers_held_apart(tiny):
    net, params, inputs = tiny
    held = layers.apart(jax.tree.map(jnp.array, params))
    both = evaluate(net)(held, *inputs), evaluate(net)(params, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *both)


def test_bfloat16_stays_close_and_ends_in_float32(tiny):
    net, params, inputs = tiny
    mask = jnp.array([True, False])
    rough = evaluate(PADNet(**TINY, dtype=jnp.bfloat16, remat="dots"))(params, *inputs, mask)
    exact = evaluate(net)(params, *inputs, mask)
    for m in MODALITIES:
        assert rough[m].dtype == jnp.float32
        difference = np.abs(rough[m] - exact[m]).max() / np.abs(exact[m]).max()
        assert 0 < difference < 2e-2


def test_initialisation(tiny):
    net, _, inputs = tiny
    params = jax.jit(net.init)(jax.random.key(0), *inputs)["params"]
    pred = evaluate(net)(params, *inputs)
    bias = np.asarray(params["patch_decoder"]["bias"])
    np.testing.assert_array_equal(pred["action"], 0)
    np.testing.assert_array_equal(pred["next_obs"], np.broadcast_to(bias, pred["next_obs"].shape))
    kernel, bound = np.asarray(params["patch_decoder"]["kernel"]), 1 / np.sqrt(128)
    assert 0.99 * bound < np.abs(kernel).max() <= bound and 0.01 < np.abs(bias).max() <= bound
    assert abs(kernel.std() * np.sqrt(3) / bound - 1) < 0.05
    for table in ("pos_embed", "pad_tokens"):
        assert abs(np.asarray(params[table]).std() / 0.02 - 1) < 0.2


def test_shapes_that_do_not_fit_are_named(tiny):
    net, params, (obs_latent, noisy, timestep) = tiny
    with pytest.raises(ValueError, match=r"obs_latent must have the shapes .* found .*\(2, 2, 1, 8, 8, 4\)"):
        net.apply({"params": params}, obs_latent[:, :, :1], noisy, timestep)
    with pytest.raises(ValueError, match=r"patch \(2, 3, 4\)"):
        jax.eval_shape(PADNet(**{**TINY, "patch": (2, 3, 4)}).init, jax.random.key(0), obs_latent, noisy, timestep)


# --- official names and layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_official_tensors(name):
    """Names and shapes are the official ones, and the round trip is bit-exact."""
    stored = json.loads((reference.FOLDER / f"{name}.manifest.json").read_text())
    manifest = {tensor: tuple(shape) for tensor, shape, _ in stored["tensors"] if ".vae." not in tensor}
    net = network(name)
    entries = {e.name: e.torch_shape for e in layout.table(shapes_of(net), ENTRY_OF)}
    assert entries == manifest
    tensors = random_tensors(net)
    back = layout.to_official({"noise_pred_net": converted(tensors, net)}, ENTRY_OF)
    assert back.keys() == tensors.keys()
    for tensor, value in tensors.items():
        np.testing.assert_array_equal(back[tensor], value)


def test_full_width_tensors():
    """The paper's DROID network: 142 tensors without the VAE, 122.08 M parameters."""
    net = PADNet(action_dim=10, action_len=16, latent_shape=(3, 2, 28, 28, 4))
    entries = {e.name: e.torch_shape for e in layout.table(shapes_of(net), ENTRY_OF)}
    assert len(entries) == 392 - 248 - 2
    assert round(sum(np.prod(shape) for shape in entries.values()) / 1e6, 2) == 122.08
    assert entries["noise_pred_net.pos_embed"] == (1, 163, 768)
    assert entries["noise_pred_net.obs_patchifier.patch_encoder.weight"] == (768, 8, 2, 4, 4)
    assert entries["noise_pred_net.obs_patchifier.patch_decoder.weight"] == (768, 4, 2, 4, 4)
    assert entries["noise_pred_net.blocks.11.adaLN_modulation.1.weight"] == (4608, 512)


def test_unfit_tensors_are_named():
    net = network("pad_libero_small")
    tensors = random_tensors(net)
    del tensors["noise_pred_net.pad_tokens"]
    with pytest.raises(UserError, match=r"missing tensor noise_pred_net.pad_tokens \(1, 16, 48\)"):
        layout.from_official(tensors, shapes_of(net), ENTRY_OF, "x")
