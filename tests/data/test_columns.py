"""Columns that stay on disk: the same values as in memory, and no others once the file changes."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from uwm_jax import reading
from uwm_jax.data import columns
from uwm_jax.data.columns import BLOCK, DiskColumn, WrongChecksum, open_column
from uwm_jax.data.faults import UnreadRecord
from uwm_jax.data.records import checksum
from uwm_jax.data.stats import column_stats
from uwm_jax.errors import UserError


@pytest.fixture
def values() -> np.ndarray:
    """Some blocks of rows of which none begins where a block does."""
    return np.random.default_rng(0).normal(size=(12_345, 7)).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path, values: np.ndarray) -> Path:
    np.save(tmp_path / "action.npy", values)
    return tmp_path / "action.npy"


def test_rows_are_those_of_the_array(file: Path, values: np.ndarray) -> None:
    column = open_column(file, checksum(file), in_memory=False)
    assert isinstance(column, DiskColumn)
    assert (len(column), column.shape, column.dtype) == (12_345, (12_345, 7), np.float32)
    assert file.stat().st_size > 5 * BLOCK
    for rows in (slice(None), slice(2_300, 9_999), slice(5, 5), slice(12_000, 99_999), slice(7, 3)):
        np.testing.assert_array_equal(column[rows], values[rows])
    scattered = np.random.default_rng(1).integers(0, len(values), 500)
    for chosen in ([5, 6, 7, 7, 9], [12_344], [0, 12_344, 3], [], scattered, range(0, 12_345, 99)):
        np.testing.assert_array_equal(column[chosen], values[np.asarray(chosen, np.int64)])
    for outside in ([12_345], [-1, 3]):
        with pytest.raises(IndexError):
            column[outside]


def test_statistics_are_the_same_from_disk(file: Path, values: np.ndarray) -> None:
    assert column_stats(open_column(file, checksum(file), in_memory=False)) == column_stats(values)


def test_a_wrong_checksum_is_found_at_once(file: Path) -> None:
    for in_memory in (True, False):
        with pytest.raises(WrongChecksum):
            open_column(file, checksum(file) ^ 1, in_memory=in_memory)


def test_a_file_that_changes_later_is_found_where_it_did(file: Path, values: np.ndarray) -> None:
    column = open_column(file, checksum(file), in_memory=False)
    with Path(file).open("r+b") as f:
        f.seek(2 * BLOCK + 100)
        f.write(b"other")
    with pytest.raises(UserError, match=rf"action.npy changed while it was in use: bytes {2 * BLOCK} to {3 * BLOCK}"):
        column[:]
    with pytest.raises(UserError, match="changed while"):
        column[[2 * BLOCK // 28 + 4]]
    np.testing.assert_array_equal(column[[0, 12_344]], values[[0, 12_344]])  # blocks that are as they were
    with Path(file).open("r+b") as f:
        f.truncate(3 * BLOCK)
    with pytest.raises(UserError, match="changed while"):
        column[[12_344]]


def test_a_file_renamed_over_it_is_another(file: Path, values: np.ndarray) -> None:
    column = open_column(file, checksum(file), in_memory=False)
    other = Path(file).with_name("other.npy")
    np.save(other, 0 * values)
    other.rename(file)
    np.testing.assert_array_equal(column[:], values)


def test_other_files_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "order.npy", np.asfortranarray(values))
    (tmp_path / "text.npy").write_text("no npy")
    for name in ("order.npy", "text.npy"):
        for in_memory in (True, False):
            file = tmp_path / name
            with pytest.raises(ValueError):
                open_column(file, checksum(file), in_memory=in_memory)


def test_a_read_that_was_given_up_is_not_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AGAIN_SECONDS", (0.0, 0.0, 0.0))
    column, calls = open_column(file, checksum(file), in_memory=False), list[int]()

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        calls.append(offset)
        raise OSError(errno.EIO, "dead")

    monkeypatch.setattr(columns.os, "pread", pread)
    for _ in range(2):
        with pytest.raises(UnreadRecord, match="4 attempts"):
            column[[3, 4]]
    assert len(calls) == 4
    with pytest.raises(UnreadRecord):
        column[[12_000]]
    assert len(calls) == 8, "another block"
