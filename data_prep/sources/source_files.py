"""Reads the records of TFRecord and ArrayRecord files without TensorFlow."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c

from uwm_jax.files import Place
from uwm_jax.reading import again, is_fleeting

TRUNCATED = "file truncated"
DAMAGED = "data checksum mismatch"


def read_records(path: Path, file_format: str) -> Iterator[tuple[bytes | None, str, int]]:
    """Yields (record, "", size) per record, or (None, reason, size) for a damaged part of the file.

    A record with a wrong checksum is skipped; a broken frame ends the file. Sizes are shares of the file's bytes: they
    sum to the size of the file, or less if a broken frame ends it. A truncated ArrayRecord file has no index, so none
    of its records can be read. Transient errors are retried, as in `reading.again`.

    Raises:
        RunError: every attempt failed.
    """
    if file_format == "tfrecord":
        yield from _read_tfrecord(path)
    else:
        yield from _read_array_record(path)


def starts_with_record(path: Place) -> bool:
    """Whether a file begins with a length and its checksum, as TFRecord files do."""
    try:
        with path.open("rb") as f:
            header = f.read(12)
    except IsADirectoryError:
        return False
    return len(header) == 12 and struct.unpack("<I", header[8:])[0] == masked_crc(header[:8])


def _read_tfrecord(path: Path) -> Iterator[tuple[bytes | None, str, int]]:
    # Frame: uint64 length, uint32 masked crc of it, data, uint32 masked crc of the data.
    with path.open("rb") as f:

        def read(count: int) -> bytes:
            at = f.tell()
            return again(lambda: f.read(count) if f.seek(at) == at else b"", path)

        while header := read(12):
            if len(header) < 12:
                yield None, TRUNCATED, len(header)
                return
            length, check = struct.unpack("<QI", header)
            if check != masked_crc(header[:8]):
                yield None, "length checksum mismatch (rest of the file lost)", 12
                return
            data, footer = read(length), read(4)
            size = 12 + len(data) + len(footer)
            if len(data) < length or len(footer) < 4:
                yield None, TRUNCATED, size
                return
            if struct.unpack("<I", footer)[0] != masked_crc(data):
                yield None, DAMAGED, size
                continue
            yield data, "", size


def _read_array_record(path: Path) -> Iterator[tuple[bytes | None, str, int]]:
    total = path.stat().st_size
    if not total:
        return
    try:
        reader = again(lambda: _open_array_record(path), path)
        count = reader.num_records()
    except (RuntimeError, ValueError):
        yield None, TRUNCATED, total
        return

    def read(number: int) -> bytes:
        nonlocal reader
        try:
            return reader.read([number])[0]
        except RuntimeError as e:
            if is_fleeting(e, path):
                reader = _open_array_record(path)  # the file's handle may be stale
            raise

    for i in range(count):
        # Records may be compressed, and a damaged one has no known length: count equal shares.
        size = total * (i + 1) // count - total * i // count
        try:
            record = again(lambda i=i: read(i), path)  # type: ignore[misc]
        except (RuntimeError, IndexError, ValueError):  # the format's own hashes disagree
            yield None, DAMAGED, size
            continue
        yield record, "", size
    with contextlib.suppress(RuntimeError):  # it repeats errors of reads
        reader.close()


def _open_array_record(path: Path) -> Any:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        reader.close()  # raises the reason
        raise RuntimeError("not a complete ArrayRecord file")
    return reader


def masked_crc(data: bytes) -> int:
    """The masked (rotated and offset) CRC-32C of TFRecord."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
