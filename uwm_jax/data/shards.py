"""The shards of a split: ArrayRecord files, opened when a record is first read."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
from array_record.python import array_record_module
from etils import epath

from uwm_jax.data.names import not_the_data
from uwm_jax.errors import UserError
from uwm_jax.reading import again, is_fleeting

# Number of shards that stay open; a reader holds a descriptor and its shard's index.
_MAX_OPEN_SHARDS = 256
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 1 << 15


class Shards:
    """Random access to the records of a split's shards; safe to use from many threads.

    Args:
        directory: of the dataset.
        entries: the shards as manifest.json lists them, with `file` and `bytes`.
    Raises:
        UserError: a shard is missing or has another size.

    Attributes:
        names: file name of each shard.
    """

    def __init__(self, directory: epath.Path, entries: Sequence[Mapping[str, Any]]):
        self._directory = directory
        self.names = [entry["file"] for entry in entries]
        for entry in entries:
            file = directory / entry["file"]
            try:
                size = again(lambda file=file: file.stat().length, file)  # type: ignore[misc]
            except FileNotFoundError as e:
                raise UserError(f"{file} is missing, though manifest.json lists it. Copy it again.") from e
            if size != entry["bytes"]:
                if found := not_the_data(file):
                    raise UserError(f"{file} {found}.")
                raise UserError(f"{file}: expected {entry['bytes']} bytes, found {size}. Copy it again.")
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, record: int, crc32c: int) -> bytes:
        """A record of a shard.

        Raises:
            UserError: it is damaged, or its checksum is not that in the index.
            RunError: it cannot be read, even after retries.
        """
        file = self._directory / self.names[shard]
        try:
            data = again(lambda: self._read(shard, record), file)
        except (RuntimeError, IndexError, ValueError) as e:
            raise UserError(
                f"{file}: record {record} cannot be read ({str(e)[:200]}). "
                "The file is damaged: copy it again (manifest.json has its sha256) or make the dataset again."
            ) from e
        # ArrayRecord's own hashes detect damage, but not an intact file of another dataset.
        if google_crc32c.value(data) != crc32c:
            raise UserError(
                f"{file}: record {record} has another checksum than the index: the file belongs to another dataset or "
                "was overwritten. Copy it again (manifest.json has its sha256) or make the dataset again."
            )
        return data

    def _read(self, shard: int, record: int) -> bytes:
        try:
            return self._reader(shard).read([record])[0]
        except RuntimeError:
            with self._lock:  # reopened by the next attempt: the file's handle may be stale
                self._readers.pop(shard, None)
            raise

    def close(self) -> None:
        """Closes the open shards; a later read opens them again."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
            file = self._directory / self.names[shard]
            reader = array_record_module.ArrayRecordReader(
                os.fspath(file), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
            )
            if not reader.ok():
                try:
                    reader.close()  # raises the reason
                except RuntimeError as e:
                    if is_fleeting(e, file):
                        raise
                raise UserError(f"{file} is not a complete ArrayRecord file. Copy it again.")
            self._readers[shard] = reader
            # The evicted reader is closed by its last user, not here: another thread may be reading from it.
            if len(self._readers) > _MAX_OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader
