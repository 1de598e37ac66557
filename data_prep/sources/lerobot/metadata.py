"""The metadata of a LeRobot dataset: `meta/info.json`, its episodes and its tasks, of codebase v2.0, v2.1 and v3.x.

v2 keeps an episode in a parquet file of its own, and in a video file of its own per camera; v3 joins several. The paths
of both are templates in `info.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from uwm_jax.data.names import check_name, not_the_data
from uwm_jax.errors import UserError, suggest
from uwm_jax.reading import again, parse_json, read_json

_INDEX = "__index_level_0__"  # pandas' name of an index without one
_HELP = "Complete the download (`hf download REPOSITORY --repo-type=dataset --local-dir=DIR` takes all files)."


@dataclasses.dataclass(frozen=True)
class Clip:
    """The part of a video file that belongs to an episode: path in the dataset, first time stamp in seconds, and the
    time at which it ends; None if that is the end of the file."""

    file: str
    start: float = 0.0
    stop: float | None = None


@dataclasses.dataclass(frozen=True)
class EpisodeFiles:
    """The place of an episode: `length` rows of the parquet file `data` (path in the dataset) from `first_row` on,
    or all rows of the file if that is None, and a clip per camera."""

    number: int
    length: int
    data: str
    first_row: int | None
    clips: Mapping[str, Clip]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A LeRobot dataset; `info` is the content of `meta/info.json`.

    Attributes:
        version: (major, minor) of the codebase.
        fps: steps per second.
        features: LeRobot's name -> its entry in `info.json`.
        videos, images: names of the cameras that are stored as video files, and as images in the parquet files.
        left_out: names of features that no dataset of ours holds -> reason.
        splits: split -> its episodes in order.
        absent: split -> number of episodes that `info.json` declares and the metadata do not list.
    """

    root: Path
    version: tuple[int, int]
    info: dict[str, Any]
    fps: Fraction
    features: dict[str, dict[str, Any]]
    videos: tuple[str, ...]
    images: tuple[str, ...]
    left_out: dict[str, str]
    splits: dict[str, list[EpisodeFiles]]
    absent: dict[str, int]


def read_metadata(root: Path, cameras: Sequence[str] = (), splits: Sequence[str] = ()) -> Metadata:
    """Reads the metadata, and checks that the files which they name are there.

    Args:
        cameras: those to take, by LeRobot's name or its last part; all if empty.
        splits: those to take; all if empty.
    Raises:
        UserError: not a LeRobot dataset of a known version, metadata that are damaged or incomplete, a missing file or
            a placeholder, or an unknown name.
    """
    file = root / "meta" / "info.json"
    info = _read_info(root)
    version = _version(info, file)
    features = info.get("features")
    if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
        raise UserError(f"{file}: expected `features`, an object of objects, found {str(features)[:60]!r}.")
    left_out = {key: reason for key, feature in features.items() if (reason := why_left_out(key, feature))}
    found = {key: f.get("dtype") for key, f in features.items() if key not in left_out}
    chosen = _chosen_cameras([k for k, kind in found.items() if kind in ("video", "image")], cameras, file)
    left_out |= {k: "not in --cameras" for k, kind in found.items() if kind in ("video", "image") and k not in chosen}
    videos = tuple(key for key in chosen if found[key] == "video")
    if videos and not isinstance(info.get("video_path"), str):
        raise UserError(f"{file}: {videos[0]} is a video, but `video_path` is {info.get('video_path')!r}.")
    episodes = list(_episodes_v2(root, info, videos) if version[0] == 2 else _episodes_v3(root, info, videos))
    if not episodes:
        raise UserError(f"{root}: its metadata list no episode.")
    for before, episode in itertools.pairwise(episodes):  # in order of their numbers
        if before.number == episode.number:
            raise UserError(f"{root}: its metadata list episode {episode.number} twice. {_HELP}")
    ranges = _ranges(info, file)
    by_split = _split(episodes, ranges, file)
    if unknown := [name for name in splits if name not in by_split]:
        raise UserError(f"{file}: no split {unknown[0]!r}; it has {', '.join(by_split)}.")
    by_split = {name: part for name, part in by_split.items() if not splits or name in splits}
    metadata = Metadata(
        root=root,
        version=version,
        info=info,
        fps=_fps(info, file),
        features=features,
        videos=videos,
        images=tuple(key for key in chosen if found[key] == "image"),
        left_out=left_out,
        splits=by_split,
        absent=_absent(episodes, info, ranges),
    )
    _check_files(metadata)
    return metadata


@functools.lru_cache(maxsize=8)
def read_tasks(root: Path, major: int) -> dict[int, str]:
    """task_index -> instruction; empty if the dataset has no tasks.

    Raises:
        UserError: the file is damaged.
    """
    if major == 2:
        file = root / "meta" / "tasks.jsonl"
        lines = _json_lines(file) if file.exists() else ()
        return {_integer(line, "task_index", where): str(line.get("task") or "") for where, line in lines}
    file = root / "meta" / "tasks.parquet"
    if not file.exists():
        return {}
    table = read_table(file)
    try:
        # The text is pandas' index, which has had the names "task" and none.
        pandas = table.schema.pandas_metadata or {}
        names = [n for n in pandas.get("index_columns", ()) if isinstance(n, str)]
        columns = {
            name: table[name].to_pylist()
            for name in ("task_index", *names, "task", _INDEX)
            if name in table.column_names
        }
    except (ValueError, AttributeError, TypeError) as e:  # texts, or pandas' JSON, that are damaged
        raise UserError(f"{file} is damaged ({str(e)[:200]}). Copy it again.") from e
    text = next((name for name in columns if name != "task_index"), None)
    if text is None or "task_index" not in columns:
        raise UserError(
            f"{file}: expected the columns `task_index` and the index of texts, found {', '.join(table.column_names)}."
        )
    tasks: dict[int, str] = {}
    for index, task in zip(columns["task_index"], columns[text], strict=True):
        _integer({"task_index": index}, "task_index", str(file))
        tasks[index] = "" if task is None else str(task)
    return tasks


def read_table(file: Path, columns: Sequence[str] | None = None) -> Any:
    """A parquet file as `pyarrow.Table`.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    pyarrow, parquet = import_pyarrow()
    if found := not_the_data(file):
        raise UserError(f"{file} {found}.")
    try:
        with again(lambda: parquet.ParquetFile(file), file) as opened:
            missing = [name for name in columns or () if name not in opened.schema_arrow.names]
            if missing:
                raise UserError(f"{file}: no column {missing[0]!r}. {_HELP}")
            return again(lambda: opened.read(columns), file)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{file} is not a complete parquet file ({str(e)[:200]}). Copy it again.") from e


def import_pyarrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; UserError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(
            "pyarrow is not installed. Run `pip install 'uwm_jax[lerobot]'` (or `-e '.[lerobot]'` in a clone)."
        ) from e
    return pyarrow, pyarrow.parquet


def why_left_out(key: str, feature: Mapping[str, Any]) -> str:
    """The reason why a feature of `info.json` is not kept; "" if it is."""
    dtype = feature.get("dtype")
    if dtype in ("video", "image"):
        marks = [part for part in (feature.get("info"), feature.get("video_info"), feature) if isinstance(part, dict)]
        marked = any(part.get(name) for part in marks for name in ("is_depth_map", "video.is_depth_map"))
        if marked or "depth" in re.split(r"[._/\-]", key.lower()):
            return "depth, which is no camera"
        return ""
    if dtype == "string" or re.fullmatch(r"bool|u?int(8|16|32|64)|float(16|32|64)", str(dtype)):
        shape = feature.get("shape", [])
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            return f"its shape is {str(shape)[:60]}"
        return "strings of several values a step" if dtype == "string" and math.prod(shape) > 1 else ""
    return f"values of {str(dtype)[:60]}"


def _read_info(root: Path) -> dict[str, Any]:
    file = root / "meta" / "info.json"
    if not file.is_file():
        inside = [p.parent.parent for p in root.glob("*/meta/info.json")] if root.is_dir() else []
        hint = f" Did you mean {sorted(inside)[0]}?" if inside else ""
        raise UserError(f"{file} does not exist: --input must be the directory of a LeRobot dataset.{hint}")
    if found := not_the_data(file):
        raise UserError(f"{file} {found}.")
    return read_json(file)


def _version(info: Mapping[str, Any], file: Path) -> tuple[int, int]:
    stored = info.get("codebase_version")
    match = re.fullmatch(r"v?(\d+)\.(\d+)(\.\d+)?", str(stored))
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version[0] != 3 and version not in ((2, 0), (2, 1)):
        raise UserError(
            f"{file}: codebase_version is {stored!r}; this command reads v2.0, v2.1 and v3.x. LeRobot's own scripts "
            "convert older datasets."
        )
    return version


def _fps(info: Mapping[str, Any], file: Path) -> Fraction:
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise UserError(f"{file}: fps is {fps!r}; expected a positive number of steps per second.")
    return Fraction(fps)


def _chosen_cameras(known: Sequence[str], wanted: Sequence[str], file: Path) -> list[str]:
    names = {key.rpartition(".")[2]: key for key in known} | {key: key for key in known}
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(
            f"--cameras: {file} has no camera {unknown[0]!r}; it has {', '.join(known) or 'none'}."
            f"{suggest(unknown[0], names)}"
        )
    return [key for key in known if not wanted or key in {names[name] for name in wanted}]


def _episodes_v2(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> Iterator[EpisodeFiles]:
    file = root / "meta" / "episodes.jsonl"
    size = info.get("chunks_size", 1000)
    if type(size) is not int or size < 1:
        raise UserError(f"{root / 'meta' / 'info.json'}: chunks_size is {size!r}; expected an integer of at least 1.")
    if not file.is_file():
        raise UserError(f"{file} does not exist. {_HELP}")
    entries = sorted(
        (_integer(line, "episode_index", where), _integer(line, "length", where)) for where, line in _json_lines(file)
    )
    for number, length in entries:
        place = {"episode_chunk": number // size, "episode_index": number, "chunk_index": number // size}
        clips = {key: Clip(_path(root, info, "video_path", place | {"video_key": key})) for key in videos}
        yield EpisodeFiles(number, length, _path(root, info, "data_path", place), None, clips)


def _episodes_v3(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> Iterator[EpisodeFiles]:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{root / 'meta' / 'episodes'} holds no */*.parquet. {_HELP}")
    rows = ["episode_index", "data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
    of_video = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns = rows + [f"videos/{key}/{name}" for key in videos for name in of_video]
    entries = [_checked_v3(entry, file) for file in files for entry in read_table(file, columns).to_pylist()]
    entries.sort(key=lambda entry: entry["episode_index"])
    first: dict[tuple[int, int], int] = {}  # index of the first row of each data file
    for entry in entries:
        place = entry["data/chunk_index"], entry["data/file_index"]
        first[place] = min(first.get(place, entry["dataset_from_index"]), entry["dataset_from_index"])
    for entry in entries:
        clips = {}
        for key in videos:
            chunk, number, start, stop = (entry[f"videos/{key}/{name}"] for name in of_video)
            where = {"video_key": key, "chunk_index": chunk, "file_index": number}
            clips[key] = Clip(_path(root, info, "video_path", where), start, stop)
        chunk, number = place = entry["data/chunk_index"], entry["data/file_index"]
        data = _path(root, info, "data_path", {"chunk_index": chunk, "file_index": number})
        length = entry["dataset_to_index"] - entry["dataset_from_index"]
        yield EpisodeFiles(entry["episode_index"], length, data, entry["dataset_from_index"] - first[place], clips)


def _checked_v3(entry: dict[str, Any], file: Path) -> dict[str, Any]:
    """An episode's metadata: times as floats and all others as integers from 0 on."""
    checked: dict[str, Any] = {}
    for name, value in entry.items():
        time = name.endswith("_timestamp")
        fits = isinstance(value, int | float) and 0 <= value < 1 << 53 and (time or value == int(value))
        if not fits:
            expected = "seconds" if time else "an integer"
            raise UserError(
                f"{file}: episode {entry['episode_index']}: {name} is {value!r}; expected {expected} from 0 on. {_HELP}"
            )
        checked[name] = float(value) if time else int(value)
    if checked["dataset_to_index"] < checked["dataset_from_index"]:
        raise UserError(f"{file}: episode {entry['episode_index']}: dataset_to_index is less than dataset_from_index.")
    return checked


def _path(root: Path, info: Mapping[str, Any], field: str, values: Mapping[str, Any]) -> str:
    """A path by a template of `info.json`, in which only the names of `values` may stand in braces."""
    file, template = root / "meta" / "info.json", info.get(field)
    if not isinstance(template, str):
        raise UserError(f"{file}: {field} is {template!r}; expected a template such as data/chunk-{{...}}.parquet.")
    try:
        # A name in braces is followed by a format of a number and nothing else: no attribute of a value is read.
        path = re.sub(r"\{(\w+)(?::(\d{0,3}d?))?\}", lambda m: format(values[m[1]], m[2] or ""), template)
    except (KeyError, ValueError) as e:
        raise UserError(f"{file}: {field} is {template!r}; names in braces: {', '.join(values)} ({e}).") from e
    return check_name(path, field, file, nested=True)


def _absent(episodes: Sequence[EpisodeFiles], info: Mapping[str, Any], ranges: Mapping[str, range]) -> dict[str, int]:
    """The number of episodes of each split that `total_episodes` of `info.json` counts and the metadata do not list."""
    total = info.get("total_episodes")
    if not isinstance(total, int) or total <= len(episodes):
        return {}
    lacking = {}
    for name, numbers in (ranges or {"train": range(total)}).items():
        listed = sum(episode.number in numbers for episode in episodes)
        lacking[name] = min(total - len(episodes), min(numbers.stop, total) - numbers.start - listed)
    return {name: count for name, count in lacking.items() if count > 0}


def _ranges(info: Mapping[str, Any], file: Path) -> dict[str, range]:
    """The numbers of each split, by `splits` in `info.json`."""
    stored = info.get("splits") or {}
    ranges = {}
    for name, value in stored.items() if isinstance(stored, dict) else [("", stored)]:
        match = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", str(value))
        if not match:
            raise UserError(f"{file}: expected ranges such as '0:50' in `splits`, found {str(stored)[:80]}.")
        check_name(name, "the name of a split", file)
        ranges[name] = range(int(match[1] or 0), int(match[2]) if match[2] else 1 << 62)
    return ranges


def _split(episodes: list[EpisodeFiles], ranges: Mapping[str, range], file: Path) -> dict[str, list[EpisodeFiles]]:
    """The episodes by the ranges of `info.json`; those in none of them go into `train`."""
    by_split: dict[str, list[EpisodeFiles]] = {name: [] for name in ranges}
    outside, several = [], []
    for episode in episodes:
        names = [name for name, numbers in ranges.items() if episode.number in numbers]
        for name in names or ["train"]:
            by_split.setdefault(name, []).append(episode)
        outside += [episode.number] * (not names and bool(ranges))
        several += [episode.number] * (len(names) > 1)
    if outside:
        print(f"{file}: `splits` leaves out {len(outside)} episodes (the first is {outside[0]}): put into train.")
    if several:
        print(f"{file}: `splits` has {len(several)} episodes in several splits (the first is {several[0]}).")
    return {name: part for name, part in by_split.items() if part}


def _check_files(metadata: Metadata) -> None:
    """Checks that all files exist and hold data."""
    episodes = [episode for part in metadata.splits.values() for episode in part]
    kinds: dict[str, list[str]] = {"data": [episode.data for episode in episodes]}
    kinds |= {key: [episode.clips[key].file for episode in episodes] for key in metadata.videos}
    for kind, files in kinds.items():
        unique = list(dict.fromkeys(files))
        what = "data files" if kind == "data" else f"videos of camera {kind}"
        remedy = _HELP
        if kind != "data":
            others = [key for key in (*metadata.videos, *metadata.images) if key != kind]
            remedy += f" Or leave the camera out with --cameras={','.join(others)}." if others else ""
        if missing := [file for file in unique if not (metadata.root / file).is_file()]:
            raise UserError(
                f"{metadata.root}: {len(missing)} of {len(unique)} {what} are missing: {missing[0]}. {remedy}"
            )
        for file in unique:
            if found := not_the_data(metadata.root / file):
                raise UserError(f"{metadata.root / file} {found}. {remedy}")


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if found := not_the_data(file):
        raise UserError(f"{file} {found}.")
    for i, line in enumerate(again(file.read_bytes, file).splitlines()):
        if line.strip():
            yield f"{file}: line {i + 1}", parse_json(line, f"{file}: line {i + 1}")


def _integer(entry: Mapping[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if type(value) is not int or value < 0:
        raise UserError(f"{where}: {name} is {value!r}; expected an integer from 0 on.")
    return value
