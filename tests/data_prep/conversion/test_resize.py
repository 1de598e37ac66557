"""`--resize`: smaller images, encoded again, and what the manifest and TFDS say of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build
from data_prep.sources.inputs import Corpus, Found, Input
from uwm_jax.data.episodes import encode_jpeg, encode_png, feature_tree, serialize_episode
from uwm_jax.data.features import Feature
from uwm_jax.data.images import resize_matrix
from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.errors import UserError

FEATURES = {
    "steps/observation/jpeg": Feature((24, 40, 3), "uint8", image=True),
    "steps/observation/grey": Feature((24, 40, 1), "uint8", image=True),
    "steps/observation/raw": Feature((30, 20, 3), "uint8"),
    "steps/observation/small": Feature((12, 16, 3), "uint8", image=True),
    "steps/action": Feature((2,), "float32"),
}
SIZE = (12, 16)


def _smooth(height: int, width: int, channels: int, step: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(2 * x + c / 4 + 0.3 * step) + np.cos(1.5 * y - c / 4) for c in range(channels)]
    return (127 + 60 * np.stack(waves, -1)).astype(np.uint8)


class Made(Input):
    """Two episodes."""

    def episodes(self):
        for length in (3, 5):
            frames = {
                k: [_smooth(*f.shape, t) for t in range(length)] for k, f in FEATURES.items() if len(f.shape) == 3
            }
            values = {
                "steps/observation/jpeg": [encode_jpeg(f, 100) for f in frames["steps/observation/jpeg"]],
                "steps/observation/grey": [encode_png(f) for f in frames["steps/observation/grey"]],
                "steps/observation/raw": np.stack(frames["steps/observation/raw"]),
                "steps/observation/small": [encode_jpeg(f) for f in frames["steps/observation/small"]],
                "steps/action": np.zeros((length, 2)),
            }
            yield Found(serialize_episode(FEATURES, values))


def test_images_are_resized_and_said_to_be(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    corpus = Corpus("toy", "1.0.0", tmp_path / "in", feature_tree(FEATURES), {"train": [Made(name="a", size=1)]})
    build(corpus, tmp_path / "out", Options(resize=SIZE, workers=1, pca_patch=4, pca_channels=4))
    manifest = read_manifest(tmp_path / "out")
    sizes = {"observation/jpeg": [24, 40], "observation/grey": [24, 40], "observation/raw": [30, 20]}
    assert manifest["resize"]["from"] == sizes and manifest["resize"]["jpeg_quality"] == 95
    assert all(c == {"height": 12, "width": 16} for c in manifest["cameras"].values()) and len(manifest["cameras"]) == 4

    dataset = Dataset(tmp_path / "out")
    for key, (height, width) in sizes.items():
        channels = 1 if "grey" in key else 3
        found = np.zeros((1, *SIZE, 3), np.uint8)
        dataset.frames(1, {key: [4]}, {key: found})
        image = _smooth(height, width, channels, 4).astype(float)
        expected = np.einsum("yh,xw,hwc->yxc", *_matrices((height, width)), image)  # training's own resize
        assert np.abs(found[0] - expected).mean() < 2 and np.abs(found[0] - expected).max() < 12

    steps = next(iter(tfds.builder_from_directory(tmp_path / "out").as_data_source("train")))["steps"]
    observation = next(iter(steps))["observation"]
    assert {key: image.shape for key, image in observation.items()} == dict.fromkeys(observation, (12, 16, 3))
    record, small = dataset.record(0, 0), encode_jpeg(_smooth(12, 16, 3, 0))
    assert bytes(small) in bytes(record)  # of that size already: bytes untouched


def _matrices(size: tuple[int, int]) -> list[np.ndarray]:
    found = [np.asarray(resize_matrix(old, new)) for old, new in zip(size, SIZE, strict=True)]
    return [m if m.shape[0] == new else m.T for m, new in zip(found, SIZE, strict=True)]


def test_without_resize_nothing_is_said(tmp_path: Path) -> None:
    corpus = Corpus("toy", "1.0.0", tmp_path / "in", feature_tree(FEATURES), {"train": [Made(name="a", size=1)]})
    build(corpus, tmp_path / "out", Options(workers=1, pca_patch=4, pca_channels=4))
    assert "resize" not in json.loads((tmp_path / "out" / "manifest.json").read_text())


@pytest.mark.parametrize(("task", "assemble"), [((2, 2), False), ((0, 0), False), ((0, 2), True)])
def test_shares_that_are_none(task: tuple[int, int], assemble: bool) -> None:
    with pytest.raises(UserError, match="--task"):
        Options(task=task, assemble=assemble).check()
