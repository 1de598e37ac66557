"""Reads a LeRobot dataset as a corpus: its episodes as RLDS, with the frames of its videos as single images."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.sources.decoding import MAX_ENCODED_BYTES, VideoError
from data_prep.sources.inputs import Corpus, Found, Input, modified, storable
from data_prep.sources.lerobot.frames import Decoder, Request, decoder
from data_prep.sources.lerobot.keys import Key, kept_keys
from data_prep.sources.lerobot.metadata import Clip, EpisodeFiles, Metadata, read_metadata, read_tasks
from data_prep.sources.lerobot.rows import Rows, image_bytes, numbers, strings
from data_prep.sources.pictures import JPEG, Pictures
from uwm_jax.data.chunks import EpisodeError
from uwm_jax.data.episodes import feature_tree, serialize_episode
from uwm_jax.data.features import STEPS, Feature
from uwm_jax.data.names import check_name

_GROUP = 16  # episodes that one process reads at a time
_TEXT = STEPS + "language_instruction"
_TERMINAL = STEPS + "is_terminal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes(Input):
    """Consecutive episodes of one split, and of one data file where several share it.

    Attributes:
        pictures: how frames of videos are stored.
        seconds: time limit for decoding one camera of an episode.
    """

    root: Path
    major: int
    fps: Fraction
    parts: tuple[EpisodeFiles, ...]
    sizes: tuple[int, ...]
    keys: tuple[Key, ...]
    features: dict[str, Feature]
    pictures: Pictures
    seconds: float

    declared_by: ClassVar[str] = "meta/episodes"

    def episodes(self) -> Iterator[Found]:
        with Rows(self.root) as rows, decoder() as decoding:
            for episode, size in zip(self.parts, self.sizes, strict=True):
                name = f"episode {episode.number}"
                try:
                    yield Found(self._record(episode, rows, decoding), size=size, name=name)
                except (EpisodeError, VideoError) as e:
                    yield Found(None, e.reason, str(e), size, name)

    def _record(self, episode: EpisodeFiles, rows: Rows, decoding: Decoder) -> bytes:
        table = rows.read(episode, [key.source for key in self.keys] + ["frame_index", "task_index"])
        length = table.num_rows
        if not length:
            raise EpisodeError("no steps", "the episode is empty")
        at = np.arange(length)
        values: dict[str, Any] = {
            STEPS + "is_first": at == 0,
            STEPS + "is_last": at == length - 1,
            _TERMINAL: at == length - 1,
            "episode_metadata/episode_index": episode.number,
            "episode_metadata/file_path": episode.data,
        }
        if "frame_index" in table.column_names:
            at = _integers("frame_index", table)
        if _TEXT in self.features:
            values[_TEXT] = self._instructions(table)
        encoded = 0  # bytes of frames
        for key in self.keys:
            if key.kind == "video":
                left = MAX_ENCODED_BYTES - encoded
                values[key.path] = self._frames(key, episode.clips[key.source], at, decoding, left)
                encoded += sum(map(len, values[key.path]))
                continue
            if key.source not in table.column_names:
                raise EpisodeError("key missing", f"{episode.data} has no column {key.source}")
            column = table[key.source]
            if key.kind == "image":
                values[key.path] = image_bytes(self.root, key.source, column)
            elif key.kind == "string":
                values[key.path] = strings(key.source, column)
            else:
                values[key.path] = _typed(key, numbers(key.source, column, key.feature.shape or ()))
        return serialize_episode(self.features, values)

    def _instructions(self, table: Any) -> list[str]:
        tasks = read_tasks(self.root, self.major)
        if "task_index" not in table.column_names:
            return [""] * table.num_rows
        indices = _integers("task_index", table).tolist()
        if unknown := set(indices) - tasks.keys():
            raise EpisodeError("unknown task", f"meta/tasks has no task_index {min(unknown)}")
        return [tasks[i] for i in indices]

    def _frames(self, key: Key, clip: Clip, at: np.ndarray, decoding: Decoder, max_bytes: int) -> list[bytes]:
        """The encoded frames of a video, that nearest to each row's time."""
        start, tolerance = Fraction(clip.start), 1 / (2 * self.fps)
        times = tuple(start + int(i) / self.fps for i in at)
        if clip.stop is not None and times[-1] > clip.stop + tolerance:
            raise EpisodeError(
                "no frame at its time",
                f"{key.source}: the last step is at {float(times[-1]):.3f} s, to_timestamp is {clip.stop:.3f} s",
            )
        request = Request(
            file=self.root / clip.file,
            camera=key.source,
            times=times,
            tolerance=tolerance,
            size=key.size,
            pictures=self.pictures,
            max_bytes=max_bytes,
        )
        try:
            return decoding.frames(request, self.seconds)
        except VideoError as e:
            raise EpisodeError(e.reason, f"{key.source}: {e}") from e


def _integers(name: str, table: Any) -> np.ndarray:
    """A column of LeRobot's bookkeeping; EpisodeError if it holds other values than integers."""
    values = numbers(name, table[name], ())
    if values.dtype.kind not in "iu":
        raise EpisodeError("another type", f"{name}: expected integers, found {values.dtype}")
    return values


def _typed(key: Key, values: np.ndarray) -> np.ndarray:
    """Numbers of the kind that info.json declares; EpisodeError if the file has others, or too large ones."""
    if not np.can_cast(values.dtype, np.float64 if key.feature.dtype == "float32" else np.int64, "same_kind"):
        declared = key.feature.dtype
        raise EpisodeError("another type", f"{key.source}: info.json declares {declared}, found {values.dtype}")
    return storable(values, key.feature.dtype, key.source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absent(Input):
    """Episodes that `info.json` declares and the metadata do not list, so that they are counted as missing."""

    name: str = "meta/episodes"
    size: int = 0

    declared_by: ClassVar[str] = "total_episodes of meta/info.json"

    def episodes(self) -> Iterator[Found]:
        return iter(())


def corpus(
    root: Path,
    *,
    cameras: Sequence[str] = (),
    splits: Sequence[str] = (),
    pictures: Pictures = JPEG,
    seconds: float = 300.0,
) -> Corpus:
    """The corpus of a LeRobot dataset.

    Args:
        cameras, splits: those to take; all if empty.
        pictures: how frames of videos are stored. Images in parquet files are left to `training_layout.build`.
        seconds: time limit for decoding one camera of an episode.
    Raises:
        UserError: as `metadata.read_metadata`, or a camera has no readable image.
    """
    metadata = read_metadata(root, cameras, splits)
    keys, encodings, left_out = kept_keys(metadata, pictures, seconds)
    for source, reason in left_out.items():
        print(f"{source} is left out: {reason}.")
    features = {key.path: key.feature for key in keys}
    features |= {STEPS + name: Feature((), "bool") for name in ("is_first", "is_last", "is_terminal")}
    if _TEXT not in features:
        if read_tasks(root, metadata.version[0]):
            features[_TEXT] = Feature((), "string")
        else:
            print(f"{root / 'meta'} holds no tasks: there is no language_instruction.")
    features |= {
        "episode_metadata/episode_index": Feature((), "int64"),
        "episode_metadata/file_path": Feature((), "string"),
    }
    version = f"v{metadata.version[0]}.{metadata.version[1]}"
    return Corpus(
        name=check_name(root.resolve().name, "the name of the directory", root),
        version="1.0.0",
        path=root,
        tree=feature_tree(features, encodings),
        splits={
            split: [
                *_inputs(metadata, parts, tuple(keys), features, pictures, seconds),
                *([Absent(promised=metadata.absent[split])] if split in metadata.absent else []),
            ]
            for split, parts in metadata.splits.items()
        },
        info={"description": f"Converted from a LeRobot dataset of codebase {version}."},
        source={"format": f"LeRobot {version}"},
        facts={"robot": _facts(metadata, keys, left_out, pictures)},
        options={"cameras": sorted(cameras), **pictures.options, "seconds": seconds},
    )


def _inputs(
    metadata: Metadata,
    episodes: Sequence[EpisodeFiles],
    keys: tuple[Key, ...],
    features: dict[str, Feature],
    pictures: Pictures,
    seconds: float,
) -> Iterator[Episodes]:
    steps: collections.Counter[str] = collections.Counter()
    for episode in (e for part in metadata.splits.values() for e in part):
        for file in _files(episode):
            steps[file] += episode.length
    per_step = {file: (metadata.root / file).stat().st_size / max(1, n) for file, n in steps.items()}
    for group in _grouped(episodes):
        sizes = [round(sum(per_step[file] for file in _files(e)) * e.length) for e in group]
        first, last = group[0].number, group[-1].number
        yield Episodes(
            name=f"episodes {first} to {last}" if last > first else f"episode {first}",
            size=sum(sizes),
            modified=modified(metadata.root / file for file in {file for e in group for file in _files(e)}),
            promised=len(group),
            root=metadata.root,
            major=metadata.version[0],
            fps=metadata.fps,
            parts=tuple(group),
            sizes=tuple(sizes),
            keys=keys,
            features=features,
            pictures=pictures,
            seconds=seconds,
        )


def _files(episode: EpisodeFiles) -> list[str]:
    return [episode.data, *(clip.file for clip in episode.clips.values())]


def _grouped(episodes: Sequence[EpisodeFiles]) -> Iterator[list[EpisodeFiles]]:
    group: list[EpisodeFiles] = []
    for episode in episodes:
        # In v3 a group lies in one file; in v2 each episode is a file.
        elsewhere = bool(group) and episode.first_row is not None and episode.data != group[-1].data
        if len(group) == _GROUP or elsewhere:
            yield group
            group = []
        group.append(episode)
    if group:
        yield group


def _facts(metadata: Metadata, keys: Sequence[Key], left_out: dict[str, str], pictures: Pictures) -> dict[str, Any]:
    """Robot facts of `info.json`, for the manifest."""
    facts: dict[str, Any] = {
        "format": "LeRobot",
        "type": metadata.info.get("robot_type"),
        "fps": float(metadata.fps),
        "flip": "none",
        # As info.json has them: names of columns, units where given, codec and colours of videos.
        "keys": {key.path.removeprefix(STEPS): {"source": key.source} | metadata.features[key.source] for key in keys},
        "left_out": left_out,
    }
    videos = {key.path.removeprefix(STEPS): list(key.size) for key in keys if key.kind == "video"}
    if videos:
        facts["frames"] = pictures.facts
        facts["frames"]["stored_size"] = videos
    return facts
