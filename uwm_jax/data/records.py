"""The training layout on disk, and random access to it.

A dataset directory is a TFDS-readable RLDS dataset in ArrayRecord (`dataset_info.json`,
`features.json`, shards with one record per group) whose records are chunks of up to `chunk_steps`
consecutive steps of one episode, encoded images untouched. The directory also holds

- `manifest.json`: format version, source, keys with shapes and dtypes, reasons why keys are neither camera nor column
  (`unusable_keys`), camera sizes, and per split the counts, skipped episodes, the shards with size, sha256 and crc32c,
  and the crc32c of every index and column file; where there are any, also `missing_files` of the source and `remarks`
  on kept episodes, `left_out_splits` without a usable episode, and `resize` if images were resized;
- `index/<split>.npz`: `episode_length` (E,), `episode_first_chunk` (E,), `chunk_shard` (K,),
  `chunk_record` (K,), all int64, and `chunk_crc32c` (K,) uint32 of the record, chunks of an episode being consecutive;
  `chunk_offset` and `chunk_bytes` (K,) int64, where its record lies in the file (`direct.RecordPlace`), so that a range
  of a bucket's object is read without the file's own table; datasets of older versions lack these two;
- `index/<split>.texts.npz`: for every episode-level string, such as the path of the recording, `<key>/utf8` (bytes of
  all episodes, concatenated) and `<key>/ends` (E,) int64, so that episodes are selected without reading a record;
- `columns/<split>/<key>.npy`: every numeric step key of at most `COLUMN_MAX_SIZE` values, (steps, ...)
  in episode order, float32 or int64, so that actions and statistics need no record;
- `codec/pca.npz` and `stats.json`, which `data_prep` derives from the above, and `derived_stats/`, a cache of
  what `uwm_jax.data.stats` computes.

The fingerprint of the manifest identifies all of these: index, strings and columns are verified by their crc32c when
they are opened, each record whenever it is read, and derived files hold the fingerprint and a digest of their own
content.

A window then costs a few reads of whole records, a scan of their wire format, and the decoding of
only the frames that it uses.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import operator
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg
from PIL import Image

from uwm_jax.data import example
from uwm_jax.data.columns import Column, WrongChecksum, open_column
from uwm_jax.data.faults import BadRecord
from uwm_jax.data.index import Chunk, Index
from uwm_jax.data.manifest import check_manifest
from uwm_jax.data.shards import Shards
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, as_place, is_remote, stated_checksum
from uwm_jax.reading import again, read_json

FORMAT = "uwm_jax/chunks"
FORMAT_VERSION = 2
COLUMN_MAX_SIZE = 256

COLUMNS_IN_MEMORY = 1 << 31  # bytes of a split's used columns in memory; further columns stay on disk

_BLOCK = 1 << 22
_offset = operator.itemgetter(0)


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Identifies a dataset's content, independent of its source: sha256 of its manifest, which holds the sha256 of
    every shard."""
    content = {k: v for k, v in manifest.items() if k != "source"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def short_key(key: str) -> str:
    """A step key without the leading `observation/`, as derived files (`codec/pca.npz`) name cameras."""
    return key.removeprefix("observation/")


def column_file(split: str, key: str) -> str:
    """File of a column, relative to the dataset directory."""
    return f"columns/{split}/{key.replace('/', '.')}.npy"


def index_file(split: str) -> str:
    """File of the episode index, relative to the dataset directory."""
    return f"index/{split}.npz"


def text_file(split: str) -> str:
    """File of the episodes' strings, relative to the dataset directory."""
    return f"index/{split}.texts.npz"


def checksum(file: AnyPath) -> int:
    """CRC-32C of a file, read a piece at a time (about 1 GB/s from memory); of an object as its bucket states it."""
    if (stated := stated_checksum(file)) is not None:
        return stated
    crc = 0
    with as_place(file).open("rb") as f:
        while block := f.read(_BLOCK):
            crc = google_crc32c.extend(crc, block)
    return crc


def read_manifest(path: AnyPath) -> dict[str, Any]:
    """The checked manifest of a dataset directory.

    Raises:
        UserError: there is none, or it has another format.
    """
    file = as_place(path) / "manifest.json"
    if not file.exists():
        if (as_place(path) / "dataset_info.json").exists():
            hint = f"This is a plain TFDS dataset: run `python -m data_prep.reshard --input={path} --output=DIR`."
        else:
            into, demo, bring = path, "", ""
            if is_remote(path):  # which those jobs do not write to
                into, demo = "DIR", " --output=DIR"
                bring = f", and bring it there by `python -m data_prep.copy --input=DIR --output={path}`"
            hint = (
                f"Make it with `python -m data_prep.reshard --input=RLDS_DIR --output={into}`, or the demonstration "
                f"data `pusht` with `python -m data_prep.demo{demo}`{bring}. A config's relative path is looked up "
                f"under $UWM_DATA_DIR, which is {os.environ.get('UWM_DATA_DIR', 'not set (default data/)')}. If a "
                "run's dataset has moved, name its new place with --config.data.path=DIR (for a source: "
                "--config.data.sources.NAME.path=DIR)."
            )
        raise UserError(f"{path}: no training dataset here (no manifest.json). {hint}")
    manifest = read_json(file)
    found = (manifest.get("format"), manifest.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{file}: expected format {(FORMAT, FORMAT_VERSION)}, found {found}: another version of uwm_jax made this "
            f"dataset. Make it again with `python -m data_prep.reshard --input=RLDS_DIR --output={path} --overwrite`, "
            "or with `python -m data_prep.demo` if it is the demonstration data."
        )
    check_manifest(manifest, file)
    return manifest


@dataclasses.dataclass(frozen=True)
class ChunkRef:
    """The location of a step: the shard's file name, the record in it, and the step's offset in the record."""

    shard: str
    record: int
    offset: int


class Dataset:
    """One split of a dataset directory, opened for random access; safe to use from many threads.

    Args:
        path: of the directory.
        split: its name.
        read_timeout: seconds that a read of a record may take before it is tried again; 0 for any time.
        bear: whether a missing or damaged shard is no error, but each of its records is bad when it is read.
    Raises:
        UserError: manifest, index or shards are missing, damaged or do not fit each other.

    Attributes:
        directory, split, manifest, fingerprint.
        is_remote: whether it lies in a bucket, where a read takes a round trip.
        episode_lengths: (E,) int64.
        episode_starts: (E,) int64, where an episode begins in the columns.
        cameras: step key -> (height, width) of the 3-channel uint8 image features.
        lost_shards: file name -> what is wrong with it, of missing or damaged shards.
    """

    def __init__(self, path: AnyPath, split: str = "train", *, read_timeout: float = 0.0, bear: bool = False):
        self.directory = as_place(path)
        self.is_remote = is_remote(path)
        self.split = split
        self._read_timeout = read_timeout
        self.manifest = read_manifest(path)
        self.fingerprint = fingerprint(self.manifest)
        if split not in self.manifest["splits"]:
            raise UserError(
                f"{self.directory}: no split {split!r}; it has {', '.join(sorted(self.manifest['splits']))}."
            )
        info = self.manifest["splits"][split]
        self._checksums = {name: entry["crc32c"] for name, entry in info["files"].items()}
        self.chunk_steps = int(self.manifest["chunk_steps"])
        self.cameras = {k: (c["height"], c["width"]) for k, c in self.manifest["cameras"].items()}
        self._shards = Shards(self.directory, info["shards"], self.fingerprint[:12], timeout=read_timeout, bear=bear)
        self.lost_shards = self._shards.lost
        self._index = self._open_index(info)
        self.episode_lengths = self._index.episode_length
        self.episode_starts = np.concatenate([[0], np.cumsum(self.episode_lengths)[:-1]]).astype(np.int64)
        self._columns: dict[str, Column] = {}
        self._names = {camera: f"steps/{camera}".encode() for camera in self.cameras}
        self._lock = threading.Lock()

    @property
    def flip(self) -> str:
        """How its pictures were turned upright when it was made: "rows", "180", or "" for not at all."""
        return str(self.manifest.get("robot", {}).get("flip", "none")).replace("none", "")

    @property
    def num_episodes(self) -> int:
        return len(self.episode_lengths)

    @property
    def column_keys(self) -> list[str]:
        """Step keys that have a column, sorted."""
        return sorted(k for k, f in self.manifest["step_features"].items() if f["column"])

    @functools.cached_property
    def action_lengths(self) -> np.ndarray:
        """(E,) int64, the number of steps of each episode with an action: all except last steps that `is_last` marks,
        whose action RLDS leaves undefined."""
        if "is_last" not in self.column_keys:
            return self.episode_lengths
        ends = self.episode_starts + self.episode_lengths - 1
        marked = self.column("is_last", keep=False)[ends].reshape(len(ends), -1)
        return self.episode_lengths - (marked != 0).any(axis=1)

    def camera_key(self, name: str) -> str:
        """Step key of a camera, named in full or without the leading `observation/`."""
        return self._resolve(name, self.cameras, "camera")

    def column_key(self, name: str) -> str:
        """Step key of a low-dimensional observation, named in full or without `observation/`."""
        return self._resolve(name, self.column_keys, "low-dimensional key")

    def float_key(self, name: str) -> str:
        """Step key of a vector of floats of any size (for example a text embedding)."""
        return self._resolve(name, self._float_keys, "step key for config.data.text, which is a vector of floats,")

    def has_float_key(self, name: str) -> bool:
        """Whether there is such a step key."""
        return not {name, f"observation/{name}"}.isdisjoint(self._float_keys)

    @property
    def _float_keys(self) -> list[str]:
        features = self.manifest["step_features"].items()
        return [
            k
            for k, f in features
            if f["dtype"].startswith(("float", "bfloat"))
            if not f["image"] and f["shape"] is not None and min(f["shape"], default=1) > 0
        ]

    def text_keys(self) -> list[str]:
        """Episode-level keys of strings, in full, sorted."""
        return sorted(self._read_texts(""))

    def episode_texts(self, key: str) -> list[str]:
        """The string of every episode under an episode-level key, named in full (for example
        `episode_metadata/file_path`) or without `episode_metadata/`.

        Raises:
            UserError: the dataset has no such string.
        """
        found = self._read_texts(key)
        key = f"episode_metadata/{key}" if f"episode_metadata/{key}" in found else key
        if key not in found:
            raise UserError(f"{self.directory}: no episode text {key!r}; it has: {', '.join(sorted(found)) or 'none'}.")
        data, ends = found[key]
        if len(ends) != self.num_episodes:
            raise UserError(
                f"{self.directory / text_file(self.split)}: expected texts of {self.num_episodes} episodes, found "
                f"{len(ends)}. Make the dataset again."
            )
        return [data[a:b].decode(errors="replace") for a, b in itertools.pairwise([0, *ends])]

    def _read_texts(self, name: str) -> dict[str, tuple[bytes, list[int]]]:
        """{episode-level key of strings: their UTF-8 and where each ends}, of keys other than `name` without values."""
        file = self.directory / text_file(self.split)
        try:
            with np.load(io.BytesIO(self._read_file(text_file(self.split))), allow_pickle=False) as stored:
                keys = [k.removesuffix("/ends") for k in stored if k.endswith("/ends")]
                return {
                    key: (stored[f"{key}/utf8"].tobytes(), stored[f"{key}/ends"].tolist())
                    if key in (name, f"episode_metadata/{name}")
                    else (b"", [])
                    for key in keys
                }
        except (OSError, KeyError, ValueError) as e:
            raise UserError(f"{file}: the episodes' texts cannot be read ({e}). Make the dataset again.") from e

    def step_shape(self, key: str) -> tuple[int, ...]:
        """Shape of one step of a step key."""
        return tuple(self.manifest["step_features"][key]["shape"])

    def column(self, key: str, keep: bool = True) -> Column:
        """Values of all steps, (steps, ...) float32 or int64: a read-only array as long as the split's used columns
        fit into `COLUMNS_IN_MEMORY`, else a column on disk.

        Args:
            keep: whether it stays for the next call; not where it is read once, such as to choose episodes.
        Raises:
            UserError: there is no such column, or its file is damaged.
        """
        if (column := self._columns.get(key)) is not None:
            return column
        key = self._resolve(key, self.column_keys, "column")
        with self._lock:
            column = self._columns.get(key)
            if column is None:
                column = self._load_column(key)
            if keep:
                self._columns[key] = column
            return column

    @property
    def column_bytes(self) -> int:
        """Memory of the columns that stay."""
        return sum(column.nbytes for column in self._columns.values() if isinstance(column, np.ndarray))

    def locate(self, episode: int, step: int) -> ChunkRef:
        """The location of a step of an episode."""
        chunk, offset = divmod(step, self.chunk_steps)
        chunk += int(self._index.episode_first_chunk[episode])
        shard = self._shards.names[self._index.chunk_shard[chunk]]
        return ChunkRef(shard, int(self._index.chunk_record[chunk]), offset)

    def record(self, episode: int, chunk: int) -> bytes:
        """The serialized `tf.Example` with steps [chunk * chunk_steps, ...) of an episode."""
        return self._shards.read(self._chunk(episode, chunk))

    def view(self, episode: int, chunk: int) -> memoryview:
        """The same, in memory of this thread that its next call of this uses again."""
        return self._shards.view(self._chunk(episode, chunk))

    def begin(self, episode: int, steps: Iterable[int]) -> None:
        """Starts to read the records with these steps of an episode, where that saves time: from a bucket. Each call
        is for one of `frames` or `values` with the same steps."""
        for chunk in sorted({step // self.chunk_steps for step in steps}):
            self._shards.begin(self._chunk(episode, chunk))

    def _chunk(self, episode: int, chunk: int) -> Chunk:
        return self._index.chunk(int(self._index.episode_first_chunk[episode]) + chunk)

    def record_name(self, episode: int, chunk: int) -> str:
        """The name of that record, as bad ones are counted."""
        row = int(self._index.episode_first_chunk[episode]) + chunk
        return self._shards.name(int(self._index.chunk_shard[row]), int(self._index.chunk_record[row]))

    def frames(
        self, episode: int, steps: Mapping[str, Sequence[int]], into: Mapping[str, Sequence[np.ndarray] | np.ndarray]
    ) -> None:
        """Decodes frames of an episode.

        Args:
            episode: its number in the split.
            steps: camera key -> steps wanted; each record that holds any of them is read once.
            into: camera key -> for each step, the (H, W, 3) uint8 C-contiguous array that receives the frame
                (or one array of them all).
        """
        wanted: dict[int, dict[str, list[tuple[int, np.ndarray]]]] = {}
        for camera, indices in steps.items():
            for step, out in zip(indices, into[camera], strict=True):
                chunk, offset = divmod(step, self.chunk_steps)
                wanted.setdefault(chunk, {}).setdefault(camera, []).append((offset, out))
        for chunk, cameras in wanted.items():
            record = self.view(episode, chunk)  # slices of a view are not copied; a record has about a megabyte
            names = {self._names[camera]: frames for camera, frames in cameras.items()}
            try:
                fields = example.scan(record, names)
                for name, frames in names.items():
                    spans = example.bytes_spans(record, fields[name], max(frames, key=_offset)[0] + 1)
                    for offset, out in frames:
                        start, stop = spans[offset]
                        decode_image(record[start:stop], out)
            except (ValueError, KeyError, IndexError, OSError) as e:
                ref = self.locate(episode, chunk * self.chunk_steps)
                raise BadRecord(
                    f"{self.directory / ref.shard}: record {ref.record} (episode {episode}, steps from "
                    f"{chunk * self.chunk_steps}): {', '.join(cameras)}: {e!s}. The record does not match "
                    "manifest.json: make the dataset again.",
                    self.record_name(episode, chunk),
                ) from e

    def values(self, episode: int, step: int, key: str) -> np.ndarray:
        """The floats of a step key at one step, (size,) float32, read from the record."""
        chunk, offset = divmod(step, self.chunk_steps)
        record = self.record(episode, chunk)
        name = b"steps/" + key.encode()
        feature, shape = self.manifest["step_features"][key], self.step_shape(key)
        size = math.prod(shape)
        try:
            field = example.scan(record, {name})[name]
            if encoding := feature.get("encoding"):
                data = record[slice(*example.bytes_spans(record, field, offset + 1)[offset])]
                return example.decode_tensor(data, encoding, feature["dtype"], shape).reshape(-1).astype(np.float32)
            values = example.floats(record, field)[offset * size : (offset + 1) * size]
            if len(values) < size:
                raise IndexError(f"{len(values)} of {size} numbers")
        except (KeyError, IndexError, ValueError) as e:
            ref = self.locate(episode, step)
            raise BadRecord(
                f"{self.directory / ref.shard}: record {ref.record} has no value of {key!r} at step {step} ({e}).",
                self.record_name(episode, chunk),
            ) from e
        return values

    def close(self) -> None:
        """Closes the open shards; a later read opens them again."""
        self._shards.close()

    def _resolve(self, name: str, keys: Any, what: str) -> str:
        for key in (f"observation/{name}", name):
            if key in keys:
                return key
        unusable, features = self.manifest.get("unusable_keys", {}), self.manifest["step_features"]
        found = f"observation/{name}" if f"observation/{name}" in features else name
        reason = unusable.get(found, "")
        if not reason and found in features:
            reason = f"it holds {features[found]['dtype']} of shape {features[found]['shape']}"
        raise UserError(
            f"{self.directory}: no {what} {name!r}; it has: {', '.join(sorted(keys)) or 'none'}."
            + (f" {name!r} exists, but cannot be used so: {reason}." if reason else "")
        )

    def _open_index(self, info: dict[str, Any]) -> Index:
        name = index_file(self.split)
        try:
            return Index(self.directory / name, self._checksums.get(name), info, self.chunk_steps)
        except WrongChecksum as e:
            raise self._wrong_checksum(name) from e

    def _load_column(self, key: str) -> Column:
        name = column_file(self.split, key)
        file = self.directory / name
        try:
            in_memory = self.column_bytes + file.stat().st_size <= COLUMNS_IN_MEMORY
            own = f"{self.fingerprint[:12]}/{name}"
            column = again(
                lambda: open_column(file, self._checksums[name], own, in_memory=in_memory, timeout=self._read_timeout),
                file,
            )
        except WrongChecksum as e:
            raise self._wrong_checksum(name) from e
        except (OSError, KeyError, ValueError) as e:
            raise UserError(f"{file}: the column cannot be read ({e}). Make the dataset again.") from e
        expected = (int(self.episode_lengths.sum()), *self.step_shape(key))
        if column.shape != expected:
            raise UserError(f"{file}: expected shape {expected}, found {column.shape}. Make the dataset again.")
        return column

    def _read_file(self, name: str) -> bytes:
        """The bytes of an index file, verified: a file of another dataset might have the same size."""
        try:
            data = again((self.directory / name).read_bytes, self.directory / name)
        except OSError as e:
            raise UserError(f"{self.directory / name} cannot be read ({e}). Copy it again.") from e
        if google_crc32c.value(data) != self._checksums.get(name):
            raise self._wrong_checksum(name)
        return data

    def _wrong_checksum(self, name: str) -> UserError:
        return UserError(
            f"{self.directory / name}: its checksum is not that of manifest.json, so it is damaged or belongs to "
            "another dataset. Copy it again, or make the dataset again."
        )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Dataset holds open files; open it again from its path")


def image_size(data: bytes | memoryview) -> tuple[int, int, int]:
    """(height, width, channels) from the header of an encoded image.

    Raises:
        ValueError: neither JPEG nor an image that Pillow reads.
    """
    if data[:2] == b"\xff\xd8":
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        return height, width, 1 if space == "Gray" else 3
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width, len(image.getbands())
    except OSError as e:
        raise ValueError(str(e)) from e


def decode_image(data: bytes | memoryview, out: np.ndarray) -> None:
    """Decodes a JPEG or PNG into `out`, (H, W, 3) uint8 RGB.

    Raises:
        ValueError, OSError: a damaged image, or one of another size.
    """
    if data[:2] == b"\xff\xd8":
        shape = simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape
    else:
        with Image.open(io.BytesIO(data)) as opened:
            image = np.asarray(opened.convert("RGB"))
        shape = image.shape
        if shape == out.shape:
            out[...] = image
    if shape != out.shape:
        raise ValueError(f"expected an image of shape {out.shape}, found {shape}")
