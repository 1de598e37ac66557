"""Keeps the episodes of a stepwise server as a dataset in the training layout (`--record=DIR`).

Every step is recorded as the model was shown it, after renaming and resizing, with the action that the robot was told.
An episode joins the dataset when it ends, at once and completely: a folder next to it, whose shards are links to those
that are there, takes its place. So what is opened is whole, while more is recorded; a reader sees later episodes when
it opens the dataset again.

Cameras and low-dimensional keys are under `observation/`; actions are under the keys that the model's data has for
them, so that the run's config reads the recording as it is. Frames are stored as JPEG. `is_last` marks the last step.
"""

from __future__ import annotations

import datetime
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from uwm_jax.data import records
from uwm_jax.data.chunks import Layout, cut_episode, plan_layout
from uwm_jax.data.episodes import JPEG_QUALITY, encode_jpeg, feature_tree, serialize_episode
from uwm_jax.data.features import STEPS, Feature
from uwm_jax.data.names import check_name
from uwm_jax.data.places import local_dataset
from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.data.robot import RobotActions
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.writing import SHARD_FACTS, ShardWriter, shard_names, write_descriptions, write_split
from uwm_jax.errors import UserError, warn
from uwm_jax.files import exchange, sync
from uwm_jax.serving.connections import Recorder
from uwm_jax.serving.contract import TEXT, Request

SPLIT, VERSION, FORMAT = "train", "1.0.0", "recording of uwm_jax.serve"
CHUNK_STEPS = 8  # steps of a record, as the jobs of data_prep have it
MOST_STEPS = 20_000  # of an episode in memory; a longer one is cut
_SHARD_BYTES = 256 << 20
_TEXT, _EMBEDDING = "language_instruction", "language_embedding"
_NEW = ".recorded"  # suffix of the folder that takes the dataset's place
_OURS = {"index", "columns", "manifest.json", "features.json", "dataset_info.json", "derived_stats", "stats.json"}


class Recording:
    """A dataset that grows by episodes; one process at a time.

    Args:
        directory: of the dataset; absent, empty, or an earlier recording with the same keys.
        spec: of the model. robot: whose actions are recorded, None where the checkpoint does not know.
        width: Dr, numbers of an action.
        served: what is served, such as a checkpoint's name, for every episode's metadata.
    Raises:
        UserError: the directory holds something else, or another process records there.

    Attributes:
        episodes: in the dataset, with those of earlier recordings.
    """

    def __init__(self, directory: Path, spec: DataSpec, robot: RobotActions | None, *, width: int, served: str = ""):
        self.directory, self._served = Path(os.path.realpath(directory)), served
        self._name = check_name(self.directory.name, "the name of the directory", directory)
        self._actions = action_keys(robot, width)
        observed = {key: like for key, like in spec.observation_like(1, robot).items() if key != "text"}
        self._cameras = sorted(spec.cameras)
        self._numbers = sorted(observed.keys() - spec.cameras.keys())
        self._width = spec.text_dim
        self._features = _features(spec, {k: observed[k].shape[1] for k in self._numbers}, self._actions)
        self._tree = feature_tree(self._features)
        sizes = {f"observation/{camera}": size for camera, size in spec.cameras.items()}
        self._layout = plan_layout(self._features, CHUNK_STEPS, sizes)
        flips = sorted(set(spec.flip.values()))
        self._facts = {"robot": {"format": FORMAT, "flip": flips[0] if len(flips) == 1 else "none"}}
        self._open: dict[int, list[dict[str, Any]]] = {}
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.directory.with_name(f".{self._name}.recording"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take_lock()
            self.episodes = self._check_there()
        except BaseException:
            os.close(self._lock)
            raise

    def step(self, connection: int, request: Request, action: np.ndarray) -> None:
        """Takes in a step that was answered by `action` (Dr,); a request with `reset` begins an episode."""
        steps = self._open.setdefault(connection, [])
        if steps and (request.reset or len(steps) >= MOST_STEPS):
            if not request.reset:
                warn(f"--record: an episode of more than {MOST_STEPS} steps is cut there.")
            self.end(connection)
            steps = self._open.setdefault(connection, [])
        taken: dict[str, Any] = {
            f"observation/{c}": encode_jpeg(np.asarray(request.inputs[f"obs/{c}"])) for c in self._cameras
        }
        taken |= {f"observation/{key}": request.inputs[f"obs/{key}"] for key in self._numbers}
        taken |= {key: action[places] for key, places in self._actions.items()}
        if self._width:
            taken |= {_TEXT: request.prompt or "", _EMBEDDING: request.inputs[TEXT]}
        steps.append(taken)

    def end(self, connection: int) -> None:
        """Puts a connection's episode, if it has one, into the dataset."""
        if steps := self._open.pop(connection, None):
            self._publish(self._serialized(steps))

    def close(self) -> None:
        """Ends all episodes, and lets others record here."""
        for connection in list(self._open):
            self.end(connection)
        os.close(self._lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"--record={self.directory}: another server records there. Name another directory.") from e
        except OSError as e:
            warn(f"--record={self.directory}: this file system has no locks ({e.strerror}).")

    def _check_there(self) -> int:
        """The number of episodes of an earlier recording; what a killed server left next to it is removed."""
        for left in self.directory.parent.glob(f".{glob.escape(self._name)}.????????{_NEW}*"):
            if left.suffix != _NEW and not self.directory.exists():  # where folders cannot be exchanged at once
                left.rename(self.directory)
            shutil.rmtree(left, ignore_errors=True)
        if not self.directory.exists() or not any(self.directory.iterdir()):
            return 0
        if not (self.directory / "manifest.json").is_file():
            raise UserError(f"--record={self.directory}: this folder holds something else. Name another directory.")
        manifest = read_manifest(self.directory)
        if manifest.get("source", {}).get("format") != FORMAT:
            raise UserError(f"--record={self.directory}: this dataset is no recording. Name another directory.")
        described = manifest["step_features"]
        if different := sorted(self._stored().items() ^ {k: _kind(f) for k, f in described.items()}.items()):
            keys = ", ".join(sorted({key for key, _ in different}))
            raise UserError(
                f"--record={self.directory}: its steps have other keys or shapes than this model's: {keys}. Name "
                "another directory."
            )
        if more := {path.name for path in self.directory.iterdir()} - _OURS - self._shards(manifest):
            raise UserError(
                f"--record={self.directory}: {', '.join(sorted(more))}: not of a recording, or made from it and not of "
                "it any more with another episode. Name another directory, or remove it."
            )
        return int(manifest["splits"][SPLIT]["episodes"])

    def _stored(self) -> dict[str, tuple[Any, ...]]:
        features = {path.removeprefix(STEPS): f for path, f in self._features.items() if path.startswith(STEPS)}
        return {key: (tuple(f.shape or ()), f.dtype, f.image) for key, f in features.items()}

    @staticmethod
    def _shards(manifest: Mapping[str, Any]) -> set[str]:
        return {shard["file"] for shard in manifest["splits"][SPLIT]["shards"]}

    def _serialized(self, steps: list[dict[str, Any]]) -> bytes:
        at = np.arange(len(steps))
        values: dict[str, Any] = {STEPS + "is_first": at == 0, STEPS + "is_last": at == len(steps) - 1}
        values[STEPS + "is_terminal"] = np.zeros(len(steps), bool)
        for key in steps[0]:
            column = [step[key] for step in steps]
            values[STEPS + key] = np.stack(column) if isinstance(column[0], np.ndarray) else column
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        values |= {"episode_metadata/recorded": now, "episode_metadata/served": self._served}
        return serialize_episode(self._features, values)

    def _publish(self, episode: bytes) -> None:
        """The dataset with one more episode in place of the one that is there."""
        cut = cut_episode(episode, self._layout)
        old = Dataset(self.directory, SPLIT) if self.episodes else None
        new = self.directory.with_name(f".{self._name}.{secrets.token_hex(4)}{_NEW}")
        new.mkdir()
        try:
            writer = ShardWriter(new, _SHARD_BYTES)
            for record in cut.chunks:
                writer.write(record)
            made = [(new / shard["part"], shard) for shard in writer.close()]
            entry = old.manifest["splits"][SPLIT] if old else {}
            there = [(self.directory / shard["file"], shard) for shard in entry.get("shards", [])]
            names = shard_names(self._name, SPLIT, len(there) + len(made))
            for (file, _), name in zip([*there, *made], names, strict=True):
                _link(file, new / name)
            for file, _ in made:
                file.unlink()
            split = write_split(
                new,
                SPLIT,
                self._layout,
                shards=[
                    {key: shard[key] for key in SHARD_FACTS if key in shard} | {"file": name}
                    for (_, shard), name in zip([*there, *made], names, strict=True)
                ],
                lengths=[*(old.episode_lengths.tolist() if old else []), cut.length],
                checksums=[*(_checksums(old) if old else []), *map(google_crc32c.value, cut.chunks)],
                texts={
                    name: [*(text.encode() for text in (old.episode_texts(name) if old else [])), cut.texts[name]]
                    for name in self._layout.texts
                },
                columns=lambda key: _columns(old, key, cut.columns[key], self._layout),
            )
            write_descriptions(
                new,
                self._layout,
                name=self._name,
                version=VERSION,
                tree=self._tree,
                splits={SPLIT: split | {"skipped": {}, "skipped_notes": []}},
                source={"path": "", "format": FORMAT},
                info={"description": "Episodes of a policy server."},
                facts=self._facts | {"frames": {"encoding": "jpeg", "quality": JPEG_QUALITY}},
            )
            for file in new.rglob("*"):
                sync(file)
            if self.directory.exists():
                exchange(new, self.directory)
            else:
                new.rename(self.directory)
            sync(self.directory.parent)
            self.episodes += 1
        finally:
            if old:
                old.close()
            shutil.rmtree(new, ignore_errors=True)


class Together:
    """Several that take in steps, as one; see `connections.Recorder`."""

    def __init__(self, each: Sequence[Recorder]):
        self._each = each

    def step(self, connection: int, request: Request, action: np.ndarray) -> None:
        for recorder in self._each:
            recorder.step(connection, request, action)

    def end(self, connection: int) -> None:
        for recorder in self._each:
            recorder.end(connection)


def action_keys(robot: RobotActions | None, width: int) -> dict[str, list[int]]:
    """{step key: places in a robot's action} by which a recording keeps actions: the keys of the model's data where its
    parts cover these from their first column on, else `action` for all."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    place = 0
    for part in robot.parts if robot else ():
        start = part.columns.start or 0
        found.setdefault(part.columns.key, []).append((start, part.in_dim, place))
        place += part.in_dim
    keys: dict[str, list[int]] = {}
    for key, pieces in found.items():
        places: list[int] = []
        for start, dim, first in sorted(pieces):
            if start != len(places):
                return {"action": list(range(width))}
            places += range(first, first + dim)
        keys[key] = places
    return keys or {"action": list(range(width))}


def _features(spec: DataSpec, numbers: Mapping[str, int], actions: Mapping[str, list[int]]) -> dict[str, Feature]:
    features = {
        f"observation/{c}": Feature((*size, 3), "uint8", image=True) for c, size in sorted(spec.cameras.items())
    }
    features |= {f"observation/{key}": Feature((dim,), "float32") for key, dim in numbers.items()}
    features |= {key: Feature((len(places),), "float32") for key, places in actions.items()}
    if spec.text_dim:
        features |= {_TEXT: Feature((), "string"), _EMBEDDING: Feature((spec.text_dim,), "float32")}
    features |= {name: Feature((), "bool") for name in ("is_first", "is_last", "is_terminal")}
    episode = {f"episode_metadata/{name}": Feature((), "string") for name in ("recorded", "served")}
    return {STEPS + key: feature for key, feature in features.items()} | episode


def _kind(described: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(described["shape"] or ()), described["dtype"], described["image"]


def _checksums(dataset: Dataset) -> list[int]:
    with np.load(local_dataset(dataset.directory) / records.index_file(SPLIT), allow_pickle=False) as stored:
        return stored["chunk_crc32c"].tolist()


def _columns(old: Dataset | None, key: str, values: np.ndarray, layout: Layout) -> Iterator[memoryview]:
    _, dtype = layout.columns[key]
    if old is not None:
        yield np.ascontiguousarray(old.column(key)[:], dtype).reshape(-1).data.cast("B")
    yield np.ascontiguousarray(values, dtype).reshape(-1).data.cast("B")


def _link(file: Path, to: Path) -> None:
    """`to` as another name of a file that never changes; a copy where the file system has no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
