"""Keys of every kind, resharded: against TFDS's reader of the source and of the output."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.conversion.training_layout import reshard, summary
from tests.data import rlds_source
from uwm_jax.data.records import Dataset
from uwm_jax.errors import UserError

LENGTHS = [3, 18]
PIXELS = {"raw": (12, 20, 3), "raw_zlib": (12, 20, 3), "raw_bytes": (12, 20, 4), "raw_grey": (20, 16, 1)}
UNUSABLE = {
    "observation/depth": "images of uint16",
    "observation/channels_first": "channels, last|image has shape",
    "ragged": "ragged",
    "pairs": "ragged",
    "text": "data_prep.text embeds it for config.data.text_table",
    "wide_floats": "it can be config.data.text",
    "wide_encoded": "it can be config.data.text",
    "wide_ints": "more than the 256",
}


def _tree(lists: bool = False) -> Any:
    """`lists`: with an image sequence, which TFDS's reader without TensorFlow cannot decode."""
    import tensorflow_datasets as tfds

    f = tfds.features
    tensor = {name: "none" for name in PIXELS} | {"raw_zlib": "zlib", "raw_bytes": "bytes"}
    observation = {name: f.Tensor(shape=PIXELS[name], dtype=np.uint8, encoding=e) for name, e in tensor.items()}
    observation |= {
        "grey_png": f.Image(shape=(12, 20, 1), encoding_format="png"),
        "grey_jpeg": f.Image(shape=(16, 24, 1), encoding_format="jpeg"),
        "rgba": f.Image(shape=(12, 20, 4), encoding_format="png"),
        "depth": f.Image(shape=(12, 20, 1), dtype=np.uint16, encoding_format="png"),
        "channels_first": f.Tensor(shape=(3, 12, 20), dtype=np.uint8),
        "state": f.Tensor(shape=(3,), dtype=np.float32, encoding="zlib"),
    }
    if lists:
        observation["images"] = f.Sequence(f.Image(shape=(8, 8, 3)), length=2)
    step = {
        "observation": f.FeaturesDict(observation),
        "action": f.Tensor(shape=(2, 2), dtype=np.float64, encoding="bytes"),
        "flags": f.Tensor(shape=(3,), dtype=np.bool_, encoding="zlib"),
        "counter": f.Tensor(shape=(), dtype=np.int32, encoding="bytes"),
        "pairs": f.Sequence(f.Tensor(shape=(2,), dtype=np.float32), length=3),
        "ragged": f.Sequence(np.float32),
        "text": f.Text(),
        "wide_floats": f.Tensor(shape=(300,), dtype=np.float32),
        "wide_encoded": f.Tensor(shape=(400,), dtype=np.float32, encoding="zlib"),
        "wide_ints": f.Tensor(shape=(300,), dtype=np.int64),
    }
    return f.FeaturesDict({"steps": f.Dataset(step)})


def _png(rng: np.random.Generator, shape: tuple[int, ...], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(out, kind)
    return out.getvalue()


def _episode(number: int, length: int, lists: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    steps = []
    for t in range(length):
        observation: dict[str, Any] = {k: rng.integers(0, 256, shape, np.uint8) for k, shape in PIXELS.items()}
        observation |= {
            "grey_png": _png(rng, (12, 20)),
            "grey_jpeg": _png(rng, (16, 24), "JPEG"),
            "rgba": _png(rng, (12, 20, 4)),
            "depth": rng.integers(0, 1 << 16, (12, 20, 1), np.uint16),
            "channels_first": rng.integers(0, 256, (3, 12, 20), np.uint8),
            "state": rng.normal(size=3).astype(np.float32),
        }
        if lists:
            observation["images"] = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(2)]
        steps.append(
            {
                "observation": observation,
                "action": rng.normal(size=(2, 2)),
                "flags": rng.random(3) < 0.5,
                "counter": np.int32(-t),
                "pairs": rng.normal(size=(3, 2)).astype(np.float32),
                "ragged": list(rng.normal(size=t % 3).astype(np.float32)),
                "text": "take it",
                "wide_floats": rng.normal(size=300).astype(np.float32),
                "wide_encoded": rng.normal(size=400).astype(np.float32),
                "wide_ints": rng.integers(-9, 9, 300),
            }
        )
    return {"steps": steps}


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("keys")
    tree, episodes = _tree(), [_episode(i, n) for i, n in enumerate(LENGTHS)]
    records = [rlds_source.serialize(tree, e) for e in episodes]
    rlds_source.write(root / "source", {"train": [records[:1], records[1:]]}, tree, request.param)
    reshard(root / "source", root / "out", codec_size=(8, 16), pca_channels=4, workers=1)
    return root / "out", episodes


def _rgb(image: np.ndarray | bytes) -> np.ndarray:
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image.squeeze())
    return np.asarray(opened.convert("RGB"))


def test_cameras_are_rgb_without_alpha(made: tuple[Path, list[dict[str, Any]]]) -> None:
    out, episodes = made
    dataset = Dataset(out)
    names = [*PIXELS, "grey_png", "grey_jpeg", "rgba"]
    assert set(dataset.cameras) == {f"observation/{name}" for name in names}
    for number, episode in enumerate(episodes):
        steps = [0, LENGTHS[number] - 1]
        for name in names:
            key = dataset.camera_key(name)
            into = {key: np.zeros((2, *dataset.cameras[key], 3), np.uint8)}
            dataset.frames(number, {key: steps}, into)
            for frame, step in zip(into[key], steps, strict=True):
                np.testing.assert_array_equal(frame, _rgb(episode["steps"][step]["observation"][name]), name)


def test_columns_are_decoded(made: tuple[Path, list[dict[str, Any]]]) -> None:
    out, episodes = made
    dataset = Dataset(out)
    steps = [s for e in episodes for s in e["steps"]]
    expected = {
        "observation/state": np.stack([s["observation"]["state"] for s in steps]),
        "action": np.stack([s["action"] for s in steps]).astype(np.float32),
        "flags": np.stack([s["flags"] for s in steps]).astype(np.int64),
        "counter": np.array([s["counter"] for s in steps], np.int64),
    }
    assert dataset.column_keys == sorted(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(dataset.column(key)[:], values, key)


def test_floats_are_read_from_records(made: tuple[Path, list[dict[str, Any]]]) -> None:
    out, episodes = made
    dataset = Dataset(out)
    for name in ("wide_floats", "wide_encoded"):
        for number, step in ((0, 2), (1, 0), (1, 17)):
            found = dataset.values(number, step, dataset.float_key(name))
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, episodes[number]["steps"][step][name], name)
    action = episodes[1]["steps"][17]["action"].ravel().astype(np.float32)
    np.testing.assert_array_equal(dataset.values(1, 17, "action"), action)


def test_tfds_reads_the_output(made: tuple[Path, list[dict[str, Any]]]) -> None:
    import tensorflow_datasets as tfds

    out, episodes = made
    chunks = list(tfds.builder_from_directory(out).as_data_source("train"))
    found = [step for chunk in chunks for step in chunk["steps"]]
    expected = [step for episode in episodes for step in episode["steps"]]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for name in PIXELS:
            np.testing.assert_array_equal(a["observation"][name], b["observation"][name], name)
        for key in ("action", "flags", "counter", "wide_encoded", "ragged"):
            np.testing.assert_array_equal(a[key], b[key], key)
        np.testing.assert_array_equal(a["observation"]["state"], b["observation"]["state"])


def test_what_cannot_be_used_is_told_with_the_reason(made: tuple[Path, list[dict[str, Any]]]) -> None:
    dataset = Dataset(made[0])
    reasons = dataset.manifest["unusable_keys"]
    assert reasons.keys() == UNUSABLE.keys()
    printed = summary(dataset.manifest)
    for key, part in UNUSABLE.items():
        assert any(p in reasons[key] for p in part.split("|")) and f"{key}: {reasons[key]}" in printed
    for ask, name, part in (
        (dataset.camera_key, "depth", "images of uint16"),
        (dataset.camera_key, "observation/channels_first", "image has shape"),
        (dataset.column_key, "wide_floats", "it can be config.data.text"),
        (dataset.column_key, "ragged", "ragged"),
        (dataset.float_key, "text", "takes a precomputed embedding of it, a vector of floats in every step"),
        (dataset.float_key, "ragged", "ragged"),
    ):
        with pytest.raises(UserError, match=f"{name!r} exists, but cannot be used so: .*{part}"):
            ask(name)
    with pytest.raises(UserError) as caught:
        dataset.camera_key("front")
    assert "is there" not in str(caught.value)


def test_image_sequences_stay_in_the_records_and_are_named(tmp_path: Path) -> None:
    tree = _tree(lists=True)
    records = [rlds_source.serialize(tree, _episode(0, 18, lists=True))]
    rlds_source.write(tmp_path / "source", {"train": [records]}, tree)
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(8, 16), pca_channels=4, workers=1)
    dataset = Dataset(tmp_path / "out")
    with pytest.raises(UserError, match="'images' exists, but cannot be used so: a sequence of images in every step"):
        dataset.camera_key("images")
    assert dataset.record(0, 0).count(b"steps/observation/images/ragged_flat_values") == 1


@pytest.mark.parametrize("key", ["observation/raw_zlib", "observation/state"])
def test_encoded_tensors_that_are_damaged_cost_their_episode(tmp_path: Path, key: str) -> None:
    from tensorflow_datasets.proto import tf_example_pb2

    tree = _tree()
    records = [rlds_source.serialize(tree, _episode(i, 3)) for i in range(3)]
    for number, damage in enumerate((lambda b: b[:-3], lambda b: b"")):
        example = tf_example_pb2.Example.FromString(records[number])
        values = example.features.feature[f"steps/{key}"].bytes_list.value
        values[1] = damage(values[1])
        records[number] = example.SerializeToString()
    rlds_source.write(tmp_path / "source", {"train": [records]}, tree)
    manifest = reshard(tmp_path / "source", tmp_path / "out", codec_size=(8, 16), workers=1, max_skipped=1)
    assert manifest["splits"]["train"]["skipped"] == {"unreadable tensor": 2}
    assert f"{key}: an encoded tensor" in manifest["splits"]["train"]["skipped_notes"][0]


def test_pixels_that_are_no_bytes_cost_their_episode(tmp_path: Path) -> None:
    from tensorflow_datasets.proto import tf_example_pb2

    tree = _tree()
    records = [rlds_source.serialize(tree, _episode(i, 2)) for i in range(3)]
    for number, value in enumerate((256, -1)):
        example = tf_example_pb2.Example.FromString(records[number])
        example.features.feature["steps/observation/raw"].int64_list.value[7] = value
        records[number] = example.SerializeToString()
    rlds_source.write(tmp_path / "source", {"train": [records]}, tree)
    manifest = reshard(tmp_path / "source", tmp_path / "out", codec_size=(8, 16), workers=1, max_skipped=1)
    assert manifest["splits"]["train"]["skipped"] == {"unreadable tensor": 2}


def test_older_feature_trees_give_the_same_dataset(made: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    source = shutil.copytree(made[0].parent / "source", tmp_path / "source")
    (source / "features.json").write_text(json.dumps(_tree().to_json()))  # {"type", "content", "proto_cls"}
    reshard(source, tmp_path / "out", codec_size=(8, 16), pca_channels=4, workers=1)
    assert Dataset(tmp_path / "out").fingerprint == Dataset(made[0]).fingerprint
    assert json.loads((tmp_path / "out" / "features.json").read_text()).keys() == {"pythonClassName", "featuresDict"}
