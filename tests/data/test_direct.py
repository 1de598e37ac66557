"""Records that are read without ArrayRecord's reader are those that it reads; other files are left to it."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from uwm_jax.data import shards
from uwm_jax.data.direct import DirectFile, read_places
from uwm_jax.data.index import Chunk

BLOCK = 1 << 16
PLAIN = "group_size:1,uncompressed"


def write(file: Path, records: list[bytes], options: str = PLAIN) -> str:
    writer = array_record_module.ArrayRecordWriter(str(file), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(file)


def some_records(seed: int) -> list[bytes]:
    """Of sizes around those of blocks and of numbers of one, two and three bytes, so that chunks begin anywhere."""
    rng = np.random.default_rng(seed)
    sizes = [1, 127, 128, 16_383, 16_384, *(BLOCK - k for k in (24, 40, 64, 65, 107, 108, 109)), 3 * BLOCK + 17]
    sizes += rng.integers(1, 2 * BLOCK, 12).tolist()
    return [rng.bytes(size) for size in rng.permutation(sizes)]


@pytest.mark.parametrize("seed", range(4))
def test_records_are_those_that_were_written(tmp_path, seed):
    records = some_records(seed)
    file = DirectFile(write(tmp_path / "file", records))
    for number in np.random.default_rng(seed).permutation(len(records)).tolist():
        assert file.read(file.places[number]).tobytes() == records[number]


@pytest.mark.parametrize("seed", range(4))
def test_the_range_of_a_place_holds_its_record(tmp_path, seed):
    records = some_records(seed)
    path = Path(write(tmp_path / "file", records))
    data = path.read_bytes()
    places = read_places(len(data), lambda start, stop: data[start:stop])
    assert places == DirectFile(str(path)).places
    assert [place.record(data[slice(*place.range)]) for place in places] == records


def test_a_large_record_takes_several_calls(tmp_path, monkeypatch):
    monkeypatch.setattr("uwm_jax.data.direct._MOST_PARTS", 6)
    records = [np.random.default_rng(0).bytes(9 * BLOCK), b"x" * 5 * BLOCK]
    file = DirectFile(write(tmp_path / "file", records))
    assert [file.read(place).tobytes() for place in file.places] == records


def test_threads_have_memory_of_their_own(tmp_path):
    records = [bytes([i]) * 5000 for i in range(2)]
    file = DirectFile(write(tmp_path / "file", records))
    mine = file.read(file.places[0])
    thread = threading.Thread(target=lambda: file.read(file.places[1]))
    thread.start()
    thread.join()
    assert mine.tobytes() == records[0]
    assert file.read(file.places[1]).base is mine.base, "used again by this thread"


@pytest.mark.parametrize("options", ["group_size:1,zstd", "group_size:2,uncompressed"])
def test_other_forms_are_refused(tmp_path, options):
    with pytest.raises(ValueError):
        DirectFile(write(tmp_path / "file", [b"a" * 1000, b"b" * 1000, b"c"], options)).places  # noqa: B018


def test_what_is_no_such_file_is_refused(tmp_path):
    path = Path(write(tmp_path / "file", some_records(0)))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for broken in (b"", data[:-1], data[:-BLOCK], data[BLOCK:], bytes(len(data)), rng.bytes(len(data))):
        path.write_bytes(broken)
        with pytest.raises(ValueError):
            DirectFile(str(path)).places  # noqa: B018
    with pytest.raises(OSError):
        DirectFile(str(tmp_path / "none"))


def test_files_are_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("reads /proc")
    path = write(tmp_path / "file", [b"a"])
    files = [DirectFile(path) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    files.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_view_is_the_verified_record_and_falls_back(tmp_path, monkeypatch):
    import google_crc32c

    records = some_records(1)
    path = Path(write(tmp_path / "file", records))
    entry = {"file": "file", "bytes": path.stat().st_size, "records": len(records)}
    opened = shards.Shards(tmp_path, [entry], "d")
    sums = [google_crc32c.value(record) for record in records]
    assert all(bytes(opened.view(Chunk(0, i, sums[i]))) == records[i] for i in range(len(records)))
    assert not opened._readers, "ArrayRecord's reader was not asked"
    data = bytearray(path.read_bytes())
    number = max(range(len(records)), key=lambda i: len(records[i]))
    data[data.find(records[number][1000:1100]) + 50] ^= 1
    path.write_bytes(data)
    for i in range(len(records)):
        if i == number:
            with pytest.raises(shards.BadRecord, match=f"file: record {i} cannot be read"):
                opened.view(Chunk(0, i, sums[i]))
        else:
            assert bytes(opened.view(Chunk(0, i, sums[i]))) == records[i]
    write(path, records, "group_size:1,zstd")
    opened = shards.Shards(tmp_path, [entry | {"bytes": path.stat().st_size}], "d")
    assert bytes(opened.view(Chunk(0, 3, sums[3]))) == records[3] and opened._readers


def test_where_the_index_tells_the_places_no_table_is_read(tmp_path, monkeypatch):
    """A table costs as much as a window, and with more shards than may be open each window opens one."""
    import google_crc32c

    records = some_records(1)
    path = Path(write(tmp_path / "file", records))
    places = DirectFile(str(path)).places
    opened = shards.Shards(tmp_path, [{"file": "file", "bytes": path.stat().st_size, "records": len(records)}], "d")
    monkeypatch.delattr("uwm_jax.data.direct.read_places")
    for number, (record, place) in enumerate(zip(records, places, strict=True)):
        assert bytes(opened.view(Chunk(0, number, google_crc32c.value(record), place))) == record
    assert not opened._readers, "ArrayRecord's reader was not asked"


@pytest.fixture
def few_files() -> Iterator[Callable[[], None]]:
    """A function that lets the process open no more than five files more, by its soft limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit() -> None:
        descriptor = os.open(os.devnull, os.O_RDONLY)  # the lowest that is free
        os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 5, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_shards_are_open_than_the_soft_limit_allows(tmp_path, few_files, monkeypatch):
    import google_crc32c

    entries = []
    for number in range(20):
        size = os.path.getsize(write(tmp_path / f"file{number}", [bytes([number])]))
        entries.append({"file": f"file{number}", "bytes": size, "records": 1})
    chunks = [Chunk(number, 0, google_crc32c.value(bytes([number]))) for number in range(20)]
    few_files()
    opened = shards.Shards(tmp_path, entries, "d")
    assert [bytes(opened.view(chunk)) for chunk in chunks] == [bytes([number]) for number in range(20)]
    opened.close()
    monkeypatch.setattr(shards, "_allow_open_files", lambda: None)
    few_files()
    opened = shards.Shards(tmp_path, entries, "d")
    with pytest.raises(shards.UnreadRecord, match=r"file\d+: Too many open files. Allow more with `ulimit -n`"):
        for chunk in chunks:
            opened.view(chunk)
