"""Files that are cut, empty or damaged: what is left is read, and nothing raises."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from data_prep.sources.source_files import read_records
from uwm_jax import reading
from uwm_jax.errors import RunError

RECORDS = [np.random.default_rng(i).bytes(300 + 50 * i) for i in range(4)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("records") / "whole"
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    for record in RECORDS:
        writer.write(record)
    writer.close()
    return file.read_bytes()


def test_an_array_record_file_that_is_cut_anywhere_has_nothing_to_read(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cut"
    for end in [*range(1, len(whole), len(whole) // 60), len(whole) - 1]:
        file.write_bytes(whole[:end])
        assert list(read_records(file, "array_record")) == [(None, "file truncated", end)], end
    file.write_bytes(b"")
    assert list(read_records(file, "array_record")) == []


def test_flipped_bytes_of_an_array_record_cost_the_records_that_they_lie_in(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "flipped"
    for at in range(0, len(whole), len(whole) // 150):
        data = bytearray(whole)
        data[at] ^= 16
        file.write_bytes(data)
        found = list(read_records(file, "array_record"))
        assert all(record in (None, RECORDS[i]) for i, (record, _, _) in enumerate(found)), at
        assert found == [(None, "file truncated", len(whole))] or len(found) == len(RECORDS), at
    data = bytearray(whole)
    data[whole.index(RECORDS[1]) + 5] ^= 16
    file.write_bytes(data)
    assert [record for record, _, _ in read_records(file, "array_record")] == [RECORDS[0], None, *RECORDS[2:]]


@pytest.mark.parametrize("fails", [2, 9])
def test_a_disk_that_fails_for_a_moment_costs_no_record(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """The library tells the system's error in its text, as it tells damage."""
    monkeypatch.setattr(reading, "AGAIN_SECONDS", (0.0, 0.0, 0.0))
    file = tmp_path / "file"
    file.write_bytes(whole)
    library, left = array_record_module.ArrayRecordReader, [fails]

    class Failing:
        def __init__(self, *arguments: str):
            self._reader = library(*arguments)

        def __getattr__(self, name: str):
            return getattr(self._reader, name)

        def read(self, numbers: list[int]) -> list[bytes]:
            if numbers == [2] and left[0]:
                left[0] -= 1
                raise RuntimeError("Reading failed: Input/output error; reading file")
            return self._reader.read(numbers)

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", Failing)
    if fails == 2:
        assert [record for record, _, _ in read_records(file, "array_record")] == RECORDS
        assert left == [0]
    else:
        with pytest.raises(RunError, match="cannot be read: .*Input/output error"):
            list(read_records(file, "array_record"))


def test_a_tfrecord_is_read_on_where_the_disk_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorflow.io import TFRecordWriter

    monkeypatch.setattr(reading, "AGAIN_SECONDS", (0.0, 0.0, 0.0))
    path = tmp_path / "file"
    with TFRecordWriter(str(path)) as writer:
        for record in RECORDS:
            writer.write(record)
    calls = []

    class Failing(io.FileIO):
        def readinto(self, buffer) -> int:
            calls.append(self.tell())
            if len(calls) % 3 == 2:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(buffer)

    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(Failing(self), 100))
    assert [record for record, _, _ in read_records(path, "tfrecord")] == RECORDS
    assert len(calls) > 8
