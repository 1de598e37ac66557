"""TensorBoard's event files: a TFRecord, each record behind its length, both with a masked CRC-32C.

An object of a bucket cannot be appended to. There the events of one file are numbered pieces, of which the last is put
again with each flush until it is large; TensorBoard reads the files of a folder in the order of their names.
"""

from __future__ import annotations

import abc
import struct
from pathlib import Path

import google_crc32c

from uwm_jax.errors import warn
from uwm_jax.files import Place, write_bytes
from uwm_jax.storage.errors import StorageError

PIECE_BYTES = 8 << 20  # after which the next piece begins
KEPT_BYTES = 64 << 20  # that wait in memory for a bucket which takes nothing


class Events(abc.ABC):
    """A file of events."""

    @abc.abstractmethod
    def write(self, record: bytes) -> None:
        """Adds an event; the first of a file is its version."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Lets readers see what was written. Raises OSError or StorageError where it cannot be."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes, and ends the file."""


class EventFile(Events):
    """A local file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")

    def write(self, record: bytes) -> None:
        self._file.write(framed(record))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class EventObjects(Events):
    """Objects `<place>.00000`, `<place>.00001`, ...: each begins with the version, and is whole at any time."""

    def __init__(self, place: Place):
        self._place, self._number = place, 0
        self._version = b""
        self._piece = bytearray()
        self._put = 0  # bytes of the piece that the bucket has
        self._was_told = False

    def write(self, record: bytes) -> None:
        self._version = self._version or framed(record)
        self._piece += framed(record)

    def flush(self) -> None:
        if len(self._piece) == self._put:
            return
        piece = self._place.with_name(f"{self._place.name}.{self._number:05d}")
        try:
            write_bytes(piece, bytes(self._piece))
        except StorageError as e:
            if len(self._piece) > KEPT_BYTES:
                raise
            if not self._was_told:
                self._was_told = True
                warn(f"TensorBoard's events wait in memory: {e}")
            return
        self._put = len(self._piece)
        if self._put >= PIECE_BYTES:
            self._number, self._put = self._number + 1, len(self._version)
            self._piece = bytearray(self._version)

    def close(self) -> None:
        self.flush()


def open_events(place: Place) -> Events:
    """A new file of events."""
    return EventFile(place) if isinstance(place, Path) else EventObjects(place)


def framed(record: bytes) -> bytes:
    """A record of a TFRecord."""
    length = struct.pack("<Q", len(record))
    return length + _masked_crc(length) + record + _masked_crc(record)


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
