"""Writes episodes as RLDS `tf.Example` messages, and the feature tree that describes them, without TensorFlow.

Features are flat: `{"steps/observation/image": Feature((180, 320, 3), "uint8", image=True), "steps/action":
Feature((7,), "float32"), "steps/is_last": Feature((), "bool"), "language_instruction": Feature((), "string")}`. Those
under `steps/` have one value per step, all others one per episode.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from uwm_jax.data import example
from uwm_jax.data.features import STEPS, Feature

JPEG_QUALITY = 95  # of images that a converter encodes, unless it has a flag for it

_CLASSES = "tensorflow_datasets.core.features."
_NODES = {
    "dict": _CLASSES + "features_dict.FeaturesDict",
    "steps": _CLASSES + "dataset_feature.Dataset",
    "image": _CLASSES + "image_feature.Image",
    "scalar": _CLASSES + "scalar.Scalar",
    "tensor": _CLASSES + "tensor_feature.Tensor",
    "text": _CLASSES + "text_feature.Text",
}


def feature_tree(features: Mapping[str, Feature], encodings: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The tree of TFDS's `features.json` for flat features.

    Args:
        encodings: image features whose files are not JPEG -> "png".
    """
    tree: dict[str, Any] = _dictionary()
    for path, feature in features.items():
        node = tree
        *parents, name = path.split("/")
        for parent in parents:
            children = node["featuresDict"]["features"]
            if parent not in children:
                inside = _dictionary()
                children[parent] = inside if node is not tree or parent + "/" != STEPS else _sequence(inside)
            node = children[parent]
            node = node["sequence"]["feature"] if "sequence" in node else node
        node["featuresDict"]["features"][name] = _leaf(feature, (encodings or {}).get(path, "jpeg"))
    return tree


def serialize_episode(features: Mapping[str, Feature], values: Mapping[str, Any]) -> bytes:
    """A serialized `tf.Example` of one episode, as TFDS writes it.

    Args:
        features: every feature of the dataset; `string`, numbers of any numpy dtype (float64 is stored as float32, as
            TFDS does), and encoded images. Tensors that TFDS encodes as strings are not written.
        values: a value for each: under `steps/` an array (T, *shape), or T encoded images or strings; else one array,
            number or string. Strings are `str` or `bytes`.
    Raises:
        ValueError: a value is missing or has another shape, or the numbers of steps differ.
    """
    if missing := sorted(features.keys() ^ values.keys()):
        raise ValueError(f"expected a value of each feature; these have none, or no feature: {', '.join(missing)}")
    lengths = {path: len(values[path]) for path in features if path.startswith(STEPS)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"unequal numbers of steps: {lengths}")
    return example.serialize((path.encode(), _value(path, feature, values[path])) for path, feature in features.items())


def encode_jpeg(image: np.ndarray, quality: int = JPEG_QUALITY) -> bytes:
    """An image (H, W, 3) uint8 RGB as JPEG with 4:2:0 subsampling, as TFDS and cameras write it."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) uint8 resized to `size` (height, width), bilinear and antialiased, as does
    `config.data.resize`."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def encode_png(image: np.ndarray) -> bytes:
    """An image (H, W, 1, 3 or 4) uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _value(path: str, feature: Feature, value: Any) -> bytes:
    steps = path.startswith(STEPS)
    if feature.image or feature.dtype == "string":
        items = value if steps else [value]
        return example.bytes_feature(item.encode() if isinstance(item, str) else bytes(item) for item in items)
    array = np.asarray(value)
    if feature.shape is None or feature.encoding != "none":
        raise ValueError(f"{path}: ragged and encoded tensors are not written")
    expected = (len(array), *feature.shape) if steps else feature.shape
    if array.shape != expected:
        raise ValueError(f"{path}: expected values of shape {expected}, found {array.shape}")
    if feature.dtype.startswith(("float", "bfloat")):
        return example.float_feature(array.reshape(-1))
    return example.int_feature(array.reshape(-1).astype(np.int64).tolist())


def _dictionary() -> dict[str, Any]:
    return {"pythonClassName": _NODES["dict"], "featuresDict": {"features": {}}}


def _sequence(inside: dict[str, Any]) -> dict[str, Any]:
    return {"pythonClassName": _NODES["steps"], "sequence": {"feature": inside, "length": "-1"}}


def _leaf(feature: Feature, encoding: str) -> dict[str, Any]:
    shape = _dimensions(feature.shape or ())
    if feature.image:
        described = {"shape": shape, "dtype": feature.dtype, "encodingFormat": encoding}
        return {"pythonClassName": _NODES["image"], "image": described}
    if feature.dtype == "string" and not feature.shape:
        return {"pythonClassName": _NODES["text"], "text": {}}
    described = {"shape": shape, "dtype": feature.dtype, "encoding": "none"}
    return {"pythonClassName": _NODES["tensor" if feature.shape else "scalar"], "tensor": described}


def _dimensions(shape: Iterable[int]) -> dict[str, Any]:
    dimensions = [str(n) for n in shape]
    return {"dimensions": dimensions} if dimensions else {}
