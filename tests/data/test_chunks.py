"""Not in `test_reshard`: the layout of features, and episodes that cannot be cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from uwm_jax.data.chunks import (
    EpisodeError,
    Layout,
    camera_features,
    cut_episode,
    frame_size,
    plan_layout,
    why_unusable,
)
from uwm_jax.data.features import Feature

LAYOUT = Layout(chunk_steps=4, sizes={"x": 2, "n": 1}, columns={"x": ((2,), "<f4"), "n": ((), "<i8")}, cameras={})


def _record(**features: list) -> bytes:
    """An Example by protobuf itself; keys with `__` for `/`."""
    example = tf_example_pb2.Example()
    for name, values in features.items():
        feature = example.features.feature[name.replace("__", "/")]
        if values and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif values and isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return example.SerializeToString()


def test_layout_of_features() -> None:
    features = {
        "steps/observation/image": Feature((8, 8, 3), "uint8", image=True),
        "steps/observation/depth": Feature((8, 8, 1), "uint16", image=True),
        "steps/action": Feature((7,), "float64"),
        "steps/half": Feature((2,), "bfloat16"),
        "steps/flag": Feature((), "bool"),
        "steps/text": Feature((), "string"),
        "steps/wide": Feature((300,), "float32"),
        "steps/ragged": Feature(None, "int64"),
        "steps/unknown": Feature((-1,), "float32"),
        "episode_metadata/seed": Feature((), "int64"),
        "episode_metadata/path": Feature((), "string"),
        "episode_metadata/tags": Feature(None, "string"),
    }
    layout = plan_layout(features, 16, {"observation/image": (8, 8)})
    assert layout.columns == {"action": ((7,), "<f4"), "half": ((2,), "<f4"), "flag": ((), "<i8")}
    images = {"observation/image": 1, "observation/depth": 1}
    assert layout.sizes == images | {"action": 7, "half": 2, "flag": 1, "text": 1, "wide": 300}
    assert list(camera_features(features)) == ["observation/image"]
    assert layout.texts == ("episode_metadata/path",)


@pytest.mark.parametrize(("length", "expected"), [(1, [1]), (4, [4]), (5, [4, 1]), (11, [4, 4, 3])])
def test_cut_against_protobuf(length: int, expected: list[int]) -> None:
    x, n = [float(i) for i in range(2 * length)], [7 * i - 3 for i in range(length)]
    images = [bytes([i] * (i + 1)) for i in range(length)]
    episode = cut_episode(_record(steps__x=x, steps__n=n, steps__image=images, meta__path=[b"p"]), LAYOUT)
    assert episode.length == length
    np.testing.assert_array_equal(episode.columns["x"], np.reshape(x, (length, 2)))
    np.testing.assert_array_equal(episode.columns["n"], n)
    at = 0
    for chunk, steps in zip(episode.chunks, expected, strict=True):
        found = tf_example_pb2.Example.FromString(chunk).features.feature
        assert list(found["steps/x"].float_list.value) == x[2 * at : 2 * (at + steps)]
        assert list(found["steps/n"].int64_list.value) == n[at : at + steps]
        assert list(found["steps/image"].bytes_list.value) == images[at : at + steps]
        assert list(found["meta/path"].bytes_list.value) == [b"p"]
        assert list(found["chunk/first_step"].int64_list.value) == [at]
        assert list(found["chunk/episode_steps"].int64_list.value) == [length]
        at += steps


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({"steps__x": [0.0, 1.0]}, "key missing"),
        ({"steps__x": [], "steps__n": []}, "no steps"),
        ({"steps__x": [0.0, 1.0], "steps__n": [1, 2]}, "unequal numbers of steps"),
        ({"steps__x": [0.0, 1.0, 2.0], "steps__n": [1]}, "unequal numbers of steps"),
        ({"steps__x": [0.0, 1.0, 2.0, 3.0], "steps__n": [1, 2], "steps__y": [1.0]}, "not a tf.Example"),
    ],
)
def test_episodes_that_cannot_be_cut(features: dict[str, list], reason: str) -> None:
    with pytest.raises(EpisodeError) as caught:
        cut_episode(_record(**features), LAYOUT)
    assert caught.value.reason.startswith(reason)


def test_bytes_that_are_no_example() -> None:
    whole = _record(steps__x=[0.0, 1.0], steps__n=[1])
    for record in (whole[:-3], b"\xff" * 40):
        with pytest.raises(EpisodeError) as caught:
            cut_episode(record, LAYOUT)
        assert caught.value.reason == "not a tf.Example of this dataset"


def test_images_that_are_none() -> None:
    layout = dataclasses.replace(LAYOUT, cameras={"image": (8, 8)})
    record = _record(steps__x=[0.0, 1.0], steps__n=[1], steps__image=[b"no image"])
    for read in (lambda: cut_episode(record, layout), lambda: frame_size(record, "image")):
        with pytest.raises(EpisodeError, match="image") as caught:
            read()
        assert caught.value.reason == "unreadable image"
    with pytest.raises(EpisodeError):
        frame_size(record, "another")


def test_texts_of_an_episode_may_be_missing() -> None:
    layout = dataclasses.replace(LAYOUT, texts=("meta/path", "meta/none"))
    record = _record(steps__x=[0.0, 1.0, 2.0, 3.0], steps__n=[5, 6], meta__path=["/a/ü".encode()])
    assert cut_episode(record, layout).texts == {"meta/path": "/a/ü".encode(), "meta/none": b""}


@pytest.mark.parametrize(
    ("feature", "reason"),
    [
        (Feature((3,), "complex64"), "values of complex64; a usable key holds floats, integers or booleans"),
        (Feature((3,), "float32", encoding="lz4"), "a tensor encoded by 'lz4'; expected none or bytes or zlib"),
        (Feature((20, 20, 3), "uint8", encoding="lz4"), "a tensor encoded by 'lz4'; expected none or bytes or zlib"),
    ],
)
def test_values_of_unknown_kinds_are_left_to_the_records(feature: Feature, reason: str) -> None:
    """Not a reason to skip every episode that has them."""
    layout = plan_layout({"steps/odd": feature, "steps/action": Feature((2,), "float32")}, 16, {})
    assert set(layout.columns) == {"action"} and not layout.pixels and not layout.decoded
    assert why_unusable(feature) == reason and camera_features({"steps/odd": feature}) == {}
