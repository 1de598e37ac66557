"""Official PAD weights give the official numbers through the commands, from raw frames."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.golden import reference
from uwm_jax import cli, convert, sample

pytestmark = pytest.mark.slow  # the VAE compiles for seconds; test_network.py has the fast ones, from stored latents


def command(module: ModuleType, *arguments: str) -> None:
    assert cli.call(module.main, [module.__name__, *arguments], module.define_flags) == 0


class Golden:
    """A golden set, converted."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.numbers = name, folder, reference.numbers(name)
        self.workdir, self.weights = folder / "run", folder / "official.safetensors"
        save_file(reference.weights(name), self.weights)
        pair = {f"action/{part}": self.numbers[f"action_{part}"] for part in ("scale", "offset")}
        np.savez(folder / "normalizer.npz", **pair)
        command(
            convert,
            "from-torch",
            f"--input={self.weights}",
            f"--official-config={reference.official_yaml(name)}",
            f"--normalizer={folder / 'normalizer.npz'}",
            f"--workdir={self.workdir}",
        )

    def expected(self, key: str) -> np.ndarray:
        value = self.numbers[key]
        return reference.channels_last(value) if value.ndim == 6 else value

    def sample(self, mode: str, noise: str, extra: dict[str, np.ndarray], *flags: str) -> dict[str, np.ndarray]:
        """OUT of the sample command for the golden observations."""
        arrays = {k: v for k, v in self.numbers.items() if k.startswith(("obs/", "next_obs/"))}
        arrays |= {f"noise/{m}": self.expected(f"{noise}/{m}") for m in ("action", "next_obs")}
        np.savez(self.folder / "in.npz", action=self.numbers["action"], **arrays, **extra)
        output = self.folder / "out.npz"
        paths = f"--workdir={self.workdir}", f"--inputs={self.folder / 'in.npz'}", f"--output={output}"
        command(sample, *paths, f"--mode={mode}", *flags)
        with np.load(output, allow_pickle=False) as file:
            return dict(file)


@pytest.fixture(scope="module", params=["pad_libero_small", "pad_small"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


def test_one_evaluation(golden: Golden) -> None:
    timestep = {k: v for k, v in golden.numbers.items() if k.startswith("timestep/")}
    out = golden.sample("denoise", "noise", timestep)
    keys = {"noise_pred/action", "noise_pred/next_obs", "loss/action", "loss/next_obs", "obs_latent", "next_obs_latent"}
    assert out.keys() == keys
    for key in keys:
        np.testing.assert_allclose(out[key], golden.expected(key), rtol=2e-5, atol=2e-5, err_msg=key)
    masked = golden.sample("denoise", "noise", timestep | {"action_mask": golden.numbers["action_mask"]})
    for key in keys - {"obs_latent", "next_obs_latent"}:
        np.testing.assert_allclose(masked[key], golden.expected(f"masked/{key}"), rtol=2e-5, atol=2e-5, err_msg=key)


def test_joint_samples(golden: Golden) -> None:
    out = golden.sample("joint", "init_noise", {}, "--float_frames")
    for key in ("action", "action_normalized", "next_obs_latent"):
        np.testing.assert_allclose(out[key], golden.expected(f"joint/{key}"), rtol=0, atol=1e-4, err_msg=key)
    if golden.name == "pad_libero_small":
        frames = golden.expected("joint/next_obs_image")  # of the first row, (1, V, T, h, w, 3)
        for view, camera in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
            made = out[f"next_obs_float/{camera}"][:1]
            np.testing.assert_allclose(made, frames[:, view], rtol=0, atol=1e-4, err_msg=camera)


def test_the_round_trip_is_bit_exact(golden: Golden) -> None:
    output = golden.folder / "back.safetensors"
    command(convert, "to-torch", f"--workdir={golden.workdir}", f"--output={output}")
    official, back = load_file(golden.weights), load_file(output)
    assert official.keys() == back.keys()
    for name, tensor in official.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
