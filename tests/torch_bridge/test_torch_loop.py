"""The torch training loop that the benchmark sets beside ours."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax import config as config_lib
from uwm_jax.benchmarking.rows import Model
from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.synthetic import synthetic_batch

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from uwm_jax.benchmarking import torch_rows  # noqa: E402
from uwm_jax.systems.uwm import official  # noqa: E402
from uwm_jax.systems.uwm.modes import MODES  # noqa: E402
from uwm_jax.torch_bridge import layout  # noqa: E402
from uwm_jax.torch_bridge.torch_codecs import PixelsCodec  # noqa: E402
from uwm_jax.torch_bridge.torch_loop import TorchLoop  # noqa: E402
from uwm_jax.torch_bridge.torch_network import UWM  # noqa: E402

ROWS, LATENT = 3, (2, 2, 8, 8, 3)


def make(**fields):
    """A loop of a fresh network, which predicts 0."""
    torch.manual_seed(0)
    c = config_lib.base()
    c.model.update(embed_dim=16, depth=1, num_heads=2, num_registers=1, timestep_embed_dim=8, patch=(2, 4, 4))
    c.model.encoder.update(stage_sizes=(1,), width=16, use_low_dim=True)
    c.data.update(resize=(8, 8), crop=(8, 8))
    config_lib.apply_overrides(c, fields.items())
    low_dim = {"state": 2}
    network = UWM(
        c.model, action_shape=(4, 3), latent_shape=LATENT, crop=c.data.crop, low_dim=low_dim, codec=PixelsCodec()
    )
    schedule = Schedule()
    numbers = {"timesteps": schedule.timesteps, "hidden_timestep": 90, "alphas_cumprod": schedule.alphas_cumprod}
    return TorchLoop(network, c, ["b", "a"], low_dim, numbers)


def batch(size=(8, 8)):
    rng = np.random.default_rng(0)
    images = {f"{group}/{key}": rng.integers(0, 256, (ROWS, 2, *size, 3), np.uint8) for group in ("obs", "next_obs")
              for key in ("a", "b")}  # fmt: skip
    numbers = {"action": rng.normal(size=(ROWS, 4, 3)), "obs/state": rng.normal(size=(ROWS, 2, 2))}
    arrays = images | {name: value.astype(np.float32) for name, value in numbers.items()}
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


CLEAN = {"diffusion.prediction.action": "sample", "diffusion.prediction.next_obs": "sample"}
STILL = CLEAN | {f"data.augment.{name}": "0" for name in ("brightness", "contrast", "saturation", "hue")}


def test_the_loss_from_pixels_and_from_latents():
    # A fresh network predicts 0, so where clean data are asked for, the loss is their mean square.
    loop, pixels = make(**STILL, **{"loss.weights.next_obs": "0.5"}), batch()
    frames = torch.stack([pixels["next_obs/a"], pixels["next_obs/b"]], dim=1) / 255 * 2 - 1
    latents = {name: x for name, x in pixels.items() if not name.startswith("next_obs/")} | {"next_obs_latent": frames}
    wanted = pixels["action"].square().mean() + 0.5 * frames.square().mean()
    assert loop.forward(pixels) == pytest.approx(wanted.item(), rel=1e-5)
    assert loop.forward(latents) == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noise_is_predicted_with_unit_error_at_first(prediction):
    loop = make(**{"diffusion.prediction.action": prediction, "diffusion.prediction.next_obs": prediction})
    data = batch()
    losses = [loop.forward(data) for _ in range(20)]
    assert np.mean(losses) == pytest.approx(2.0, abs=0.6 if prediction == "v" else 0.2)
    assert len(set(losses)) == len(losses)  # fresh noise every time


def test_frames_are_resized_and_cropped():
    loop = make(**STILL, **{"data.resize": "(12,14)"})
    data = batch(size=(5, 7))
    for key in ("a", "b"):
        data[f"next_obs/{key}"] = torch.full_like(data[f"next_obs/{key}"], 255)
    assert loop.forward(data) == pytest.approx(data["action"].square().mean().item() + 1, rel=1e-5)


def test_only_the_step_changes_parameters():
    loop, data = make(), batch()
    before = [p.detach().clone() for p in loop.trained]
    loop.forward(data)
    assert all(p.grad is None for p in loop.trained)
    loop.forward_backward(data)
    assert all(torch.equal(p, b) for p, b in zip(loop.trained, before, strict=True))
    assert any(p.grad.any() for p in loop.trained)
    loop.step(data)
    changed = max((p - b).abs().max().item() for p, b in zip(loop.trained, before, strict=True))
    assert changed == pytest.approx(1e-4, rel=0.05)  # Adam's first step is the learning rate


def test_steps_lower_the_loss():
    loop, data = make(**CLEAN, **{"optimizer.learning_rate": "0.01"}), batch()
    losses = [loop.step(data) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_clipping_and_averages():
    loop, data = make(**{"optimizer.clip_norm": "1e-3", "optimizer.ema_decay": "0.9"}), batch()
    before = [p.detach().clone() for p in loop.trained]
    loop.step(data)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in loop.trained if p.grad is not None))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    for average, parameter, b in zip(loop.average, loop.trained, before, strict=True):
        torch.testing.assert_close(average, 0.1 * b + 0.9 * parameter.detach())  # decay (1 + 0) / (10 + 0)


def test_bfloat16_is_autocast_and_parameters_stay_float32():
    loop, data = make(**CLEAN, **{"model.dtype": "bfloat16"}), batch()
    assert loop.step(data) == pytest.approx(make(**CLEAN).forward(data), rel=1e-2)
    assert {p.dtype for p in loop.trained} == {torch.float32}


SAMPLERS = {
    "official": {},
    "clean data, trailing": {**CLEAN, "diffusion.spacing": "trailing", "diffusion.hide_at": "train"},
    "velocity, not clipped": {
        "diffusion.prediction.action": "v", "diffusion.prediction.next_obs": "v", "diffusion.clip.next_obs": "0",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fields", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_are_those_of_our_sampler(fields):
    c = config_lib.base()
    c.model.update(embed_dim=16, depth=1, num_heads=2, num_registers=1, timestep_embed_dim=8, patch=(2, 4, 4))
    c.model.encoder.update(stage_sizes=(1,), width=16, use_low_dim=True)
    c.model.codec.name = "pixels"
    c.diffusion.num_inference_steps = 4
    c.data.update(cameras=("b", "a"), low_dim=("state",), resize=(8, 8), crop=(8, 8))
    c.data.window.update(obs=(0, 1), action=(1, 2, 3, 4), next_obs=(5, 6))
    config_lib.apply_overrides(c, fields.items())
    model = Model(c, 3, [])
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(model.system.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.float32(0.2 * rng.normal(size=s.shape)), shapes)
    side = torch_rows.TorchRows(model.description(), ["policy"])
    stored = layout.to_official(params, official.entry_of(c.model.patch))
    side.loop.network.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in stored.items()})

    batch = synthetic_batch(model.system, ROWS)
    noise = model.system.noise(jax.random.key(1), batch["row"], "policy")
    given = batch | {"next_obs_latent": noise["next_obs"] / 2}
    system = model.system
    sample = jax.jit(
        lambda params, given, use, noise: system.sample(params, system.encode({}, given), use, noise),
        static_argnums=2,
    )
    for mode in ("policy", "forward", "inverse"):
        wanted = sample(params, given, mode, noise)
        theirs = side.loop.sample(*({k: torch.from_numpy(np.array(x)) for k, x in given.items()}, MODES[mode],
                                    {m: torch.from_numpy(np.array(x)) for m, x in noise.items()}))  # fmt: skip
        names = {"action": "action", "next_obs": "next_obs_latent"}
        assert {names[m] for m in theirs} == set(wanted)
        for m, x in theirs.items():
            np.testing.assert_allclose(x, wanted[names[m]], rtol=1e-4, atol=2e-5)
