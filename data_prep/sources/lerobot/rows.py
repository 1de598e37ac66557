"""Rows of a LeRobot dataset's parquet files as arrays, images and strings."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_prep.sources.lerobot.metadata import EpisodeFiles, import_pyarrow
from uwm_jax.data.chunks import EpisodeError
from uwm_jax.reading import again

_BROKEN = "unreadable parquet file"


class Rows:
    """Reads the rows of one episode after another, of which neighbours often share a file; a context manager."""

    def __init__(self, root: Path):
        self._root = root
        self._pyarrow, self._parquet = import_pyarrow()
        self._name = ""
        self._file: Any = None
        self._groups: tuple[range, tuple[str, ...]] = (range(0), ())
        self._table: Any = None

    def read(self, episode: EpisodeFiles, columns: list[str]) -> Any:
        """The episode's rows, a `pyarrow.Table` of those `columns` that the file has.

        Raises:
            EpisodeError: the file is damaged, or its rows are not those of the episode.
        """
        try:
            self._open(episode.data)
            table, start = self._read_groups(episode, columns)
        except (self._pyarrow.ArrowException, OSError) as e:
            raise EpisodeError(_BROKEN, f"{episode.data}: {str(e)[:200]}") from e
        rows = table.slice(start, None if episode.first_row is None else episode.length)
        if "episode_index" in rows.column_names:
            others = set(rows["episode_index"].to_pylist()) - {episode.number}
            if others:
                found = ", ".join(map(str, sorted(others, key=str)[:3]))
                raise EpisodeError("rows of another episode", f"{episode.data}: episode_index is {found}")
        if rows.num_rows != episode.length:
            raise EpisodeError(
                "another length", f"{episode.data}: expected {episode.length} rows, found {rows.num_rows}"
            )
        return rows

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self, name: str) -> None:
        if name == self._name:
            return
        self._close()
        file = self._root / name
        self._file = again(lambda: self._parquet.ParquetFile(file), file)
        self._name = name

    def _read_groups(self, episode: EpisodeFiles, columns: list[str]) -> tuple[Any, int]:
        """The row groups that hold the episode, and the place of its first row in them."""
        opened = self._file
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        first = episode.first_row or 0
        stop = ends[-1] if ends and episode.first_row is None else first + episode.length
        wanted = [i for i, (end, size) in enumerate(zip(ends, sizes, strict=True)) if end > first and end - size < stop]
        names = [n for n in ("episode_index", *columns) if n in opened.schema_arrow.names]
        if not wanted:
            return opened.schema_arrow.empty_table().select(names), 0
        groups = range(wanted[0], wanted[-1] + 1), tuple(names)
        if groups != self._groups:
            file = self._root / episode.data
            self._table = again(lambda: opened.read_row_groups(list(groups[0]), columns=names), file)
            self._groups = groups
        return self._table, first - (ends[wanted[0]] - sizes[wanted[0]])

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._name, self._file, self._table, self._groups = "", None, None, (range(0), ())


def numbers(key: str, column: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A column of numbers, or of lists of them nested in any depth, as (T, *shape).

    Raises:
        EpisodeError: values are missing, or of another shape.
    """
    pyarrow, _ = import_pyarrow()
    types = pyarrow.types
    values = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    values = values.chunk(0) if isinstance(values, pyarrow.ChunkedArray) else values
    length = len(values)
    while True:
        if isinstance(values, pyarrow.ExtensionArray):  # arrays of Hugging Face's datasets
            values = values.storage
        if values.null_count:
            raise EpisodeError("missing values", f"{key}: {values.null_count} of {len(values)} values are null")
        if types.is_list(values.type) or types.is_large_list(values.type):
            sizes = np.unique(values.value_lengths().to_numpy(zero_copy_only=False))
            if len(sizes) > 1:
                raise EpisodeError("another shape", f"{key}: lists of {sizes.min()} to {sizes.max()} values")
        elif not types.is_fixed_size_list(values.type):
            break
        values = values.flatten()
    try:
        return values.to_numpy(zero_copy_only=False).reshape(length, *shape)
    except (ValueError, pyarrow.ArrowException) as e:
        raise EpisodeError(
            "another shape", f"{key}: expected {shape} per step, found {len(values)} values in {length} steps"
        ) from e


def strings(key: str, column: Any) -> list[str]:
    """A column of strings, or of lists of one string; null is the empty string. EpisodeError if one is no UTF-8."""
    values = (value[0] if isinstance(value, list) and value else value for value in _values(key, column))
    return ["" if value is None or value == [] else str(value) for value in values]


def image_bytes(root: Path, key: str, column: Any, most: int | None = None) -> list[bytes]:
    """The encoded images of a column {bytes, path}, the first `most` of them: the bytes, or those of the file `path`.

    Raises:
        EpisodeError: an image has neither, or its path leads out of the dataset.
    """
    values = _values(key, column if most is None else column.slice(0, most))
    return [_image(root, key, step, value) for step, value in enumerate(values)]


def _values(key: str, column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as e:  # files seldom hold checksums
        raise EpisodeError(_BROKEN, f"{key}: a string is no UTF-8 ({e})") from e


def _image(root: Path, key: str, step: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, dict):
        raise EpisodeError("image missing", f"{key} at step {step}: {str(value)[:60]}")
    data, path = value.get("bytes"), value.get("path")
    if isinstance(data, bytes) and data:
        return data
    if not isinstance(path, str) or not path or "\0" in path:
        raise EpisodeError("image missing", f"{key} at step {step} has neither bytes nor a path")
    file = (root / path).resolve()
    if root.resolve() not in file.parents:
        raise EpisodeError("image missing", f"{key} at step {step}: {path} is no file of the dataset")
    try:
        return again(file.read_bytes, file)
    except OSError as e:
        raise EpisodeError("image missing", f"{key} at step {step}: {path}: {e.strerror}") from e
