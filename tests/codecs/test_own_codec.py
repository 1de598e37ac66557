"""A codec from outside of the package, registered, trains, continues, finetunes and is exported as the others."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from uwm_jax import codecs
from uwm_jax.codecs.base import Codec, grid
from uwm_jax.conversion.from_torch import from_torch
from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.data.fitted import content_digest
from uwm_jax.errors import UserError
from uwm_jax.train import train
from uwm_jax.training import finetune
from uwm_jax.training.inference import load_for_inference


@dataclasses.dataclass(frozen=True)
class Halves(Codec):
    """Averages of 2 x 2 pixels, less the mean image of each view, which is fitted to the data."""

    name = "halves"
    arrays = {"grey": ("view", "row", "column", "colour")}
    clip, smallest_clip, latent_rms = 2.0, 0.5, 0.3

    @classmethod
    def from_config(cls, fields):
        return cls()

    @classmethod
    def from_arrays(cls, arrays):
        return cls()

    @classmethod
    def fitted_on(cls, arrays):
        views, rows, columns, _ = arrays["grey"].shape
        return views, 2 * rows, 2 * columns

    def latent_shape(self, num_views, num_frames, height, width):
        return num_views, num_frames, *grid(height, width, 2, "halves"), 3

    def encode(self, params, frames, rng):
        b, v, t, h, w, _ = frames.shape
        return frames.reshape(b, v, t, h // 2, 2, w // 2, 2, 3).mean(axis=(4, 6)) - params["grey"][:, None]

    def decode(self, params, latents):
        return (latents + params["grey"][:, None]).repeat(2, axis=3).repeat(2, axis=4)

    def describe(self):
        return {"name": self.name, "latents": "averages of 2 x 2 pixels - grey"}

    def synthetic_arrays(self, num_views, height, width):
        return {"grey": jnp.zeros((num_views, height // 2, width // 2, 3))}


@pytest.fixture
def config(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    """Of a run on a copy of the data that has arrays of `Halves` next to those of the PCA codec."""
    monkeypatch.setattr(codecs, "_CODECS", dict(codecs._CODECS))
    codecs.register(Halves)
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    with np.load(data / "codec" / "pca.npz") as stored:
        arrays = {name: stored[name] for name in ("image_size", "val_ratio", "fingerprint")}
    for camera in ("wrist", "exterior"):
        arrays[f"{camera}/grey"] = np.random.default_rng(0).uniform(0.3, 0.7, (8, 8, 3)).astype(np.float32)
    np.savez(data / "codec" / "halves.npz", **arrays, digest=content_digest(arrays))
    tiny_config.data.path = str(data)
    tiny_config.model.codec.name = "halves"
    tiny_config.total_steps = 2
    return tiny_config


@pytest.mark.slow
def test_from_the_data_to_an_export(config, tmp_path, capsys):
    assert config.diffusion.clip.next_obs == 2.0
    train(config, tmp_path / "run")
    config.total_steps = 3
    train(config, tmp_path / "run")  # continues with the checkpoint's arrays, wherever the data's are
    out = capsys.readouterr().out
    assert out.count("frozen codec halves: 0.00 M parameters") == 2 and "continuing from step 2" in out
    (tmp_path / "data" / "codec" / "halves.npz").unlink()

    system, params, frozen, step = load_for_inference(tmp_path / "run")
    assert step == 3 and system.codec == Halves() and system.latent_shape == (1, 2, 8, 8, 3)
    grey = np.random.default_rng(0).uniform(0.3, 0.7, (8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(frozen["grey"], grey[None])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))

    config.init_from = f"{tmp_path / 'run'}@3"
    config.total_steps = 1
    train(config, tmp_path / "tuned")
    assert "codec: the origin's halves arrays" in capsys.readouterr().out
    origin = finetune.open_origin(config.init_from, "auto")
    assert origin.codec.arrays.keys() == {"grey"} and origin.codec.files == ""

    exported = tmp_path / "model.safetensors"
    to_torch(tmp_path / "run", exported)
    np.testing.assert_array_equal(load_file(exported)["obs_encoder.halves.grey"], grey[None])
    described = json.loads(exported.with_suffix(".json").read_text())["codec"]
    assert described == {**Halves().describe(), "tensors": "obs_encoder.halves."}
    from_torch(exported, exported.with_suffix(".json"), tmp_path / "back")
    back = load_for_inference(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, (back[1], back[2]), (params, frozen))


def test_data_that_it_was_not_fitted_to_are_refused(config, tmp_path):
    (tmp_path / "data" / "codec" / "halves.npz").unlink()
    with pytest.raises(UserError, match=r"codec.name='halves' needs .*halves.npz; the data jobs do not fit it"):
        train(config, tmp_path / "run")
