"""The data that `data_prep.benchmark` makes: one set of episodes as RLDS, in the training layout, and as official zarr.

Episodes look as DROID's do: three cameras at 180x320, JPEG files of about 20 kB, 7 numbers of action. The pictures are
textures that a camera moves over, with the noise of a sensor, because the size of a JPEG file decides what decoding it
costs, and how well a picture compresses what zarr's costs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from data_prep.conversion.training_layout import reshard
from data_prep.sources.source_files import masked_crc
from uwm_jax.data.episodes import encode_jpeg, feature_tree, serialize_episode
from uwm_jax.data.features import Feature
from uwm_jax.data.records import checksum, column_file, index_file, read_manifest, text_file
from uwm_jax.errors import UserError

CAMERAS = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
SIZE = (180, 320)
NUMBERS = {
    "steps/action": 7,
    "steps/observation/cartesian_position": 6,
    "steps/observation/gripper_position": 1,
}
FEATURES = {
    **{f"steps/observation/{camera}": Feature((*SIZE, 3), "uint8", image=True) for camera in CAMERAS},
    **{key: Feature((width,), "float32") for key, width in NUMBERS.items()},
    "steps/is_last": Feature((), "bool"),
    "episode_metadata/file_path": Feature((), "string"),
}
ZARR_CHUNK = 2_000_000  # bytes of a chunk of numbers in the official layout
_QUALITY = 95
_SHARDS = 2  # of the RLDS


@dataclasses.dataclass(frozen=True)
class Made:
    """Where the data lie.

    Attributes:
        rlds, dataset, zarr: directories of the three layouts.
        records: (file, offset, bytes) of each episode's record in the RLDS.
        episodes, steps: their number, and the steps of each.
    """

    rlds: Path
    dataset: Path
    zarr: Path
    records: list[tuple[Path, int, int]]
    episodes: int
    steps: int

    def bytes(self) -> dict[str, int]:
        """Disk that each layout's episodes take, without what is derived of them."""
        derived = {self.dataset / "codec", self.dataset / "stats.json", self.dataset / "derived_stats"}
        return {
            "rlds": size_of(self.rlds),
            "training_layout": size_of(self.dataset) - sum(size_of(path) for path in derived),
            "official_zarr": size_of(self.zarr),
        }


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def make(directory: Path, episodes: int, steps: int, *, seed: int = 0) -> Made:
    """Makes the data in an empty directory.

    Raises:
        UserError: the zarr package is missing.
    """
    zarr = _Zarr(directory / "zarr", episodes * steps)
    rlds, records = directory / "rlds", []
    rlds.mkdir()
    names = [f"loader-train.tfrecord-{i:05d}-of-{_SHARDS:05d}" for i in range(_SHARDS)]
    counts = [len(part) for part in np.array_split(np.arange(episodes), _SHARDS)]
    first_of = dict(zip(np.cumsum([0, *counts[:-1]]).tolist(), names, strict=True))
    path = rlds / names[0]
    for number, (values, images) in enumerate(
        tqdm(_episodes(episodes, steps, seed), total=episodes, desc="making episodes", unit="episode")
    ):
        path = rlds / first_of.get(number, path.name)
        record = serialize_episode(FEATURES, values)
        header = struct.pack("<Q", len(record))
        with path.open("ab") as file:
            file.write(header + struct.pack("<I", masked_crc(header)))
            records.append((path, file.tell(), len(record)))
            file.write(record + struct.pack("<I", masked_crc(record)))
        zarr.append(values, images)
    split = {"name": "train", "shardLengths": [str(count) for count in counts]}
    info = {"name": "loader", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (rlds / "dataset_info.json").write_text(json.dumps(info))
    (rlds / "features.json").write_text(json.dumps(feature_tree(FEATURES)))
    reshard(rlds, directory / "dataset", workers=1, pca_channels=1)
    return Made(rlds, directory / "dataset", zarr.path, records, episodes, steps)


def _episodes(count: int, steps: int, seed: int) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """(values of FEATURES, {camera: (T, H, W, 3) uint8, the JPEG files decoded}) of each episode."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        values: dict[str, Any] = {
            f"steps/observation/{camera}": [encode_jpeg(image, _QUALITY) for image in _pictures(rng, steps)]
            for camera in CAMERAS
        }
        # The official conversion has the files alone too.
        images = {
            camera: np.stack([simplejpeg.decode_jpeg(data, "RGB") for data in values[f"steps/observation/{camera}"]])
            for camera in CAMERAS
        }
        for key, width in NUMBERS.items():
            values[key] = np.cumsum(rng.normal(size=(steps, width)), axis=0).astype(np.float32)
        values["steps/is_last"] = np.arange(steps) == steps - 1
        values["episode_metadata/file_path"] = f"/episodes/{number}/trajectory.h5"
        yield values, images


def _pictures(rng: np.random.Generator, steps: int) -> np.ndarray:
    """(T, H, W, 3) uint8: a view that wanders over a texture, overexposed here and there, with noise.

    A frame of the DROID clip that this was fitted to has 18 to 26 kB as JPEG of this quality, and lz4 stores it decoded
    in 0.75 to 0.92 of its bytes; one of these has 22 kB and 0.89.
    """
    height, width = SIZE[0] + 64, SIZE[1] + 64
    texture = np.full((height, width, 3), 168.0, np.float32)
    for cell, strength, colours in ((128, 160.0, 1), (64, 40.0, 3), (16, 25.0, 3), (4, 16.0, 3)):
        grid = rng.integers(0, 256, (height // cell + 2, width // cell + 2, colours), dtype=np.uint8)
        grid = np.broadcast_to(grid, (*grid.shape[:2], 3))
        smooth = Image.fromarray(np.ascontiguousarray(grid)).resize((width, height), Image.Resampling.BICUBIC)
        texture += (np.asarray(smooth, np.float32) / 127.5 - 1) * strength
    noise = rng.normal(0, 4.0, (height, width, 3)).astype(np.float32)
    walk = np.clip(32 + np.cumsum(rng.normal(0, 1.5, (steps, 2)), axis=0), 0, 64).astype(int)
    frames = np.empty((steps, *SIZE, 3), np.uint8)
    for frame, (top, left), (y, x) in zip(frames, walk, rng.integers(0, 65, (steps, 2)), strict=True):
        seen = texture[top : top + SIZE[0], left : left + SIZE[1]] + noise[y : y + SIZE[0], x : x + SIZE[1]]
        frame[...] = np.clip(seen, 0, 255)
    return frames


class _Zarr:
    """The official layout: a DirectoryStore of zarr 2 with one image a chunk, Blosc's lz4 at level 5 without shuffle,
    and numbers in chunks of about 2 MB at level 0."""

    def __init__(self, path: Path, steps: int):
        try:
            import numcodecs
            import zarr
        except ImportError as e:
            raise UserError(
                "data_prep.benchmark compares with the official layout, for which it needs zarr 2: "
                "pip install 'uwm-jax[benchmark]'."
            ) from e
        self.path, self._at = path, 0
        root = zarr.group(zarr.DirectoryStore(str(path)))
        self._arrays: dict[str, Any] = {}
        no_shuffle = numcodecs.Blosc.NOSHUFFLE
        for key in (*(f"steps/observation/{camera}" for camera in CAMERAS), *NUMBERS):
            feature = FEATURES[key]
            assert feature.shape is not None
            row = int(np.prod(feature.shape)) * np.dtype(feature.dtype).itemsize
            # A chunk of numbers is whole, however few steps there are: in a corpus all are.
            rows, level = (1, 5) if feature.image else (max(1, ZARR_CHUNK // row), 0)
            self._arrays[key] = root.create_dataset(
                key.rpartition("/")[2],
                shape=(steps, *feature.shape),
                chunks=(rows, *feature.shape),
                dtype=feature.dtype,
                compressor=numcodecs.Blosc("lz4", clevel=level, shuffle=no_shuffle),
            )

    def append(self, values: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> None:
        """Adds an episode."""
        stop = self._at + len(values["steps/action"])
        for key, array in self._arrays.items():
            camera = key.rpartition("/")[2]
            array[self._at : stop] = images[camera] if camera in images else values[key]
        self._at = stop


def repeated(dataset: Path, directory: Path, windows: int, span: int) -> Path:
    """A training dataset of at least so many windows of `span` steps: the episodes of another one over and over, whose
    shards are linked to under new names.

    Returns:
        `directory`.
    """
    manifest = read_manifest(dataset)
    info = manifest["splits"]["train"]
    with np.load(dataset / index_file("train")) as stored:
        index = dict(stored)
    each = int(np.maximum(index["episode_length"] - span + 1, 0).sum())
    copies = -(-windows // each)
    directory.mkdir()
    shards = []
    for copy in range(copies):
        for number, shard in enumerate(info["shards"]):
            name = f"loader-train.array_record-{copy * len(info['shards']) + number:05d}-of-{copies:05d}"
            os.link(dataset / shard["file"], directory / name)
            shards.append(shard | {"file": name})
    tiled: dict[str, Any] = {name: np.tile(values, copies) for name, values in index.items()}
    chunks, shards_each = len(index["chunk_shard"]), len(info["shards"])
    tiled["chunk_shard"] += np.repeat(np.arange(copies) * shards_each, chunks)
    tiled["episode_first_chunk"] += np.repeat(np.arange(copies) * chunks, len(index["episode_length"]))
    (directory / "index").mkdir()
    np.savez(directory / index_file("train"), **tiled)
    with np.load(dataset / text_file("train")) as stored:
        texts: dict[str, Any] = dict(stored)
    for name, values in texts.items():
        tail = np.tile(values, copies)
        if name.endswith("/ends"):
            tail += np.repeat(np.arange(copies) * int(values[-1]), len(values))
        texts[name] = tail
    np.savez(directory / text_file("train"), **texts)
    for key, feature in manifest["step_features"].items():
        if feature["column"]:
            file = directory / column_file("train", key)
            file.parent.mkdir(parents=True, exist_ok=True)
            column = np.load(dataset / column_file("train", key))
            np.save(file, np.tile(column, (copies, *(1,) * (column.ndim - 1))))
    files = {name: {"crc32c": checksum(directory / name)} for name in info["files"]}
    grown = {field: info[field] * copies for field in ("episodes", "steps", "chunks")}
    manifest["splits"] = {"train": info | grown | {"shards": shards, "files": files}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory
