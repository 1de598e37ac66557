"""A corpus of made-up inputs becomes a dataset that TFDS reads, and its episodes are written as TFDS writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build, summary
from data_prep.sources.inputs import Corpus, Found, Input, storable
from uwm_jax.data.chunks import EpisodeError
from uwm_jax.data.episodes import encode_jpeg, encode_png, feature_tree, serialize_episode
from uwm_jax.data.features import Feature, flatten
from uwm_jax.data.records import Dataset, read_manifest

FEATURES = {
    "steps/observation/image": Feature((8, 12, 3), "uint8", image=True),
    "steps/observation/state": Feature((3,), "float64"),
    "steps/action": Feature((2,), "float32"),
    "steps/counter": Feature((), "int64"),
    "steps/is_last": Feature((), "bool"),
    "steps/language_instruction": Feature((), "string"),
    "episode_metadata/file_path": Feature((), "string"),
    "episode_metadata/offsets": Feature((2, 2), "int32"),
}
OPTIONS = Options(chunk_steps=4, pca_channels=4, workers=1)


def _values(number: int, length: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    images = rng.integers(0, 255, (length, 8, 12, 3), np.uint8)
    return {
        "steps/observation/image": [encode_png(image) for image in images],
        "steps/observation/state": rng.normal(size=(length, 3)),
        "steps/action": rng.normal(size=(length, 2)).astype(np.float32),
        "steps/counter": np.arange(length) - 3,
        "steps/is_last": np.arange(length) == length - 1,
        "steps/language_instruction": [f"naïve {number}"] * length,
        "episode_metadata/file_path": f"/clips/{number}",
        "episode_metadata/offsets": np.array([[-1 << 31, 0], [127, 128]], np.int32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Input):
    """Episodes by number; every third is broken, the first of an input has a remark."""

    numbers: tuple[int, ...]

    def episodes(self) -> Iterator[Found]:
        for i in self.numbers:
            if i % 3 == 2:
                yield Found(None, "broken", f"number {i}", 7, name=f"clip{i}")
            else:
                yield Found(serialize_episode(FEATURES, _values(i, i + 3)), size=7, remarks=("first",) * (i % 4 == 0))


def _corpus(path: Path) -> Corpus:
    inputs = [Numbers(name=f"part{k}", size=40, promised=4, numbers=tuple(range(4 * k, 4 * k + 4))) for k in (0, 1)]
    tree = feature_tree(FEATURES, {"steps/observation/image": "png"})
    return Corpus("toy", "1.0.0", path, tree, {"train": inputs}, facts={"fps": 10}, info={"description": "made up"})


def test_the_tree_and_the_record_are_those_of_tfds() -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer
    from tensorflow_datasets.proto import tf_example_pb2

    f = tfds.features
    step = {
        "observation": f.FeaturesDict(
            {
                "image": f.Image(shape=(8, 12, 3), encoding_format="png"),
                "state": f.Tensor(shape=(3,), dtype=np.float64),
            }
        ),
        "action": f.Tensor(shape=(2,), dtype=np.float32),
        "counter": f.Scalar(np.int64),
        "is_last": f.Scalar(np.bool_),
        "language_instruction": f.Text(),
    }
    metadata = {"file_path": f.Text(), "offsets": f.Tensor(shape=(2, 2), dtype=np.int32)}
    theirs = f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": f.FeaturesDict(metadata)})
    tree = feature_tree(FEATURES, {"steps/observation/image": "png"})
    assert f.FeaturesDict.from_json(tree).to_json() == theirs.to_json()
    assert dict(flatten(tree)) == FEATURES

    values, length = _values(5, 6), 6
    steps = [
        {
            "observation": {
                "image": np.random.default_rng(5).integers(0, 255, (length, 8, 12, 3), np.uint8)[t],
                "state": values["steps/observation/state"][t],
            },
            **{key: values[f"steps/{key}"][t] for key in ("action", "counter", "is_last", "language_instruction")},
        }
        for t in range(length)
    ]
    episode = {
        "steps": steps,
        "episode_metadata": {k: values[f"episode_metadata/{k}"] for k in ("file_path", "offsets")},
    }
    serializer = example_serializer.ExampleSerializer(theirs.get_serialized_info())
    expected = tf_example_pb2.Example.FromString(serializer.serialize_example(theirs.encode_example(episode)))
    found = tf_example_pb2.Example.FromString(serialize_episode(FEATURES, values))
    frames = "steps/observation/image"  # theirs is compressed in another way
    assert len(expected.features.feature.pop(frames).bytes_list.value) == length
    assert list(found.features.feature.pop(frames).bytes_list.value) == values[frames]
    assert found == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps/action": np.zeros((5, 2))}, "unequal numbers of steps"),
        ({"steps/action": np.zeros((6, 3))}, r"steps/action: expected values of shape \(6, 2\), found \(6, 3\)"),
        ({"steps/reward": np.zeros(6)}, "no feature: steps/reward"),
    ],
)
def test_values_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serialize_episode(FEATURES, _values(0, 6) | change)


def test_a_corpus_becomes_a_dataset(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    build(_corpus(tmp_path / "in"), tmp_path / "out", dataclasses.replace(OPTIONS, max_skipped=1))
    manifest = read_manifest(tmp_path / "out")
    split = manifest["splits"]["train"]
    assert (manifest["fps"], split["episodes"], split["skipped"]) == (10, 6, {"broken": 2})
    assert split["skipped_notes"] == ["clip2: broken: number 2", "clip5: broken: number 5"]
    assert split["remarks"] == {"first": 2} and "2 x first (kept)" in summary(manifest)
    dataset = Dataset(tmp_path / "out")
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 4, 6, 7, 9, 10])
    expected = [_values(i, i + 3) for i in (0, 1, 3, 4, 6, 7)]
    for key in ("action", "counter"):
        np.testing.assert_array_equal(dataset.column(key), np.concatenate([e[f"steps/{key}"] for e in expected]))
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.description == "made up"
    first = builder.as_data_source("train")[0]
    assert first["episode_metadata"]["file_path"] == b"/clips/0"
    assert [step["language_instruction"].decode() for step in first["steps"]] == ["naïve 0"] * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Input):
    def episodes(self) -> Iterator[Found]:
        yield Found(None, "first")
        raise KeyError("a mistake of the converter")


def test_a_mistake_of_a_converter_names_the_input(tmp_path: Path) -> None:
    corpus = dataclasses.replace(_corpus(tmp_path / "in"), splits={"train": [Broken(name="clip 7", size=1)]})
    with pytest.raises(KeyError) as caught:
        build(corpus, tmp_path / "out", OPTIONS)
    assert caught.value.__notes__ == ["in the task train.00000: clip 7"]
    with pytest.raises(ValueError, match="two inputs of split 'train' have the same name"):
        dataclasses.replace(corpus, splits={"train": [Broken(name="a", size=1)] * 2})


def test_pictures_are_jpeg_of_their_size() -> None:
    from uwm_jax.data.records import decode_image

    image = np.full((9, 14, 3), (200, 30, 90), np.uint8)
    found = np.empty_like(image)
    decode_image(encode_jpeg(image), found)
    assert np.abs(found.astype(int) - image).max() <= 3


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (np.array([1.0, -3.5e38]), "float32", r"state: -3.5e\+38 is beyond float32"),
        (np.array([[2**63 - 1], [2**63]], np.uint64), "int64", "state: 9223372036854775808 is beyond int64"),
        (np.array([3.4e38, np.inf, np.nan, 1e-50]), "float32", ""),
        (np.array([2**63], np.uint64), "float32", ""),
        (np.array([2**63], np.uint64), "bool", ""),
        (np.array([-(2**63)]), "int64", ""),
    ],
)
def test_numbers_that_a_record_would_change_are_refused(values: np.ndarray, dtype: str, message: str) -> None:
    if not message:
        assert storable(values, dtype, "state") is values
        return
    with pytest.raises(EpisodeError, match=message) as raised:
        storable(values, dtype, "state")
    assert raised.value.reason == "number too large"
