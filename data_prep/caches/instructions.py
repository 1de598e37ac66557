"""Finds the strings of a training dataset's episodes and steps, such as instructions.

Strings of steps lie in the records, next to the images, so every record is read once. Work is cut into tasks of
consecutive episodes; the result of each is a file, so that a killed job reads no record twice.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from data_prep.jobs.workers import pool
from uwm_jax.data import example
from uwm_jax.data.records import Dataset
from uwm_jax.errors import UserError
from uwm_jax.files import writing

_TASK_RECORDS = 2048  # about 1 GB of three cameras at 180x320
_LIKELY = ("language", "instruction", "caption", "task_description", "label")  # in names of keys with instructions


@dataclasses.dataclass(frozen=True)
class Runs:
    """The strings of a key in a split, or in some of its episodes: runs of equal consecutive steps of an episode.

    Attributes:
        first: (R,) int64 first step of each run, counted over all episodes of the split, increasing.
        row: (R,) int32 number of its string in `texts`.
        texts: the distinct strings.
    """

    first: np.ndarray
    row: np.ndarray
    texts: list[str]


def string_keys(dataset: Dataset) -> tuple[list[str], list[str]]:
    """(step keys, episode-level keys) of single strings, sorted."""
    features = dataset.manifest["step_features"].items()
    single: tuple[list[int], ...] = ([], [1])  # shapes
    steps = sorted(key for key, f in features if f["dtype"] == "string" and f["shape"] in single and not f["image"])
    return steps, dataset.text_keys()


def chosen_keys(dataset: Dataset, wanted: Sequence[str]) -> list[str]:
    """The keys that `--keys` names, in full; without it those whose name speaks of language.

    Raises:
        UserError: a key is not one of strings, or none is found.
    """
    steps, episodes = string_keys(dataset)
    known = [*steps, *(key for key in episodes if key not in steps)]
    if not wanted:
        found = [key for key in known if any(part in key.rpartition("/")[2].lower() for part in _LIKELY)]
        if not found:
            raise UserError(
                f"{dataset.directory}: no key whose name speaks of language; name the keys to embed by --keys. Keys of "
                f"strings: {', '.join(known) or 'none'}."
            )
        return sorted(found)
    found = []
    for name in wanted:
        full = next((k for k in (name, f"observation/{name}", f"episode_metadata/{name}") if k in known), None)
        if full is None:
            raise UserError(
                f"--keys: {dataset.directory} has no key {name!r} of strings; it has: {', '.join(known) or 'none'}."
            )
        found.append(full)
    return sorted(set(found))


@dataclasses.dataclass(frozen=True)
class _Task:
    directory: str
    split: str
    keys: tuple[str, ...]
    start: int  # episodes [start, stop)
    stop: int
    records: int
    file: Path


def find(dataset: Dataset, keys: Sequence[str], folder: Path, workers: int) -> dict[str, Runs]:
    """{key: the strings of all steps of a split}.

    Args:
        keys: of `chosen_keys`.
        folder: for the results of tasks; those that are there are not made again.
    """
    steps, _ = string_keys(dataset)
    found = {key: _of_episodes(dataset, key) for key in keys if key not in steps}
    if in_records := tuple(key for key in keys if key in steps):
        tasks = list(_tasks(dataset, in_records, folder))
        _run([task for task in tasks if not task.file.exists()], workers, dataset.split)
        parts = [_load(task.file, in_records) for task in tasks]
        found |= {key: _joined([part[key] for part in parts]) for key in in_records}
    return {key: found[key] for key in keys}


def _of_episodes(dataset: Dataset, key: str) -> Runs:
    rows = _Rows()
    row = [rows.number(text) for text in dataset.episode_texts(key)]
    return Runs(dataset.episode_starts, np.asarray(row, np.int32), rows.texts)


def _tasks(dataset: Dataset, keys: tuple[str, ...], folder: Path) -> Iterator[_Task]:
    records = -(-dataset.episode_lengths // dataset.chunk_steps)
    ends = np.cumsum(records)
    start = 0
    for number in itertools.count():
        if start == dataset.num_episodes:
            return
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _TASK_RECORDS, side="right")))
        count = int(ends[stop - 1]) - done
        file = folder / f"{dataset.split}.{number:06d}.npz"
        yield _Task(str(dataset.directory), dataset.split, keys, start, stop, count, file)
        start = stop


def _run(tasks: Sequence[_Task], workers: int, split: str) -> None:
    with tqdm(total=sum(task.records for task in tasks), desc=f"reading strings of {split}", unit=" records") as bar:
        processes = min(workers, len(tasks))
        if processes <= 1:
            for task in tasks:
                _find(task, bar)
            return
        with pool(processes) as executor:
            futures = {executor.submit(_find, task): task for task in tasks}
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.update(futures[future].records)
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise


def _find(task: _Task, bar: tqdm | None = None) -> None:
    dataset = Dataset(task.directory, task.split)
    names = {key: b"steps/" + key.encode() for key in task.keys}
    rows = {key: _Rows() for key in task.keys}
    runs: dict[str, list[tuple[int, int]]] = {key: [] for key in task.keys}
    for episode in range(task.start, task.stop):
        length, begin = int(dataset.episode_lengths[episode]), int(dataset.episode_starts[episode])
        for chunk in range(-(-length // dataset.chunk_steps)):
            first = chunk * dataset.chunk_steps
            count = min(dataset.chunk_steps, length - first)
            record = memoryview(dataset.record(episode, chunk))
            try:
                fields = example.scan(record, set(names.values()))
                for key, name in names.items():
                    spans = example.bytes_spans(record, fields[name]) if name in fields else []
                    texts = [bytes(record[slice(*span)]) for span in spans] or [b""] * count
                    if len(texts) != count:
                        raise ValueError(f"{key}: {len(texts)} strings for {count} steps")
                    for step, text in enumerate(texts, begin + first):
                        row = rows[key].number(text.decode(errors="replace"))
                        if step == begin or row != runs[key][-1][1]:
                            runs[key].append((step, row))
            except ValueError as e:
                raise UserError(
                    f"{dataset.directory / dataset.locate(episode, first).shard}: episode {episode}, steps from "
                    f"{first}: {e}. The record does not match manifest.json: make the dataset again."
                ) from e
            if bar is not None:
                bar.update()
    dataset.close()
    with writing(task.file, "wb") as file:
        _save(file, {key: Runs(*_columns(runs[key]), rows[key].texts) for key in task.keys})


def _columns(runs: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(runs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1].astype(np.int32)


class _Rows:
    """Numbers of strings, in the order in which they are met; white space alone is the empty string."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self._numbers.setdefault(text if text.strip() else "", len(self._numbers))

    @property
    def texts(self) -> list[str]:
        return list(self._numbers)


def packed(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of all strings in UTF-8, concatenated, uint8; (n,) int64 where each ends)."""
    encoded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(data) for data in encoded], dtype=np.int64)


def _unpacked(data: np.ndarray, ends: np.ndarray) -> list[str]:
    raw = data.tobytes()
    return [raw[a:b].decode() for a, b in itertools.pairwise([0, *ends.tolist()])]


def _save(file: IO[Any], found: dict[str, Runs]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for key, runs in found.items():
        data, ends = packed(runs.texts)
        arrays |= {f"{key}/first": runs.first, f"{key}/row": runs.row, f"{key}/utf8": data, f"{key}/ends": ends}
    np.savez(file, allow_pickle=False, **arrays)


def _load(file: Path, keys: Iterable[str]) -> dict[str, Runs]:
    with np.load(file, allow_pickle=False) as stored:
        return {
            key: Runs(
                stored[f"{key}/first"], stored[f"{key}/row"], _unpacked(stored[f"{key}/utf8"], stored[f"{key}/ends"])
            )
            for key in keys
        }


def _joined(parts: Sequence[Runs]) -> Runs:
    rows = _Rows()
    row = [np.asarray([rows.number(text) for text in part.texts], np.int32)[part.row] for part in parts]
    if not parts:
        return Runs(np.zeros(0, np.int64), np.zeros(0, np.int32), [])
    return Runs(np.concatenate([part.first for part in parts]), np.concatenate(row), rows.texts)


def counts(runs: Runs, episode_starts: np.ndarray, steps: int) -> dict[str, int]:
    """How many episodes and steps of a split have a string, an empty one, or change it: for people."""
    lengths = np.diff(np.append(runs.first, steps))
    empty = np.asarray([not text for text in runs.texts], bool)[runs.row] if len(runs.row) else np.zeros(0, bool)
    episode = np.searchsorted(episode_starts, runs.first, side="right") - 1
    of_episode = collections.Counter(episode.tolist())
    return {
        "steps": int(steps),
        "empty_steps": int(lengths[empty].sum()),
        "episodes": len(of_episode),
        "empty_episodes": len(of_episode) - len(np.unique(episode[~empty])),
        "changing_episodes": sum(count > 1 for count in of_episode.values()),
    }
