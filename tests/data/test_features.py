"""Feature trees against TFDS's own, of today and of its older versions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from uwm_jax.data.features import Feature, as_images, flatten, upgrade

F = tfds.features


def _tree(steps: dict[str, Any], **episode: Any) -> dict[str, Any]:
    return json.loads(json.dumps(F.FeaturesDict({"steps": F.Dataset(steps), **episode}).to_json()))


def _steps(steps: dict[str, Any]) -> dict[str, Feature]:
    return {k.removeprefix("steps/"): f for k, f in flatten(upgrade(_tree(steps)))}


def test_shapes_kinds_and_encodings() -> None:
    found = _steps(
        {
            "image": F.Image(),
            "images": F.Sequence(F.Image(shape=(8, 8, 3)), length=3),
            "video": F.Video(shape=(None, 8, 8, 3)),
            "three": F.Sequence(F.Tensor(shape=(2,), dtype=np.float32), length=3),
            "three_encoded": F.Sequence(F.Tensor(shape=(2,), dtype=np.float32, encoding="zlib"), length=3),
            "any": F.Sequence(np.int64),
            "open": F.Tensor(shape=(None, 3), dtype=np.float32),
            "zlib": F.Tensor(shape=(4, 4), dtype=np.uint8, encoding="zlib"),
            "raw": F.Tensor(shape=(2,), dtype=np.float32, encoding="bytes"),
            "strings": F.Tensor(shape=(2,), dtype=np.object_),
            "box": F.BBoxFeature(),
            "label": F.ClassLabel(num_classes=3),
            "maybe": F.Tensor(shape=(2,), dtype=np.float32, optional=True),
            "audio": F.Audio(),
        }
    )
    assert found == {
        "image": Feature((-1, -1, 3), "uint8", image=True),
        "images": Feature(None, "uint8", image=True),
        "video": Feature(None, "uint8", image=True),
        "three": Feature(None, "float32"),
        "three_encoded": Feature(None, "float32", encoding="zlib"),
        "any": Feature(None, "int64"),
        "open": Feature((-1, 3), "float32"),
        "zlib": Feature((4, 4), "uint8", encoding="zlib"),
        "raw": Feature((2,), "float32", encoding="bytes"),
        "strings": Feature((2,), "string"),
        "box": Feature((4,), "float32"),
        "label": Feature((), "int64"),
        "maybe": Feature(None, "float32"),
        "audio": Feature(None, "unknown"),
    }


def _old(name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"type": f"tensorflow_datasets.core.features.{name}", "content": content}


def test_the_oldest_schema_reads_as_tfds_reads_it() -> None:
    pair = _old("tensor_feature.Tensor", {"shape": [2], "dtype": "bool"})
    step = {
        "image": _old("image_feature.Image", {"shape": [8, None, 3], "dtype": "uint8", "encoding_format": "png"}),
        "state": _old("tensor_feature.Tensor", {"shape": [3], "dtype": "float32", "encoding": "zlib"}),
        "old": _old("feature.Tensor", {"shape": [], "dtype": "int64"}),
        "text": _old("text_feature.Text", {}),
        "label": _old("class_label_feature.ClassLabel", {"num_classes": 10}),
        "many": _old("sequence_feature.Sequence", {"feature": pair, "length": 4}),
    }
    steps = _old("sequence_feature.Sequence", {"feature": _old("features_dict.FeaturesDict", step), "length": None})
    old = _old("features_dict.FeaturesDict", {"steps": steps, "path": _old("text_feature.Text", {})})
    tree = upgrade(old)
    expected = F.FeatureConnector.from_json(json.loads(json.dumps(old)))
    assert dict(flatten(tree)) == dict(flatten(upgrade(json.loads(json.dumps(expected.to_json())))))
    assert dict(flatten(tree))["steps/image"] == Feature((8, -1, 3), "uint8", image=True)


@pytest.mark.parametrize("as_text", [False, True])
def test_messages_in_the_older_frame(as_text: bool) -> None:
    tree = _tree({"state": F.Tensor(shape=(3,), dtype=np.float32)}, path=F.Text())
    assert tree.keys() == {"type", "content", "proto_cls"}
    if as_text:
        tree["content"] = json.dumps(tree["content"])
    assert dict(flatten(upgrade(tree))) == {
        "steps/state": Feature((3,), "float32"),
        "path": Feature((), "string"),
    }


def test_leaves_become_images() -> None:
    tree = upgrade(_tree({"observation": {"a": F.Tensor(shape=(4, 6, 3), dtype=np.uint8), "b": F.Scalar(np.int64)}}))
    found = dict(flatten(as_images(tree, {"steps/observation/a": ((4, 6, 3), "png")})))
    assert found == {
        "steps/observation/a": Feature((4, 6, 3), "uint8", image=True),
        "steps/observation/b": Feature((), "int64"),
    }
