"""Reads `features.json`, the tree that says what a record of a TFDS dataset means, with neither TensorFlow nor tfds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

STEPS = "steps/"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`. `shape` is per step for step features (None where unknown or
    ragged, -1 for an unknown dimension), `dtype` a numpy name or `string`, `image` whether the values
    are encoded images."""

    shape: tuple[int, ...] | None
    dtype: str
    image: bool = False


def flatten(node: dict[str, Any], prefix: str, ragged: int = 0) -> Iterator[tuple[str, Feature]]:
    """Leaves of a feature tree. `ragged` counts the sequences above a leaf: one (the steps) leaves
    its shape known per element, two make it ragged."""
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            yield from flatten(child, f"{prefix}/{key}" if prefix else key, ragged)
        return
    if "sequence" in node:
        yield from flatten(node["sequence"]["feature"], prefix, ragged + 1)
        return
    nested = ragged > 1 or (ragged == 1 and not prefix.startswith(STEPS))
    if "image" in node:
        yield (
            prefix,
            Feature(None if nested else _shape(node["image"]), node["image"].get("dtype", "uint8"), not nested),
        )
    elif "tensor" in node:
        encoded = node["tensor"].get("encoding", "none") != "none"
        dtype = "string" if encoded else node["tensor"].get("dtype", "float32")
        yield prefix, Feature(None if nested else _shape(node["tensor"]), dtype)
    elif "text" in node:
        yield prefix, Feature(None if nested else (), "string")
    elif "classLabel" in node:
        yield prefix, Feature(None if nested else (), "int64")
    else:
        yield prefix, Feature(None, "unknown")


def _shape(node: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(d) for d in node.get("shape", {}).get("dimensions", []))
