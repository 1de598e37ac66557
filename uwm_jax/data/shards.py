"""The shards of a split: ArrayRecord files, opened when a record is first read; in a bucket, read in ranges."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import resource
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from array_record.python import array_record_module

from uwm_jax.data.direct import DirectFile, RecordPlace, read_places
from uwm_jax.data.faults import BadRecord, UnreadRecord
from uwm_jax.data.heap import keep_freed_memory
from uwm_jax.data.index import Chunk
from uwm_jax.data.names import not_the_data
from uwm_jax.data.timed import within
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import Facts, Place, facts_below, is_remote
from uwm_jax.reading import again, is_fleeting
from uwm_jax.storage.ranged import RangedFolder

# Number of shards that stay open; a reader holds a descriptor and its shard's index.
_MAX_OPEN_SHARDS = 256
_OPEN_FILES = 1 << 16  # of the process, that it asks the system for: shards of each dataset, parts of caches
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 1 << 15
_MISSING = Facts(-1, None)


class Shards:
    """Random access to the records of a split's shards; safe to use from many threads.

    Args:
        directory: of the dataset.
        entries: the shards as manifest.json lists them, with `file` and `bytes`.
        dataset: identifies the dataset in the names of bad records.
        timeout: seconds that a read of a record may take, 0 for any time.
        bear: whether a shard that is missing or has another size is no error: its records are bad.
    Raises:
        UserError: a shard is listed twice, is missing or has another size.

    Attributes:
        names: file name of each shard.
        lost: {file name: what is wrong with it} of the shards that are missing or have another size.
    """

    def __init__(
        self,
        directory: Place,
        entries: Sequence[Mapping[str, Any]],
        dataset: str,
        *,
        timeout: float = 0.0,
        bear: bool = False,
    ):
        keep_freed_memory()
        _allow_open_files()
        self._dataset, self._timeout = dataset, timeout
        self.names = [entry["file"] for entry in entries]
        self._files = [directory / name for name in self.names]  # made once: a path costs as much as 10 kB of a record
        twice = [name for name, count in collections.Counter(self.names).items() if count > 1]
        if twice:
            raise UserError(f"{directory / 'manifest.json'} lists the shard {twice[0]} twice. Copy it again.")
        # In a bucket one listing tells all sizes.
        there = facts_below(directory) if is_remote(directory) else None
        self._lost = {
            i: reason
            for i, (entry, file) in enumerate(zip(entries, self._files, strict=True))
            if (reason := self._unlike(entry, file, None if there is None else there.get(file.name, _MISSING).size))
        }
        if self._lost and not bear:
            raise UserError(next(iter(self._lost.values())))
        self.lost = {self.names[i]: reason for i, reason in self._lost.items()}
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._direct: collections.OrderedDict[int, DirectFile | None] = collections.OrderedDict()
        self._ranged = RangedFolder(directory) if is_remote(directory) else None
        self._sizes = [int(entry["bytes"]) for entry in entries]
        self._tables: dict[int, np.ndarray] = {}  # shard -> (records, 2) places, where the index does not tell them
        self._given_up: dict[tuple[int, int], str] = {}  # (shard, record) -> message, of reads that were tried again
        self._lock = threading.Lock()

    def _unlike(self, entry: Mapping[str, Any], file: Place, size: int | None) -> str:
        """How a shard's file differs from its entry; "" where it does not.

        Args:
            size: of the file, -1 where there is none; None to look.
        """
        if size is None:
            try:
                size = again(lambda: within(self._timeout, lambda: file.stat().st_size, str(file)), file)
            except FileNotFoundError:
                size = -1
        if size < 0:
            return f"{file} is missing, though manifest.json lists it. Copy it again."
        if size == entry["bytes"]:
            return ""
        if found := not_the_data(file):
            return f"{file} {found}."
        return f"{file}: expected {entry['bytes']} bytes, found {size}. Copy it again."

    def name(self, shard: int, record: int) -> str:
        """The name of a record, as bad ones are counted: the same wherever the dataset lies."""
        return f"{self._dataset}/{self.names[shard]}#{record}"

    def begin(self, chunk: Chunk) -> None:
        """Starts to read a record that `read` or `view` will take, where that saves time: from a bucket."""
        if self._ranged is None or chunk.shard in self._lost or (chunk.shard, chunk.record) in self._given_up:
            return
        if (place := chunk.place or self._known(chunk)) is not None:
            self._ranged.begin(self.names[chunk.shard], *place.range)

    def read(self, chunk: Chunk) -> bytes:
        """A record of a shard.

        Raises:
            BadRecord: it is damaged, or its checksum is not that in the index.
            UnreadRecord: it cannot be read, even after retries. It is not tried again in this process.
        """
        shard, record = chunk.shard, chunk.record
        file = self._files[shard]
        if shard in self._lost:
            raise BadRecord(self._lost[shard], self.name(shard, record))
        if (given_up := self._given_up.get((shard, record))) is not None:
            raise UnreadRecord(given_up, self.name(shard, record))
        try:
            data = again(lambda: self._read(chunk), file)
        except FileNotFoundError as e:
            raise BadRecord(f"{file} is missing. Copy it again.", self.name(shard, record)) from e
        except (RuntimeError, IndexError, ValueError) as e:
            raise BadRecord(
                f"{file}: record {record} cannot be read ({str(e)[:200]}). "
                "The file is damaged: copy it again (manifest.json has its sha256) or make the dataset again.",
                self.name(shard, record),
            ) from e
        except UserError as e:  # of the file as a whole
            raise BadRecord(str(e), self.name(shard, record)) from e
        except RunError as e:
            self._given_up[shard, record] = f"record {record}: {e}"
            raise UnreadRecord(f"record {record}: {e}", self.name(shard, record)) from e
        # ArrayRecord's own hashes detect damage, but not an intact file of another dataset.
        if google_crc32c.value(data) != chunk.crc32c:
            raise BadRecord(
                f"{file}: record {record} has another checksum than the index: the file belongs to another dataset or "
                "was overwritten. Copy it again (manifest.json has its sha256) or make the dataset again.",
                self.name(shard, record),
            )
        return data

    def view(self, chunk: Chunk) -> memoryview:
        """A record of a shard, in memory of this thread that its next call of this uses again.

        Raises:
            BadRecord, UnreadRecord: as `read`.
        """
        if (direct := self._direct_file(chunk.shard)) is not None:
            try:
                data = direct.read(chunk.place or direct.places[chunk.record])
                if google_crc32c.value(data) == chunk.crc32c:
                    return data.data
            except (OSError, ValueError, IndexError):
                pass
            with self._lock:  # another try opens the file again
                self._direct.pop(chunk.shard, None)
        return memoryview(self.read(chunk))

    def _direct_file(self, shard: int) -> DirectFile | None:
        """The shard as a file whose records can be read without ArrayRecord's reader; None where they cannot."""
        if shard in self._lost or self._ranged or self._timeout:  # a read with a time limit may go on in another thread
            return None
        with self._lock:
            if shard in self._direct:
                self._direct.move_to_end(shard)
                return self._direct[shard]
        try:
            found = DirectFile(os.fspath(self._files[shard]))
        except OSError:
            found = None
        with self._lock:
            found = self._direct.setdefault(shard, found)
            if len(self._direct) > _MAX_OPEN_SHARDS:
                self._direct.popitem(last=False)
            return found

    def _read(self, chunk: Chunk) -> bytes:
        shard, record = chunk.shard, chunk.record
        if self._ranged is not None:
            place = chunk.place or self._place_in_file(self._ranged, chunk)
            return place.record(self._ranged.read(self.names[shard], *place.range, self._timeout))

        def read() -> bytes:
            return self._reader(shard).read([record])[0]

        try:
            return within(self._timeout, read, f"{self._files[shard]}, record {record}") if self._timeout else read()
        except (RuntimeError, TimeoutError):
            with self._lock:  # reopened by the next attempt: the file's handle may be stale
                self._readers.pop(shard, None)
            raise

    def _known(self, chunk: Chunk) -> RecordPlace | None:
        """The place of a record whose shard's table has been read."""
        table = self._tables.get(chunk.shard)
        return None if table is None or chunk.record >= len(table) else RecordPlace(*table[chunk.record].tolist())

    def _place_in_file(self, ranged: RangedFolder, chunk: Chunk) -> RecordPlace:
        """The place of a record by its shard's table, which is read when it is first needed."""
        name, size = self.names[chunk.shard], self._sizes[chunk.shard]
        if chunk.shard not in self._tables:
            places = read_places(size, lambda start, stop: ranged.read(name, start, stop, self._timeout))
            self._tables[chunk.shard] = np.asarray(places, np.int64).reshape(-1, 2)
        if (place := self._known(chunk)) is None:
            raise IndexError(f"the file has {len(self._tables[chunk.shard])} records")
        return place

    def close(self) -> None:
        """Closes the open shards; a later read opens them again."""
        if self._ranged:
            self._ranged.forget()
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()
            self._direct.clear()

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = self._open(shard)  # outside of the lock: a file that hangs must not stop other reads
        with self._lock:
            reader = self._readers.setdefault(shard, reader)
            # The evicted reader is closed by its last user, not here: another thread may be reading from it.
            if len(self._readers) > _MAX_OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader

    def _open(self, shard: int) -> Any:
        file = self._files[shard]
        reader = array_record_module.ArrayRecordReader(
            os.fspath(file), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
        )
        if not reader.ok():
            try:
                reader.close()  # raises the reason
            except RuntimeError as e:
                if is_fleeting(e, file):
                    raise
                if os.strerror(errno.EMFILE) in str(e):
                    raise RunError(f"{file}: {os.strerror(errno.EMFILE)}. Allow more with `ulimit -n`.") from e
            what = "is not a complete ArrayRecord file" if file.exists() else "is missing"
            raise UserError(f"{file} {what}. Copy it again.")
        return reader


def _allow_open_files() -> None:
    """Raises this process's soft limit of open files, often 1024, which are four datasets' shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
