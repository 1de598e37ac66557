"""The file that runs an export by itself: official numbers, those of our JAX model, and clear refusals."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden import reference
from uwm_jax.conversion.from_torch import from_torch
from uwm_jax.conversion.to_torch import to_torch

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
torch = pytest.importorskip("torch")

from uwm_jax.torch_bridge import uwm_torch  # noqa: E402

EVALUATION, USE = 2e-5, 1e-4  # differences of float32 that are allowed, relative to the largest value
# One small set stays among the fast tests.
FAST = "dp_unet_fourier"
GOLDEN = [pytest.param(n, marks=() if n == FAST else pytest.mark.slow) for n in (*reference.NAMES, *reference.DP_NAMES)]


def export(workdir: Path, folder: Path) -> Path:
    """A folder that `uwm_torch.load` takes."""
    to_torch(workdir, folder / "model.safetensors")
    return folder


def relative(found, wanted) -> float:
    """Largest difference relative to the largest value."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# --- official numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A function: name of a golden set -> the policy of its export, and its numbers with channels last."""

    @functools.cache
    def load(name: str):
        folder = tmp_path_factory.mktemp(name)
        g = reference.numbers(name)
        save_file(reference.weights(name), folder / "source.safetensors")
        np.savez(folder / "n.npz", **{"action/scale": g["action_scale"], "action/offset": g["action_offset"]})
        run = folder / "run"
        from_torch(folder / "source.safetensors", reference.official_yaml(name), run, folder / "n.npz")
        numbers = {key: reference.channels_last(x) if x.ndim == 6 else x for key, x in g.items()}
        return uwm_torch.load(export(run, folder / "out")), numbers

    return load


@pytest.mark.parametrize("name", GOLDEN)
def test_official_features_and_predictions(official, name):
    policy, g = official(name)
    model = policy.model
    with torch.no_grad():
        inputs = {key: torch.from_numpy(x) for key, x in g.items() if key.startswith("obs/")}
        features = model.encode_obs(inputs)
        assert relative(features, g["obs_feat"]) < EVALUATION
        if "noisy/action" in g:
            noisy = {"action": torch.from_numpy(g["noisy/action"])}
        else:
            clean = {"action": g["action_normalized"], "next_obs": g["next_obs_latent"]}
            abar = np.float32(policy.description["diffusion"]["alphas_cumprod"])
            noisy = {}
            for m, x in clean.items():
                a = abar[g[f"timestep/{m}"]].reshape(-1, *[1] * (x.ndim - 1))
                noisy[m] = torch.from_numpy(np.sqrt(a) * x + np.sqrt(1 - a) * g[f"noise/{m}"])
        for row in range(len(features)):  # each has timesteps of its own
            own = slice(row, row + 1)
            timesteps = {m: torch.from_numpy(g[f"timestep/{m}"][own]) for m in noisy}
            (modulation,) = model.noise_pred_net.modulation(features[own], timesteps)
            embedded = {m: model.noise_pred_net.embed(m, x[own]) for m, x in noisy.items()}
            for m, found in model.noise_pred_net(embedded, modulation, tuple(noisy)).items():
                assert relative(found, g[f"noise_pred/{m}"][own]) < EVALUATION


@pytest.mark.parametrize("name", GOLDEN)
def test_official_samples_of_every_use(official, name):
    policy, g = official(name)
    inputs = {key: x for key, x in g.items() if key.startswith(("obs/", "next_obs/"))} | {"action": g["action"]}
    noise = {m: g[f"init_noise/{m}"] for m in ("action", "next_obs") if f"init_noise/{m}" in g}
    compared = 0
    for use in policy.uses:
        made = policy.sample(use, inputs, noise, float_frames=True)
        for key, x in made.items():
            if f"{use}/{key}" in g:
                assert relative(x, g[f"{use}/{key}"]) < USE, (use, key)
                compared += 1
        if (key := f"{use}/next_obs_image") in g:
            frames = np.stack([made[f"next_obs_float/{camera}"] for camera in sorted(policy.description["cameras"])], 1)
            wanted = g[key]
            assert np.abs(np.clip(frames, 0, 1) - np.clip(wanted, 0, 1)).max() < USE
            compared += 1
    assert compared == (10 if "next_obs" in noise else 2)
