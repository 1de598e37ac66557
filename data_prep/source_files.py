"""Reads the records of TFRecord and ArrayRecord files without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c

TRUNCATED = "file truncated"
DAMAGED = "data checksum mismatch"


def read_records(path: Path, file_format: str) -> Iterator[tuple[bytes | None, str, int]]:
    """Yields (record, "", size) per record, or (None, reason, size) for what cannot be read: a record with a wrong
    checksum is skipped, a broken frame ends the file. Sizes are shares of the file's bytes: their sum is the size
    of the file, or less where a broken frame ends it. An ArrayRecord file that is cut off anywhere has no index, so
    none of its records can be read."""
    if file_format == "tfrecord":
        yield from _read_tfrecord(path)
    else:
        yield from _read_array_record(path)


def _read_tfrecord(path: Path) -> Iterator[tuple[bytes | None, str, int]]:
    # Frame: uint64 length, uint32 masked crc of it, data, uint32 masked crc of the data.
    with path.open("rb") as f:
        while header := f.read(12):
            if len(header) < 12:
                yield None, TRUNCATED, len(header)
                return
            length, check = struct.unpack("<QI", header)
            if check != _masked_crc(header[:8]):
                yield None, "length checksum mismatch (rest of the file lost)", 12
                return
            data = f.read(length)
            footer = f.read(4)
            size = 12 + len(data) + len(footer)
            if len(data) < length or len(footer) < 4:
                yield None, TRUNCATED, size
                return
            if struct.unpack("<I", footer)[0] != _masked_crc(data):
                yield None, DAMAGED, size
                continue
            yield data, "", size


def _read_array_record(path: Path) -> Iterator[tuple[bytes | None, str, int]]:
    from array_record.python import array_record_module

    total = path.stat().st_size
    if not total:
        return
    try:
        reader: Any = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        count = reader.num_records() if reader.ok() else None
    except (RuntimeError, ValueError):
        count = None
    if count is None:
        yield None, TRUNCATED, total
        return
    for i in range(count):
        # Records may be compressed, and a damaged one has no length: equal shares are as good as any.
        size = total * (i + 1) // count - total * i // count
        try:
            record = reader.read([i])[0]
        except (RuntimeError, IndexError, ValueError):  # the format's own hashes disagree
            yield None, DAMAGED, size
            continue
        yield record, "", size
    try:
        reader.close()
    except RuntimeError:
        pass  # it repeats what a read has told


def _masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord stores it, rotated and offset."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
