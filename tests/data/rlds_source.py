"""Writes small RLDS datasets with TFDS's serializer and TensorFlow's or ArrayRecord's writer, for tests."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAMERAS = {"exterior": (24, 32, "jpeg"), "wrist": (16, 16, "png")}


def features() -> Any:
    """DROID-like: nested action_dict of float64, a JPEG and a PNG camera, ragged and wide step features."""
    import tensorflow_datasets as tfds

    f = tfds.features
    observation = {
        name: f.Image(shape=(h, w, 3), dtype=np.uint8, encoding_format=encoding)
        for name, (h, w, encoding) in CAMERAS.items()
    }
    observation |= {"state": f.Tensor(shape=(3,), dtype=np.float32), "gripper": f.Tensor(shape=(1,), dtype=np.float64)}
    step = {
        "observation": f.FeaturesDict(observation),
        "action": f.Tensor(shape=(7,), dtype=np.float64),
        "action_dict": f.FeaturesDict(
            {
                "cartesian_velocity": f.Tensor(shape=(6,), dtype=np.float64),
                "gripper_position": f.Tensor(shape=(1,), dtype=np.float64),
            }
        ),
        "tokens": f.Sequence(np.int64),
        "embedding": f.Tensor(shape=(300,), dtype=np.float32),
        "language_instruction": f.Text(),
        "counter": f.Scalar(dtype=np.int64),
        "reward": f.Scalar(dtype=np.float32),
        "is_first": f.Scalar(dtype=np.bool_),
        "is_last": f.Scalar(dtype=np.bool_),
        "is_terminal": f.Scalar(dtype=np.bool_),
    }
    return f.FeaturesDict(
        {
            "steps": f.Dataset(step),
            "episode_metadata": f.FeaturesDict(
                {"file_path": f.Text(), "recording_folderpath": f.Text(), "seed": f.Scalar(dtype=np.int64)}
            ),
        }
    )


def make_episodes(lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Episodes as nested Python values; images are encoded bytes under `observation`."""
    rng = np.random.default_rng(seed)
    return [_episode(rng, number, length) for number, length in enumerate(lengths)]


def _episode(rng: np.random.Generator, number: int, length: int) -> dict[str, Any]:
    steps = []
    for t in range(length):
        observation: dict[str, Any] = {
            name: encode(rng, h, w, encoding, number, t) for name, (h, w, encoding) in CAMERAS.items()
        }
        observation["state"] = np.array([number, t, rng.normal()], np.float32)
        observation["gripper"] = rng.uniform(size=1)
        steps.append(
            {
                "observation": observation,
                "action": np.concatenate([rng.normal(size=6), [0.5]]),  # the last dimension is constant
                "action_dict": {
                    "cartesian_velocity": rng.uniform(-1, 1, 6),
                    "gripper_position": rng.uniform(size=1),
                },
                "tokens": [-number, t, 1 << 40][: t % 4],
                "embedding": np.full(300, number + t / 64, np.float32),
                "language_instruction": f"do thing {number}",
                "counter": -t,
                "reward": float(t),
                "is_first": t == 0,
                "is_last": False,  # as in the Bridge data
                "is_terminal": False,
            }
        )
    return {"steps": steps, "episode_metadata": {**paths_of(f"/robot/{number}"), "seed": number}}


def paths_of(folder: str) -> dict[str, str]:
    """An episode's paths under the names that DROID has for them."""
    return {"file_path": f"{folder}/trajectory.h5", "recording_folderpath": f"{folder}/recordings/MP4"}


def encode(rng: np.random.Generator, height: int, width: int, encoding: str, number: int, t: int) -> bytes:
    """A smooth image whose colours tell the episode and the step."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = number * 20 % 256
    image[..., 1] = t * 6 % 256
    image[..., 2] = np.linspace(0, 200, width).astype(np.uint8) + rng.integers(0, 40)
    out = io.BytesIO()
    Image.fromarray(image).save(out, encoding, **({"quality": 95} if encoding == "jpeg" else {}))
    return out.getvalue()


def serialize(tree: Any, episode: dict[str, Any]) -> bytes:
    """The record that TFDS would write."""
    from tensorflow_datasets.core import example_serializer

    steps = [
        step
        | {"observation": {k: io.BytesIO(v) if isinstance(v, bytes) else v for k, v in step["observation"].items()}}
        for step in episode["steps"]
    ]
    serializer = example_serializer.ExampleSerializer(tree.get_serialized_info())
    return serializer.serialize_example(tree.encode_example(episode | {"steps": steps}))


def write(path: Path, splits: dict[str, list[list[bytes]]], tree: Any, file_format: str = "tfrecord") -> None:
    """Writes serialized episodes, {split: [records of each shard]}, and the two JSON files."""
    path.mkdir(parents=True)
    info: dict[str, Any] = {"name": "toy", "version": "1.0.0", "fileFormat": file_format, "splits": []}
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            file = path / f"toy-{split}.{file_format}-{i:05d}-of-{len(shards):05d}"
            _write_shard(file, shard, file_format)
        info["splits"].append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(len(r) for s in shards for r in s)),
                "shardLengths": [str(len(s)) for s in shards],
            }
        )
    (path / "dataset_info.json").write_text(json.dumps(info))
    tree.save_config(str(path))


def write_column(dataset: Path, key: str, values: np.ndarray, split: str = "train") -> None:
    """Puts other values into a column of a training dataset, as if it had been made with them."""
    from uwm_jax.data.records import column_file

    np.save(dataset / column_file(split, key), values)
    _update_checksum(dataset, split, column_file(split, key))


def write_index(dataset: Path, split: str = "train", **first: list[int]) -> None:
    """Puts other values at the beginning of arrays of the index, as if the dataset had been made with them."""
    file = dataset / "index" / f"{split}.npz"
    with np.load(file) as stored:
        arrays = dict(stored)
    for name, values in first.items():
        arrays[name][: len(values)] = values
    np.savez(file, **arrays)
    _update_checksum(dataset, split, f"index/{split}.npz")


def _update_checksum(dataset: Path, split: str, name: str) -> None:
    from uwm_jax.data.records import checksum

    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["splits"][split]["files"][name]["crc32c"] = checksum(dataset / name)
    (dataset / "manifest.json").write_text(json.dumps(manifest))


def _write_shard(file: Path, shard: list[bytes], file_format: str) -> None:
    if file_format == "tfrecord":
        writer = importlib.import_module("tensorflow").io.TFRecordWriter(str(file))
    else:
        module = importlib.import_module("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(file), "group_size:1")
    for record in shard:
        writer.write(record)
    writer.close()


def make(
    path: Path, lengths: list[int], seed: int = 0, file_format: str = "tfrecord", folders: list[str] | None = None
) -> list[dict[str, Any]]:
    """Writes one `train` split in two shards; returns its episodes in stored order. `folders` are where they lay."""
    tree, episodes = features(), make_episodes(lengths, seed)
    for episode, folder in zip(episodes, folders or [], strict=False):
        episode["episode_metadata"] |= paths_of(folder)
    serialized = [serialize(tree, e) for e in episodes]
    half = (len(serialized) + 1) // 2
    write(path, {"train": [serialized[:half], serialized[half:]]}, tree, file_format)
    return episodes
