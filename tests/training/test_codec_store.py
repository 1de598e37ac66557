"""The VAE of a run is the one that its config asks for."""

from __future__ import annotations

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from uwm_jax import files
from uwm_jax.codecs import PCACodec, PixelsCodec, VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import diffusers_vae
from uwm_jax.training import codec_store

CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}


def write_vae(folder, seed):
    """A tiny VAE with random weights as a diffusers folder."""
    module = diffusers_vae.module_from_config(CONFIG)
    params = module.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))["params"]
    tensors = {}
    for path, value in traverse_util.flatten_dict(params).items():
        value = np.asarray(value)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        tensors[diffusers_vae._torch_name(path)] = value.transpose(axes) if axes else value
    diffusers_vae.write_folder(folder, CONFIG, tensors)
    return params


@pytest.fixture
def config(tiny_config):
    tiny_config.model.codec.name = "vae"
    tiny_config.model.codec.microbatch = 3
    return tiny_config


def test_a_copy_in_a_bucket_that_was_cut_off_is_completed(bucket):
    folder = files.as_place(bucket) / "frozen" / "vae"
    tensors = {"encoder.conv_in.weight": np.arange(6, dtype=np.float32)}
    sums = diffusers_vae.write_folder(folder, CONFIG, tensors)
    assert sorted(file.name for file in folder.iterdir()) == sorted((*sums, diffusers_vae.SUMS_FILE))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / diffusers_vae.SUMS_FILE).unlink()  # which comes last
    (folder / diffusers_vae.WEIGHTS_FILE).unlink()
    assert diffusers_vae.write_folder(folder, CONFIG, tensors) == sums
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(UserError, match="already holds another VAE"):
        diffusers_vae.write_folder(folder, CONFIG, {"encoder.conv_in.weight": np.zeros(6, np.float32)})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow
def test_the_vae_is_kept_in_the_workdir(config, tmp_path, bucket):
    params = write_vae(tmp_path / "vae", seed=0)
    codec, found = codec_store.open_codec(config, codec_store.Place(tmp_path / "vae"))
    codec_store.keep(config, codec_store.Place(tmp_path / "vae"), tmp_path / "run")
    assert isinstance(codec, VAECodec) and isinstance(codec.vae, AutoencoderKL) and codec.microbatch == 3
    jax.tree.map(np.testing.assert_array_equal, found, params)
    config.model.codec.vae = "nowhere/at-all"  # a run that continues reads its own copy
    _, again = codec_store.open_codec(config, codec_store.in_workdir(config, tmp_path / "run", None))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    place = files.as_place(bucket)
    codec_store.keep(config, codec_store.Place(tmp_path / "vae"), place / "run")
    config.model.codec.vae = f"{place}/run/frozen/vae"
    _, again = codec_store.open_codec(config, codec_store.Place(config.model.codec.vae))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    codec_store.keep(config, codec_store.Place(config.model.codec.vae), place / "twin", twin=place / "run")
    for file in (tmp_path / "vae").iterdir():
        assert (place / "twin" / "frozen" / "vae" / file.name).read_bytes() == file.read_bytes()


def test_members_of_a_sweep_share_the_files_of_a_codec(config, tmp_path, monkeypatch):
    """Linked where that is possible; what is there already is checked as that of any run."""
    copied = []

    def copy(place, folder):
        copied.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_bytes(b"weights")

    monkeypatch.setitem(codec_store._FILES, "vae", codec_store._FILES["vae"]._replace(copy=copy))
    workdirs = [tmp_path / name for name in ("a", "b", "c")]
    codec_store.keep(config, codec_store.Place("x"), workdirs[0])
    codec_store.keep(config, codec_store.Place("x"), workdirs[1], workdirs[0])
    first, second, third = (codec_store.folder(workdir, config) for workdir in workdirs)
    assert copied == [first] and (first / "weights").samefile(second / "weights")
    codec_store.keep(config, codec_store.Place("x"), workdirs[1], workdirs[0])
    assert copied == [first, second], "it is checked"
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_links)
        codec_store.keep(config, codec_store.Place("x"), workdirs[2], workdirs[0])
    assert copied[2:] == [third] and (third / "weights").read_bytes() == b"weights"


def no_links(source, target):
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.slow
def test_another_vae_in_the_workdir_is_refused(config, tmp_path):
    for seed in (0, 1):
        write_vae(tmp_path / str(seed), seed)
    codec_store.keep(config, codec_store.Place(tmp_path / "0"), tmp_path / "run")
    with pytest.raises(UserError, match="frozen/vae"):
        codec_store.keep(config, codec_store.Place(tmp_path / "1"), tmp_path / "run")


def test_codecs_without_files(tiny_config, tmp_path):
    arrays = {"mean": np.zeros((1, 16, 16, 3)), "components": np.zeros((1, 192, 4)), "scale": np.ones(())}
    codec, found = codec_store.open_codec(tiny_config, codec_store.Place(arrays=arrays))
    assert codec == PCACodec(8, 4) and codec_store.checkpointed(codec, found) is found
    codec_store.keep(tiny_config, codec_store.Place(arrays=arrays), tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="carries no codec"):
        codec_store.open_codec(tiny_config, codec_store.in_workdir(tiny_config, tmp_path, None))
    tiny_config.model.codec.name = "pixels"
    codec, found = codec_store.open_codec(tiny_config, codec_store.Place())
    assert (codec, found) == (PixelsCodec(), {}) and codec_store.checkpointed(codec, found) is None


def test_a_system_without_a_codec(tmp_path):
    config = ConfigDict({"model": {}, "data": {}})
    place = codec_store.in_dataset(config, None)
    assert place == codec_store.in_workdir(config, tmp_path, None) == codec_store.Place()
    codec_store.keep(config, place, tmp_path)
    assert codec_store.open_codec(config, place) == (None, {}) and codec_store.checkpointed(None, {}) is None
