"""The `.json` that `convert to-torch` writes next to the weights, read again: the run that they came from.

An export folder has the files `WEIGHTS`, `DESCRIPTION`, and of a system that `PROGRAM` runs `PROBE` and `PROGRAM`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, as_place
from uwm_jax.reading import read_json

FORMAT = "uwm_jax.torch"
FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION, PROBE, PROGRAM = "model.safetensors", "model.json", "probe.npz", "uwm_torch.py"
_PARAMETERS = ("raw", "average")


@dataclasses.dataclass(frozen=True)
class Described:
    """A described checkpoint.

    Attributes:
      config: of the run.
      spec: what it knows of its data.
      step: of the checkpoint.
      parameters: which it holds, `raw` or `average`.
      learned_from: the datasets that its parameters learned from, as `training.lineage` has them; None where an export
        does not say.
      stored: the JSON itself, of which the fields above were checked.
    """

    config: ConfigDict
    spec: DataSpec
    step: int
    parameters: str
    learned_from: list[dict[str, Any]] | None
    stored: Mapping[str, Any]


def read(path: AnyPath, flag: str) -> Described:
    """Reads a description.

    Raises:
      UserError: the file is absent, no JSON, no description of this version, or a field of it is not as written.
    """
    where = f"{flag}: {path}"
    try:
        stored = read_json(path)
    except OSError as e:
        raise UserError(f"{flag}: cannot read {str(path)!r} ({e.strerror}).") from e
    found = (stored.get("format"), stored.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{where}: expected the description that `convert to-torch` writes, {(FORMAT, FORMAT_VERSION)}, found "
            f"{found}. For an official run give its .hydra/config.yaml."
        )
    config = config_lib.from_json(json.dumps(stored.get("config")), where)
    try:
        spec = DataSpec.from_json(
            {
                "window": WindowSpec.from_config(config.data.window).to_json(),
                "cameras": stored["cameras"],
                "low_dim": stored["low_dim"],
                "action_dim": stored["shapes"]["action"][-1],
                "text_dim": stored["text_dim"],
                **{name: stored[name] for name in ("text_encoder",) if name in stored},
                "normalizer": stored["normalizers"],
                "flip": stored.get("flip", {}),
                "robots": stored.get("robots", {}),  # older ones have none
            }
        )
        _check(spec, stored)
        return Described(config, spec, stored["step"], stored["parameters"], _learned_from(stored), stored)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        raise UserError(
            f"{where}: a field is missing or not as `convert to-torch` wrote it ({type(e).__name__}: {e})."
        ) from e


def require_codec(described: Described, where: str) -> None:
    """Raises UserError for an export whose uses do without the codec that its system has."""
    codec = described.stored.get("codec")
    if isinstance(codec, dict) and codec.get("included") is False:
        uses = ", ".join(map(str, described.stored.get("uses") or ()))
        raise UserError(
            f"{where}: this was exported for {uses} only, without the codec that a workdir needs. Export it again "
            "without --uses."
        )


def _check(spec: DataSpec, stored: Mapping[str, Any]) -> None:
    """Raises ValueError for values that no run can have."""
    cameras, low_dim = stored["cameras"], stored["low_dim"]
    sizes = [*(n for size in cameras.values() for n in size), *low_dim.values(), stored["shapes"]["action"][-1]]
    if (
        not cameras
        or any(len(size) != 2 for size in cameras.values())
        or not all(type(n) is int and 0 < n < 2**31 for n in sizes)
    ):
        raise ValueError("the sizes of cameras, low_dim and the action should be positive integers")
    for name in ("text_dim", "step"):
        if type(stored[name]) is not int or not 0 <= stored[name] < 2**31:
            raise ValueError(f"{name} should be an integer from 0 on, found {stored[name]!r:.60}")
    if stored["parameters"] not in _PARAMETERS:
        raise ValueError(f"parameters should be {' or '.join(_PARAMETERS)}, found {stored['parameters']!r:.60}")
    for source, robot in spec.robots.items():
        if robot.model_width != spec.action_dim:
            raise ValueError(f"the robot's actions of {source} make {robot.model_width} numbers, not {spec.action_dim}")
    for key, pair in spec.normalizer.entries.items():
        if not all(np.isfinite(part).all() for part in pair):
            raise ValueError(f"the normaliser of {key} holds values that are not finite")


def _learned_from(stored: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Raises ValueError for entries that no export has."""
    found = stored.get("fingerprints", {}).get("data")
    if found is None:
        return None
    kinds = {"fingerprint": str, "split": str, "val_ratio": float, "selection": str}
    for entry in found:
        if {name: type(value) for name, value in entry.items()} != kinds or not 0 <= entry["val_ratio"] <= 1:
            raise ValueError(f"fingerprints.data should list datasets with {', '.join(kinds)}, found {entry!r:.80}")
    return list(found)


def is_description(path: AnyPath) -> bool:
    """Whether a path is called like one; official configurations are YAML."""
    return as_place(path).suffix == ".json"


def split(tensors: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors whose names begin with `prefix`, without it, and the others."""
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside, {name: t for name, t in tensors.items() if not name.startswith(prefix)}
