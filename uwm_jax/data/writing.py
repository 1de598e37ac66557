"""Writes the training layout (`uwm_jax.data.records`): shards of records, and the files that describe them.

Episodes are cut by `uwm_jax.data.chunks`; who cuts them, and how a job or a recording is kept whole, is not decided
here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from array_record.python import array_record_module

from uwm_jax.data import records
from uwm_jax.data.chunks import Layout, step_features, why_unusable
from uwm_jax.data.direct import DirectFile
from uwm_jax.data.episodes import JPEG_QUALITY
from uwm_jax.data.features import STEPS, Feature, as_images, flatten
from uwm_jax.files import write_text, writing

SHARD_FACTS = ("records", "bytes", "sha256", "crc32c")  # of a shard's file; older versions had no crc32c

_BLOCK = 1 << 22
# Riegeli's hashes detect damage; compressing encoded images would only slow down reading.
_WRITER_OPTIONS = "group_size:1,uncompressed"


class ShardWriter:
    """Writes records to consecutive ArrayRecord files of about `shard_bytes` in `folder`."""

    def __init__(self, folder: Path, shard_bytes: int):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None
        self._size = self._records = 0

    def write(self, record: bytes) -> None:
        with self._disk_errors():
            if self._writer is None:
                self._file = self._folder / f"{len(self._shards):05d}.array_record"
                self._writer = array_record_module.ArrayRecordWriter(str(self._file), _WRITER_OPTIONS)
            self._writer.write(record)
        self._size += len(record)
        self._records += 1
        if self._size >= self._shard_bytes:
            self._finish()

    def close(self) -> list[dict[str, Any]]:
        """{"part": name of the file} and `SHARD_FACTS` of each file."""
        self._finish()
        return self._shards

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns the library's only error type, which has the system's message in its text, into OSError."""
        try:
            yield
        except RuntimeError as e:
            number = next((n for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.strerror(n) in str(e)), errno.EIO)
            raise OSError(number, os.strerror(number), str(self._file)) from e

    def _finish(self) -> None:
        if self._writer is None:
            return
        with self._disk_errors():
            self._writer.close()
        digest, crc32c, size = hashlib.sha256(), 0, 0
        with self._file.open("rb") as f:
            while block := f.read(_BLOCK):
                digest.update(block)
                crc32c, size = google_crc32c.extend(crc32c, block), size + len(block)
        facts = {"records": self._records, "bytes": size, "sha256": digest.hexdigest(), "crc32c": crc32c}
        self._shards.append({"part": self._file.name, **facts})
        self._writer, self._size, self._records = None, 0, 0


def shard_names(name: str, split: str, count: int) -> list[str]:
    """The files of a split's shards in a dataset of this name, as TFDS calls them."""
    return [f"{name}-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


def write_split(
    dataset: Path,
    split: str,
    layout: Layout,
    *,
    shards: Sequence[Mapping[str, Any]],
    lengths: Iterable[int],
    checksums: Iterable[int],
    texts: Mapping[str, Sequence[bytes]],
    columns: Callable[[str], Iterable[Path | memoryview]],
) -> dict[str, Any]:
    """Writes index, strings and columns of a split, whose shards are in the folder; returns its entry of the manifest.

    Args:
        shards: {"file"} and `SHARD_FACTS` of each, in order.
        lengths: steps of each episode. checksums: CRC-32C of each record.
        texts: episode-level strings, one per episode.
        columns: step key -> the bytes of its values, or files of them, of consecutive episodes in the column's dtype.
    """
    steps = np.asarray(list(lengths), np.int64)
    chunks = -(-steps // layout.chunk_steps)
    sizes = np.asarray([shard["records"] for shard in shards], np.int64)
    first_of_shard = np.cumsum(sizes) - sizes
    places = [place for shard in shards for place in DirectFile(os.fspath(dataset / shard["file"])).places]
    offsets, record_bytes = np.asarray(places, np.int64).reshape(-1, 2).T
    with writing(dataset / records.index_file(split), "wb") as out:
        np.savez(
            out,
            allow_pickle=False,
            episode_length=steps,
            episode_first_chunk=np.cumsum(chunks) - chunks,
            chunk_shard=np.repeat(np.arange(len(shards)), sizes),
            chunk_record=np.arange(sizes.sum()) - np.repeat(first_of_shard, sizes),
            chunk_crc32c=np.asarray(list(checksums), np.uint32),
            chunk_offset=offsets,
            chunk_bytes=record_bytes,
        )
    arrays: dict[str, np.ndarray] = {}
    for name, values in texts.items():
        arrays[f"{name}/utf8"] = np.frombuffer(b"".join(values), np.uint8)
        arrays[f"{name}/ends"] = np.cumsum([len(text) for text in values], dtype=np.int64)
    with writing(dataset / records.text_file(split), "wb") as out:
        np.savez(out, allow_pickle=False, **arrays)
    for key, (shape, dtype) in layout.columns.items():
        header = {"descr": dtype, "fortran_order": False, "shape": (int(steps.sum()), *shape)}
        with writing(dataset / records.column_file(split, key), "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for piece in columns(key):
                if isinstance(piece, memoryview):
                    out.write(piece)
                    continue
                with piece.open("rb") as stored:
                    shutil.copyfileobj(stored, out, 1 << 22)
    files = [
        records.index_file(split),
        records.text_file(split),
        *(records.column_file(split, key) for key in layout.columns),
    ]
    return {
        "episodes": len(steps),
        "steps": int(steps.sum()),
        "chunks": int(chunks.sum()),
        "shards": [dict(shard) for shard in shards],
        "files": {file: {"crc32c": records.checksum(dataset / file)} for file in files},
    }


def write_descriptions(
    dataset: Path,
    layout: Layout,
    *,
    name: str,
    version: str,
    tree: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, Any]],
    source: Mapping[str, Any],
    info: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes TFDS's two files and, last, the manifest, which is returned.

    Args:
        tree: of the features of an episode, in the schema of `features.json`.
        splits: entries as `write_split` returns them, which may have more fields.
        source, facts: of the manifest; no fact may be a field that every manifest has.
        info: further fields of `dataset_info.json`.
    """
    features = dict(flatten(dict(tree)))
    steps = step_features(features)
    manifest = {
        "format": records.FORMAT,
        "format_version": records.FORMAT_VERSION,
        "name": name,
        "version": version,
        "source": dict(source),
        "chunk_steps": layout.chunk_steps,
        "step_features": {key: _described(key, feature, layout) for key, feature in steps.items()},
        "unusable_keys": {key: reason for key, feature in steps.items() if (reason := why_unusable(feature))},
        "episode_features": {
            path: {"shape": None if f.shape is None else list(f.shape), "dtype": f.dtype}
            for path, f in features.items()
            if not path.startswith(STEPS)
        },
        "cameras": {key: {"height": h, "width": w} for key, (h, w) in layout.cameras.items()},
        "splits": {split: dict(entry) for split, entry in splits.items()},
    }
    if taken := manifest.keys() & facts.keys():
        raise ValueError(f"facts of a corpus that are fields of every manifest: {taken}")
    manifest |= facts
    if layout.resized:
        manifest["resize"] = {
            "rule": "both sides, bilinear and antialiased; encoded as JPEG",
            "jpeg_quality": JPEG_QUALITY,
            "from": {key: list(size) for key, size in layout.resized.items()},
        }
    described = {**info, "name": name, "version": version, "fileFormat": "array_record"}
    described["splits"] = [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split,
            "numBytes": str(sum(shard["bytes"] for shard in entry["shards"])),
            "shardLengths": [str(shard["records"]) for shard in entry["shards"]],
        }
        for split, entry in splits.items()
    ]
    stored = _stored_features(tree, layout)
    for file, value in (("dataset_info", described), ("features", stored), ("manifest", manifest)):
        write_text(dataset / f"{file}.json", json.dumps(value, indent=1))
    return manifest


def _described(key: str, feature: Feature, layout: Layout) -> dict[str, Any]:
    """Entry of `step_features`: how a key is stored."""
    if key in layout.encoded:
        feature, _ = layout.encoded[key]
    described: dict[str, Any] = {
        "shape": None if feature.shape is None else list(feature.shape),
        "dtype": feature.dtype,
        "image": feature.image,
        "column": key in layout.columns,
    }
    if feature.encoding != "none":
        described["encoding"] = feature.encoding
    return described


def _stored_features(tree: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The feature tree of the records: with a chunk's position in its episode, and pixels as PNG."""
    scalar = {
        "pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
        "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
    }
    chunk = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"first_step": scalar, "episode_steps": scalar}},
    }
    images = {STEPS + key: (feature.shape or (), encoding) for key, (feature, encoding) in layout.encoded.items()}
    stored = as_images(dict(tree), images)
    top = stored["featuresDict"]
    return stored | {"featuresDict": top | {"features": top["features"] | {"chunk": chunk}}}
