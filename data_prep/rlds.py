"""Reads RLDS datasets in TFDS layout as raw records, with neither TensorFlow nor tfds.

A directory holds `dataset_info.json` (splits and their files), `features.json` (what a record
means) and the shards, TFRecord or ArrayRecord, one serialized episode per record.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_prep.features import STEPS, Feature, flatten
from uwm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """An RLDS dataset on disk; `features` has flat keys, step features under `steps/`."""

    path: Path
    name: str
    version: str
    file_format: str
    splits: dict[str, list[Path]]
    info: dict[str, Any]
    features_json: dict[str, Any]
    features: dict[str, Feature]


def open_source(path: Path) -> Source:
    """Reads the two JSON files and checks that every shard they name exists."""
    info = _read_json(path, "dataset_info.json")
    features_json = _read_json(path, "features.json")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format not in ("tfrecord", "array_record"):
        raise UserError(
            f"{path / 'dataset_info.json'}: fileFormat is {file_format!r}; expected tfrecord or array_record."
        )
    splits = {}
    for split in info.get("splits", []):
        files = _shard_files(path, info, split, file_format, len(split.get("shardLengths", [])))
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of {len(files)} files of split {split['name']!r} are missing, "
                f"the first is {missing[0]}. Complete the download."
            )
        splits[split["name"]] = files
    if not splits:
        raise UserError(f"{path / 'dataset_info.json'} names no splits.")
    features = dict(flatten(features_json, ""))
    if not any(k.startswith(STEPS) for k in features):
        raise UserError(
            f"{path / 'features.json'} has no `steps`: not an RLDS dataset. Its keys: {', '.join(sorted(features))}."
        )
    return Source(path, info["name"], info.get("version", ""), file_format, splits, info, features_json, features)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        inside = sorted(p.parent.relative_to(path) for p in path.glob(f"*/{name}")) if path.is_dir() else []
        hint = f" Did you mean {path / inside[-1]}?" if inside else ""
        raise UserError(f"{file} does not exist: --input must be the directory that holds it.{hint}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{file} is not valid JSON: {e}") from e


def _shard_files(path: Path, info: dict, split: dict, file_format: str, num_shards: int) -> list[Path]:
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    fields = {"DATASET": info["name"], "SPLIT": split["name"], "FILEFORMAT": file_format}
    files = []
    for i in range(num_shards):
        name = template
        shard = {
            "SHARD_X_OF_Y": f"{i:05d}-of-{num_shards:05d}",
            "SHARD_INDEX": f"{i:05d}",
            "NUM_SHARDS": f"{num_shards:05d}",
        }
        for key, value in (fields | shard).items():
            name = name.replace("{" + key + "}", value)
        files.append(path / name)
    return files
