"""The PCA codec of a dataset is used only where it was fitted for."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from uwm_jax.codecs import PCACodec
from uwm_jax.data.fitted import read_fitted
from uwm_jax.errors import UserError


def read_pca(dataset, cameras, crop, val_ratio):
    return read_fitted(dataset, "pca", PCACodec.arrays, cameras, crop=crop, val_ratio=val_ratio)


def test_cameras_are_sorted_and_short_names_serve(tiny_dataset):
    both = read_pca(tiny_dataset, ("wrist", "exterior"), (16, 16), 0.3)
    assert both["mean"].shape == (2, 16, 16, 3) and both["components"].shape == (2, 192, 4)
    one = read_pca(tiny_dataset, ("observation/wrist",), (16, 16), 0.3)
    np.testing.assert_array_equal(one["mean"][0], both["mean"][1])
    assert all(x.dtype == np.float32 for x in both.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("front",), (16, 16), 0.3), "no codec for camera 'front'; it has exterior, wrist"),
        ((("wrist",), (24, 24), 0.3), r"fitted on 16x16 images, but config.data.crop is \(24, 24\).*codec_size=24,24"),
        ((("wrist",), (27, 24), 0.3), r"set config.data.crop to \(24, 24\) and reshard .*--codec_size=24,24\."),
        ((("wrist",), (16, 16), 0.1), "fitted with 0.3 of the episodes held out, but config.data.val_ratio is 0.1"),
    ],
)
def test_what_does_not_fit_is_named(tiny_dataset, arguments, message):
    with pytest.raises(UserError, match=message):
        read_pca(tiny_dataset, *arguments)


def test_a_codec_of_another_dataset(tiny_dataset, tmp_path):
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["version"] = "2.0.0"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"pca.npz was fitted on another dataset \(fingerprint .*, this one is"):
        read_pca(copy, ("wrist",), (16, 16), 0.3)


def test_cameras_may_have_names_of_their_own(tiny_dataset):
    swapped = read_pca(tiny_dataset, {"a": "observation/wrist", "b": "observation/exterior"}, (16, 16), 0.3)
    both = read_pca(tiny_dataset, ("wrist", "exterior"), (16, 16), 0.3)
    np.testing.assert_array_equal(swapped["mean"], both["mean"][::-1])


def test_a_dataset_without_a_codec(tmp_path):
    for crop, message in (((16, 24), "--codec_size=16,24"), ((116, 4), r"crop to \(112, 8\) .*--codec_size=112,8")):
        with pytest.raises(UserError, match=f"pca.npz.*{message}"):
            read_pca(tmp_path, ("wrist",), crop, 0.3)


def test_a_damaged_or_edited_codec_is_refused(tiny_dataset, tmp_path):
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    file = copy / "codec" / "pca.npz"
    data = file.read_bytes()
    for damaged in (b"", data[:-30], data[:300] + b"\1" + data[301:], b"no npz"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"pca.npz cannot be read .*reshard the dataset again"):
            read_pca(copy, ("wrist",), (16, 16), 0.3)
    with np.load(tiny_dataset / "codec" / "pca.npz") as stored:
        arrays = dict(stored)
    for name, edited in (("scale", arrays["scale"] * 2), ("val_ratio", np.asarray(0.1)), ("extra", np.zeros(1))):
        np.savez(file, **arrays | {name: edited})
        with pytest.raises(UserError, match=r"pca.npz has been damaged or edited"):
            read_pca(copy, ("wrist",), (16, 16), 0.3)
