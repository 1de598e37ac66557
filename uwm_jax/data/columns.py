"""Columns of a split: numeric values of all its steps, verified by the checksum in manifest.json.

A small column is read into memory and is independent of the file from then on. A large one stays on disk: its file is
verified in one pass when it is opened, and each block again whenever rows of it are read, so that a file that is
overwritten during a run is detected.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from uwm_jax.data.faults import BadRecord, UnreadRecord
from uwm_jax.data.timed import within
from uwm_jax.errors import RunError
from uwm_jax.files import Place
from uwm_jax.reading import again

BLOCK = 1 << 16  # bytes; a row is in one or two blocks


class WrongChecksum(Exception):
    """The file's contents are not those that were written."""


class DiskColumn:
    """A column on disk: `len`, and copies of rows by a slice with step 1 or a list of row numbers.

    Args:
        file: an npy of format 1.0 on a local disk.
        crc32c: of the file.
        name: of the column, as bad records are named; by default the file's.
        timeout: seconds that a read may take before it is tried again; 0 for any time.
    Raises:
        WrongChecksum: the checksum differs.
        ValueError: not an npy of this format.
        OSError: it cannot be read.

    Attributes:
        shape, dtype: of the column.
    """

    def __init__(self, file: Path, crc32c: int, name: str = "", timeout: float = 0.0):
        self._path, self._name, self._timeout = file, name or file.name, timeout
        self._file = open(file, "rb", buffering=0)  # noqa: SIM115 - stays open: a file renamed over it is ignored
        found, blocks = 0, list[int]()
        while data := os.pread(self._file.fileno(), BLOCK, BLOCK * len(blocks)):
            found = google_crc32c.extend(found, data)
            blocks.append(google_crc32c.value(data))
        if found != crc32c:
            raise WrongChecksum
        self._blocks = np.asarray(blocks, np.uint32)
        self._given_up: dict[tuple[int, int], str] = {}  # (first, last + 1 block) -> message, of reads
        self.shape, self.dtype, self._start = npy_header(os.pread(self._file.fileno(), BLOCK, 0))
        self._row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Values of these rows, (n, ...).

        Raises:
            BadRecord: the file has changed since the column was opened.
            UnreadRecord: it cannot be read, even after retries. The same read is not tried again in this process.
        """
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._read(start, max(start, stop))
        wanted = np.asarray(rows, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a column of {len(self)}")
        values = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        order = np.argsort(wanted, kind="stable")
        piece = max(1, 4 * BLOCK // self._row_bytes)  # rows per read: those of a window are adjacent
        while len(order):
            low = int(wanted[order[0]])
            count = int(np.searchsorted(wanted[order], low + piece))
            taken, order = order[:count], order[count:]
            values[taken] = self._read(low, int(wanted[taken[-1]]) + 1)[wanted[taken] - low]
        return values

    def _read(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        begin, end = (self._start + row * self._row_bytes for row in (start, stop))
        first, last = begin // BLOCK, -(-end // BLOCK)
        if (given_up := self._given_up.get((first, last))) is not None:
            raise UnreadRecord(given_up, f"{self._name}#{first}")
        try:
            data = again(
                lambda: within(
                    self._timeout, lambda: self._pread((last - first) * BLOCK, first * BLOCK), str(self._path)
                ),
                self._path,
            )
        except RunError as e:
            self._given_up[first, last] = str(e)
            raise UnreadRecord(str(e), f"{self._name}#{first}") from e
        for i in range(first, last):
            if google_crc32c.value(data[(i - first) * BLOCK : (i - first + 1) * BLOCK]) != self._blocks[i]:
                raise BadRecord(
                    f"{self._path} changed while it was in use: bytes {i * BLOCK} to {(i + 1) * BLOCK} differ "
                    "from those at the start. Copy the file again and rerun the same command.",
                    f"{self._name}#{i}",
                )
        values = np.frombuffer(data, self.dtype, (stop - start) * math.prod(self.shape[1:]), begin - first * BLOCK)
        return values.reshape(stop - start, *self.shape[1:])

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), count, offset)
        except OSError:  # its handle may be stale; checksums show whether the file is the same
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115
            raise


Column = np.ndarray | DiskColumn


def open_column(file: Place, crc32c: int, name: str = "", *, in_memory: bool, timeout: float = 0.0) -> Column:
    """The column of an npy file of format 1.0, read-only; a file in a bucket is always read into memory.

    Arguments are those of `DiskColumn`.

    Raises:
        WrongChecksum: its checksum is not `crc32c`.
        ValueError: not an npy of this format.
        OSError: it cannot be read.
    """
    if not in_memory and isinstance(file, Path):
        return DiskColumn(file, crc32c, name, timeout)
    data = file.read_bytes()
    if google_crc32c.value(data) != crc32c:
        raise WrongChecksum
    shape, dtype, start = npy_header(data)
    return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)


def npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, offset of the values) of the bytes of an npy file."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("expected an npy file of format 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if is_fortran:
        raise ValueError("expected an npy file in C order")
    return shape, dtype, stream.tell()
