"""Reads RLDS datasets in TFDS layout as raw records, with neither TensorFlow nor tfds.

A directory holds `dataset_info.json` (splits and their files), `features.json` (what a record
means) and the shards, TFRecord or ArrayRecord, one serialized episode per record.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c

from uwm_jax.errors import UserError

STEPS = "steps/"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`. `shape` is per step for step features (None where unknown or
    ragged, -1 for an unknown dimension), `dtype` a numpy name or `string`, `image` whether the values
    are encoded images."""

    shape: tuple[int, ...] | None
    dtype: str
    image: bool = False


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
    features = dict(_flatten(features_json, ""))
    if not any(k.startswith(STEPS) for k in features):
        raise UserError(
            f"{path / 'features.json'} has no `steps`: not an RLDS dataset. Its keys: {', '.join(sorted(features))}."
        )
    return Source(path, info["name"], info.get("version", ""), file_format, splits, info, features_json, features)


def read_records(path: Path, file_format: str) -> Iterator[tuple[bytes | None, str, int]]:
    """Yields (record, "", size) per record, or (None, reason, size) for what cannot be read: a record with a wrong
    checksum is skipped, a broken frame ends the file. Sizes are shares of the file's bytes: their sum is the size
    of the file, or less where a broken frame ends it."""
    if file_format == "tfrecord":
        yield from _read_tfrecord(path)
    else:
        yield from _read_array_record(path)


def _read_tfrecord(path: Path) -> Iterator[tuple[bytes | None, str, int]]:
    # Frame: uint64 length, uint32 masked crc of it, data, uint32 masked crc of the data.
    with path.open("rb") as f:
        while header := f.read(12):
            if len(header) < 12:
                yield None, "file truncated", len(header)
                return
            length, check = struct.unpack("<QI", header)
            if check != _masked_crc(header[:8]):
                yield None, "length checksum mismatch (rest of the file lost)", 12
                return
            data = f.read(length)
            footer = f.read(4)
            size = 12 + len(data) + len(footer)
            if len(data) < length or len(footer) < 4:
                yield None, "file truncated", size
                return
            if struct.unpack("<I", footer)[0] != _masked_crc(data):
                yield None, "data checksum mismatch", size
                continue
            yield data, "", size


def _read_array_record(path: Path) -> Iterator[tuple[bytes | None, str, int]]:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    try:
        if not reader.ok():
            yield None, "file truncated", path.stat().st_size
            return
        total, count = path.stat().st_size, reader.num_records()
        for i in range(count):
            # Records may be compressed, and a damaged one has no length: equal shares are as good as any.
            size = total * (i + 1) // count - total * i // count
            try:
                record = reader.read([i])[0]
            except RuntimeError:  # the format's own hashes disagree
                yield None, "data checksum mismatch", size
                continue
            yield record, "", size
    finally:
        reader.close()


def _masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord stores it, rotated and offset."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


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


def _flatten(node: dict[str, Any], prefix: str, ragged: int = 0) -> Iterator[tuple[str, Feature]]:
    """Leaves of a feature tree. `ragged` counts the sequences above a leaf: one (the steps) leaves
    its shape known per element, two make it ragged."""
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            yield from _flatten(child, f"{prefix}/{key}" if prefix else key, ragged)
        return
    if "sequence" in node:
        yield from _flatten(node["sequence"]["feature"], prefix, ragged + 1)
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
