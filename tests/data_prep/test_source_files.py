"""Files that are cut, empty or damaged: what is left is read, and nothing raises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from data_prep.source_files import read_records

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
