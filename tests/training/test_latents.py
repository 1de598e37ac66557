"""Latents of pictures that a codec was not made for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.codecs import PCACodec, PixelsCodec, VAECodec
from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.data.faults import BadRecord
from uwm_jax.data.images import preprocess
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.systems.uwm.tree import TREE
from uwm_jax.training import codec_store, latents


@pytest.fixture
def parts(tiny_config):
    """Config, codec and arrays of a mixture of the tiny dataset with itself as video, opened."""
    tiny_config.data.sources = ConfigDict({"robot": config_lib.source(), "video": config_lib.source(use_actions=False)})
    data = RunData(tiny_config.data, seed=0)
    arrays = codec_store.in_dataset(tiny_config, data).arrays
    yield tiny_config, PCACodec.from_arrays(arrays), {k: jnp.asarray(v) for k, v in arrays.items()}, data
    data.close()


def test_sizes_against_numpy(parts):
    """Unit standard deviation where the codec was fitted, and what a projection in float64 gives for these frames."""
    config, codec, arrays, data = parts
    found = latents.sizes(config, codec, arrays, data)
    assert found.keys() == {"robot", "video"} and all(0.5 < size < 2 for size in found.values())
    source, batch = data.sources["video"], data.spec.empty(latents.WINDOWS)
    for row in range(latents.WINDOWS):
        place = row * len(source.windows) // latents.WINDOWS
        source.load(batch, row, row, place, data.spec)
    frames, _ = preprocess({"wrist": batch["obs/wrist"]}, None, resize=config.data.resize, crop=config.data.crop)
    centred = np.asarray(frames, np.float64)[:, 0] - np.asarray(arrays["mean"], np.float64)[0]
    n, p = len(centred) * 2, codec.patch
    patches = centred.reshape(n, 16 // p, p, 16 // p, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, p * p * 3)
    values = patches @ np.asarray(arrays["components"], np.float64)[0] / float(arrays["scale"])
    np.testing.assert_allclose(found["video"], np.sqrt(np.mean(values**2)), rtol=1e-4)


def test_pictures_of_another_kind_are_told_with_what_mends_it(parts, capsys):
    config, codec, arrays, data = parts
    assert latents.look(config, codec, arrays, data, None)["latent_sizes"].keys() == {"robot", "video"}
    assert "warning" not in capsys.readouterr().out
    found = {"robot": 1.1, "video": 17.0}
    (told,) = latents.about(codec, found, 1.0, False, TREE.codec_interface)
    assert "latents of 'video' have a root mean square of 17 under the pca codec of this run" in told
    assert "--config.model.codec.name=vae" in told and "--config.data.sources.video.weight=0" in told
    (told,) = latents.about(codec, {"mine": 0.2}, 1.0, True, TREE.codec_interface)
    assert "of the origin, where the model expects 1" in told
    assert "--config.init_from_skip='noise_pred_net/patch_encoder/kernel,noise_pred_net/patch_decoder/kernel'" in told
    tenth = arrays | {"scale": arrays["scale"] / 10}
    latents.look(config, codec, tenth, data, None)
    assert capsys.readouterr().out.count("warning: latents of") == 2
    data.sources["video"].weight = 0.0  # as the warning advises: it is not drawn
    latents.look(config, codec, tenth, data, None)
    assert capsys.readouterr().out.count("warning: latents of") == 1


def test_what_is_expected_and_when_nothing_is_measured(parts):
    config, codec, arrays, data = parts
    vae = VAECodec(AutoencoderKL())
    assert latents.expected(codec, None) == 1.0 and latents.expected(vae, None) == pytest.approx(1 / 3)
    assert latents.expected(vae, {"a": 0.5, "b": 0.7}) == pytest.approx(0.6)
    assert latents.look(config, PixelsCodec(), {}, data, None) == {}
    plain = config.copy_and_resolve_references()
    plain.data.sources = ConfigDict()
    alone = RunData(plain.data, seed=0)
    assert latents.look(plain, codec, arrays, alone, None) == {}
    alone.close()


def test_a_bad_record_is_borne_as_far_as_it_is_allowed(parts, monkeypatch):
    _, _, _, data = parts
    source, batch, asked = data.sources["video"], data.spec.empty(1), []
    load = source.load

    def damaged(batch, at, row, place, spec):
        asked.append(place)
        if place < 2:
            raise BadRecord(f"record {place} is damaged", f"d/shard#{place}")
        load(batch, at, row, place, spec)

    monkeypatch.setattr(source, "load", damaged)
    with pytest.raises(BadRecord, match="record 0"):
        latents._load(data, source, batch, 0)
    data.faults.limit = 2
    latents._load(data, source, batch, 0)
    assert asked == [0, 0, 1, 2] and data.faults.notes(1)["records"].keys() == {"d/shard#0", "d/shard#1"}
    data.faults.limit = 1
    with pytest.raises(UserError, match="2 bad records, and config.data.max_bad_records is 1"):
        latents._load(data, source, batch, 0)
