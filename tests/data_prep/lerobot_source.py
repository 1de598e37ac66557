"""Writes small LeRobot datasets of codebase v2 and v3 with pyarrow and PyAV."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data_prep.clips import SIZE, picture, write_clip

FPS = 10
DATA = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
TASKS = ["pick up the cup", "öffne die Schublade"]
_CHANNELS_LAST = {"shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
FEATURES: dict[str, dict[str, Any]] = {
    "observation.images.top": {"dtype": "video"} | _CHANNELS_LAST,
    "observation.images.wrist": {
        "dtype": "video",
        "shape": [3, *SIZE],
        "names": ["channels", "height", "width"],
        "info": {"video.fps": FPS},
    },
    "observation.images.wrist_depth": {
        "dtype": "video",
        "shape": [*SIZE, 1],
        "names": None,
        "info": {"video.is_depth_map": True},
    },
    "observation.image": {"dtype": "image", "shape": [3, *SIZE], "names": None},
    "observation.state": {
        "dtype": "float32",
        "shape": [3],
        "names": {"motors": ["shoulder", "elbow", "gripper"]},
    },
    "observation.state.pose": {"dtype": "float64", "shape": [2, 2], "names": None},
    "action": {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]},
    "action.raw": {"dtype": "int64", "shape": [1], "names": None},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    "note": {"dtype": "string", "shape": [1], "names": None},
    **{
        key: {"dtype": "int64" if key != "timestamp" else "float32", "shape": [1], "names": None}
        for key in ("timestamp", "frame_index", "episode_index", "index", "task_index")
    },
}


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "PNG")
    return out.getvalue()


def episode(number: int, length: int) -> dict[str, Any]:
    """The columns of an episode, arrays (length, ...) and lists; the frames' numbers go on from `3 * number`."""
    rng = np.random.default_rng(number)
    at = np.arange(length)
    return {
        "numbers": [3 * number + int(i) for i in at],
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "observation.state.pose": rng.normal(size=(length, 2, 2)),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "action.raw": rng.integers(-5, 5, length),
        "next.reward": rng.normal(size=length).astype(np.float32),
        "next.done": at == length - 1 if number else np.zeros(length, bool),
        "note": [f"row {i} of {number}" for i in at],
        "timestamp": (at / FPS).astype(np.float32),
        "frame_index": at,
        "episode_index": np.full(length, number),
        "task_index": (at + number) % 2,
    }


def rows(episodes: Sequence[Mapping[str, Any]], first: int) -> pa.Table:
    """The parquet rows of episodes, numbered from `first`."""
    columns: dict[str, Any] = {}
    for key in episodes[0]:
        if key != "numbers":
            columns[key] = [v.tolist() if isinstance(v, np.ndarray) else v for e in episodes for v in e[key]]
    numbers = [n for e in episodes for n in e["numbers"]]
    columns["index"] = list(range(first, first + len(numbers)))
    columns["observation.image"] = [{"bytes": png(n), "path": f"frame_{n:06d}.png"} for n in numbers]
    types = {"observation.state": pa.list_(pa.float32(), 3), "action": pa.list_(pa.float32())}
    return pa.table({key: pa.array(values, types.get(key)) for key, values in columns.items()})


def write_parquet(file: Path, table: pa.Table, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, **options)


def make(
    root: Path,
    version: str,
    lengths: Sequence[int],
    *,
    files: Sequence[int] = (),
    videos: Sequence[str] = ("observation.images.top", "observation.images.wrist"),
    info: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Writes a dataset; returns its episodes as `episode` makes them.

    Args:
        files: v3: number of episodes in each data and video file; the wrist's files hold all of them.
        info: fields of info.json that replace the usual ones; `features` is added to.
    """
    major = int(version[1])
    episodes = [episode(i, n) for i, n in enumerate(lengths)]
    features = {k: f for k, f in FEATURES.items() if f["dtype"] != "video" or k in videos or "depth" in k}
    described: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(lengths),
        "fps": FPS,
        "chunks_size": 2,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": DATA[major],
        "video_path": VIDEO[major],
        "features": features,
    }
    described |= info or {}
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(described))
    if major == 2:
        _write_v2(root, episodes, videos)
    else:
        _write_v3(root, episodes, videos, files or [len(lengths)])
    return episodes


def _write_v2(root: Path, episodes: list[dict[str, Any]], videos: Sequence[str]) -> None:
    tasks = [json.dumps({"task_index": i, "task": task}, ensure_ascii=False) for i, task in enumerate(TASKS)]
    (root / "meta" / "tasks.jsonl").write_text("\n".join(tasks) + "\n")
    lines = [
        json.dumps({"episode_index": i, "tasks": TASKS, "length": len(e["action"])}) for i, e in enumerate(episodes)
    ]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    first = 0
    for i, e in enumerate(episodes):
        place = {"episode_chunk": i // 2, "episode_index": i}
        write_parquet(root / DATA[2].format(**place), rows([e], first))
        for key in videos:
            write_clip(root / VIDEO[2].format(**place, video_key=key), e["numbers"], fps=FPS)
        first += len(e["action"])


def _write_v3(root: Path, episodes: list[dict[str, Any]], videos: Sequence[str], files: Sequence[int]) -> None:
    table = pa.table({"task_index": [0, 1], "__index_level_0__": TASKS})
    write_parquet(root / "meta" / "tasks.parquet", table)
    described: list[dict[str, Any]] = []
    at = 0
    for i, e in enumerate(episodes):
        described.append({"episode_index": i, "length": len(e["action"]), "tasks": TASKS})
        described[-1] |= {"dataset_from_index": at, "dataset_to_index": at + len(e["action"])}
        at += len(e["action"])
    start = 0
    for number, count in enumerate(files):
        part, names = episodes[start : start + count], described[start : start + count]
        place = {"chunk_index": number // 2, "file_index": number % 2}
        first = names[0]["dataset_from_index"]
        write_parquet(root / DATA[3].format(**place), rows(part, first), row_group_size=7)
        for name in names:
            name |= {f"data/{key}": value for key, value in place.items()}
        for key in videos:
            if key != videos[-1]:
                _join(root, key, place, part, names)
        start += count
    if videos:
        _join(root, videos[-1], {"chunk_index": 0, "file_index": 0}, episodes, described)
    half = (len(described) + 1) // 2
    for i, part in enumerate((described[:half], described[half:])):
        if part:
            write_parquet(root / f"meta/episodes/chunk-000/file-{i:03d}.parquet", pa.Table.from_pylist(part))


def _join(root: Path, key: str, place: dict[str, int], episodes: list[dict], described: list[dict]) -> None:
    """Writes the episodes into one video file, one after another."""
    numbers = [n for e in episodes for n in e["numbers"]]
    write_clip(root / VIDEO[3].format(**place, video_key=key), numbers, fps=FPS)
    start = Fraction(0)
    for e, name in zip(episodes, described, strict=True):
        stop = start + Fraction(len(e["numbers"]), FPS)
        name |= {f"videos/{key}/{field}": value for field, value in place.items()}
        name |= {f"videos/{key}/from_timestamp": float(start), f"videos/{key}/to_timestamp": float(stop)}
        start = stop
