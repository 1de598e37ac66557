"""Reads `features.json`, the feature tree of a TFDS dataset's records, without TensorFlow and tfds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

STEPS = "steps/"

_MAX_VALUES = 1 << 40  # of one step
_STRINGS = {"string", "object", "str", "bytes"}
# The field of the schema (tensorflow_datasets/core/proto/feature.proto) that describes a feature of each class.
_KINDS = {
    "FeaturesDict": "featuresDict",
    "Dataset": "sequence",
    "Sequence": "sequence",
    "Tensor": "tensor",
    "Scalar": "tensor",
    "TensorFeature": "tensor",
    "Image": "image",
    "ImageFeature": "image",
    "Video": "video",
    "VideoFeature": "video",
    "Audio": "audio",
    "AudioFeature": "audio",
    "BBoxFeature": "boundingBox",
    "BoundingBoxFeature": "boundingBox",
    "ClassLabel": "classLabel",
    "Text": "text",
    "TextFeature": "text",
    "Translation": "translation",
    "TranslationFeature": "translation",
}


@dataclasses.dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`.

    Attributes:
        shape: of one step, for step features; None if ragged, -1 for an unknown dimension.
        dtype: a numpy name, `string`, or `unknown`.
        image: whether the values are encoded images.
        encoding: `none`, or the encoding of a tensor as one string per step: `bytes` or `zlib`.
    """

    shape: tuple[int, ...] | None
    dtype: str
    image: bool = False
    encoding: str = "none"


def upgrade(node: dict[str, Any]) -> dict[str, Any]:
    """A feature tree in the current schema, {"pythonClassName": ..., <kind>: ...}.

    Older versions of TFDS wrote {"type": class, "content": ...}, where the content is a dictionary in a schema of its
    own or, later, the current message (then with "proto_cls").
    """
    if "type" in node and "content" in node:
        name, content = str(node["type"]), node["content"]
        if isinstance(content, str):
            content = json.loads(content)
        kind = _KINDS.get(str(node.get("proto_cls") or name).rpartition(".")[2])
        if kind is None:
            return {"pythonClassName": name}
        node = {"pythonClassName": name, kind: content if node.get("proto_cls") else _content(kind, content)}
    if "featuresDict" in node:
        children = {key: upgrade(child) for key, child in node["featuresDict"].get("features", {}).items()}
        return node | {"featuresDict": {"features": children}}
    if "sequence" in node:
        return node | {"sequence": node["sequence"] | {"feature": upgrade(node["sequence"]["feature"])}}
    return node


def _content(kind: str, old: dict[str, Any]) -> dict[str, Any]:
    """Content of an older `features.json` in the current schema."""
    if kind == "featuresDict":
        return {"features": old}
    if kind == "sequence":
        length = old.get("length")
        return {"feature": old["feature"], "length": "-1" if length is None else str(length)}
    if kind == "classLabel":
        return {"numClasses": str(old.get("num_classes") or 0)}
    if kind in ("text", "translation"):
        return {}
    dimensions = ["-1" if n is None else str(n) for n in old.get("shape", ())]
    content = {"shape": {"dimensions": dimensions}, "dtype": str(old.get("dtype", "")).removeprefix("tf.")}
    content |= {"dtype": content["dtype"] or ("uint8" if kind in ("image", "video") else "float32")}
    for name, other in (("encoding", "encoding"), ("encoding_format", "encodingFormat")):
        if old.get(name):
            content[other] = str(old[name])
    return content


def flatten(node: dict[str, Any], prefix: str = "", ragged: bool = False) -> Iterator[tuple[str, Feature]]:
    """Leaves of a feature tree in the current schema, by path.

    Leaves below a sequence within a step are ragged: records hold such lists row by row, also those of fixed length.
    """
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            yield from flatten(child, f"{prefix}/{key}" if prefix else key, ragged)
    elif "sequence" in node:
        yield from flatten(node["sequence"]["feature"], prefix, prefix + "/" != STEPS)
    else:
        leaf = _leaf(node)
        if not isinstance(leaf.dtype, str):
            raise TypeError(f"{prefix}: the dtype is {leaf.dtype!r}")
        if math.prod(leaf.shape or ()) > _MAX_VALUES:
            raise ValueError(f"{prefix}: the shape is {leaf.shape}")
        yield prefix, dataclasses.replace(leaf, shape=None) if ragged else leaf


def as_images(
    node: dict[str, Any], images: Mapping[str, tuple[tuple[int, ...], str]], prefix: str = ""
) -> dict[str, Any]:
    """A feature tree in the current schema whose leaves at the paths in `images` are images: (shape, encoding)."""
    if "featuresDict" in node:
        children = node["featuresDict"]["features"].items()
        new = {key: as_images(child, images, f"{prefix}/{key}" if prefix else key) for key, child in children}
        return node | {"featuresDict": {"features": new}}
    if "sequence" in node:
        inner = as_images(node["sequence"]["feature"], images, prefix)
        return node | {"sequence": node["sequence"] | {"feature": inner}}
    if prefix not in images:
        return node
    shape, encoding = images[prefix]
    return {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {
            "shape": {"dimensions": [str(n) for n in shape]},
            "dtype": "uint8",
            "encodingFormat": encoding,
        },
    }


def _leaf(node: dict[str, Any]) -> Feature:
    if "image" in node:
        return Feature(_shape(node["image"]) or (-1, -1, 3), node["image"].get("dtype", "uint8"), image=True)
    if "video" in node:
        return Feature(None, node["video"].get("dtype", "uint8"), image=True)
    if "text" in node:
        return Feature((), "string")
    if "classLabel" in node:
        return Feature((), "int64")
    if "boundingBox" in node:
        node = {"tensor": node["boundingBox"] | {"shape": {"dimensions": [4]}}}
    if "tensor" in node:
        tensor = node["tensor"]
        dtype = tensor.get("dtype") or "float32"
        encoding = str(tensor.get("encoding") or "none").lower()
        # An optional value may be missing in a step.
        shape = None if tensor.get("optional") else _shape(tensor)
        return Feature(shape, "string" if dtype in _STRINGS else dtype, encoding=encoding)
    return Feature(None, "unknown")


def _shape(node: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in node.get("shape", {}).get("dimensions", []))
