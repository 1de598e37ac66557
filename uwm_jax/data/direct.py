"""Reads records of an uncompressed ArrayRecord file straight into memory that is used again, or in ranges of bytes.

ArrayRecord's reader copies a record three times, into fresh memory. Where each record lies by itself and as it is
(`group_size:1,uncompressed`), one system call puts it where it is used, and one range of a bucket's object has it.
Nothing here verifies a record: the caller compares its checksum, and reads what does not fit through ArrayRecord's
reader, which says what is wrong.

Riegeli's file format: 64 KiB blocks, each beginning with a header of 24 bytes, through which chunks run; a chunk is a
header of 40 bytes and its data. ArrayRecord adds a chunk with the place of each record's chunk, and in the last block
one with the place of that chunk (riegeli: doc/riegeli_records_file_format.md; array_record: cpp/layout.proto).
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from uwm_jax.data.example import read_varint

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_BLOCK_DATA = _BLOCK - _BLOCK_HEADER
_MOST_PARTS = 512  # of a system call, which takes 1024
_SPARE = 16  # blocks that the memory of a thread grows by, at least
_LARGEST_TABLE = 1 << 26  # bytes of the places of a file's records


class RecordPlace(NamedTuple):
    """The place of a record in its file.

    Attributes:
        begin: offset of its chunk.
        size: bytes of the record.
    """

    begin: int
    size: int

    @property
    def head(self) -> int:
        """Bytes of the chunk before the record: its header, a byte for no compression, the sizes' length, the size."""
        varint_bytes = max(1, -(-self.size.bit_length() // 7))  # whose own length takes a byte
        return _CHUNK_HEADER + 2 + varint_bytes

    @property
    def range(self) -> tuple[int, int]:
        """[start, stop) of the bytes of the file that hold the chunk."""
        return self.begin, _end(self.begin, self.head + self.size)

    def record(self, data: bytes) -> bytes:
        """The record in the bytes of `range`, unverified."""
        return payload(data, self.begin, self.head)


def _end(begin: int, size: int) -> int:
    """Where `size` bytes end that begin at `begin`, with the headers of the blocks through which they run."""
    block, offset = divmod(begin, _BLOCK)
    last = block * _BLOCK_DATA + max(offset - _BLOCK_HEADER, 0) + size - 1
    block, offset = divmod(last, _BLOCK_DATA)
    return block * _BLOCK + _BLOCK_HEADER + offset + 1


def payload(data: bytes, begin: int, skip: int = 0) -> bytes:
    """Bytes of a file from `begin` on without the headers of blocks, and without the first `skip` of them."""
    view, parts, at = memoryview(data), list[memoryview](), 0
    while at < len(data):
        offset = (begin + at) % _BLOCK
        if offset < _BLOCK_HEADER:
            at, offset = at + _BLOCK_HEADER - offset, _BLOCK_HEADER
        at, stop = at + skip, at + _BLOCK - offset
        skip = max(at - stop, 0)
        parts.append(view[at:stop])
        at = stop
    return b"".join(parts)


def read_places(size: int, read: Callable[[int, int], bytes]) -> list[RecordPlace]:
    """The places of the records of a file of `size` bytes.

    Args:
        read: gives the bytes [start, stop) of the file; it is asked for the last block, and for the table before it.
    Raises:
        ValueError: it is not of the form that this reads.
    """
    last = size - _BLOCK
    if last < 0 or last % _BLOCK:
        raise ValueError("not a padded file")
    try:
        postscript = _messages(_chunk(read(last, size), last))[0]
        table = postscript[1]
        if not 0 <= table < last or last - table > _LARGEST_TABLE:
            raise ValueError("no table of records")
        footers = _messages(_chunk(read(table, last), table))[1:]  # the first holds the writer's options
        if any(footer[3] != 1 for footer in footers):
            raise ValueError("chunks of several records")
        places = [RecordPlace(footer[1], footer[2]) for footer in footers]
        if any(place.begin + place.size > size for place in places):
            raise ValueError("a record beyond the file's end")
        return places
    except (KeyError, IndexError) as e:
        raise ValueError("no table of records") from e


class DirectFile:
    """The records of one file; safe to use from many threads.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)  # with the last reference: a thread may be reading

    @functools.cached_property
    def places(self) -> list[RecordPlace]:
        """The places of its records, by the file's own table.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not of the form that this reads.
        """
        return read_places(os.fstat(self._descriptor).st_size, self._bytes)

    def read(self, place: RecordPlace) -> np.ndarray:
        """The bytes of a record, (n,) uint8, unverified; they stay until this thread reads again.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        begin, head = place.begin, place.head
        size = head + place.size
        in_block = max(begin % _BLOCK, _BLOCK_HEADER) - _BLOCK_HEADER  # where the chunk begins among a block's data
        stop = in_block + size
        blocks = -(-stop // _BLOCK_DATA)
        memory = _memory.of(blocks)
        # All data of the blocks, with their headers between them, in one system call; the first header is before it.
        parts = memory.parts[int(begin % _BLOCK >= _BLOCK_HEADER) : 2 * blocks]
        parts[-1] = parts[-1][: stop - (blocks - 1) * _BLOCK_DATA]
        first = int(begin % _BLOCK < _BLOCK_HEADER)
        if first:
            parts[0] = parts[0][begin % _BLOCK :]
        parts[first] = parts[first][in_block:]
        done, wanted = 0, _end(begin, size) - begin
        for at in range(0, len(parts), _MOST_PARTS):
            done += os.preadv(self._descriptor, parts[at : at + _MOST_PARTS], begin + done)
        if done != wanted:
            raise ValueError("the file ends before the record")
        return memory.array[in_block + head : stop]

    def _bytes(self, start: int, stop: int) -> bytes:
        return os.pread(self._descriptor, stop - start, start)


class _Memory(threading.local):
    """Memory of a thread for the data of blocks.

    Attributes:
        array: all of it, uint8.
        parts: for each block its header, which nothing needs, and its data.
    """

    def __init__(self) -> None:
        self.array = np.empty(0, np.uint8)
        self.parts: list[memoryview] = []

    def of(self, blocks: int) -> _Memory:
        """Itself, with room for so many blocks."""
        if 2 * blocks > len(self.parts):
            count = blocks + max(blocks // 4, _SPARE)
            self.array, header = np.empty(count * _BLOCK_DATA, np.uint8), memoryview(bytearray(_BLOCK_HEADER))
            data = (self.array[at : at + _BLOCK_DATA].data for at in range(0, len(self.array), _BLOCK_DATA))
            self.parts = [part for one in data for part in (header, one)]
        return self


_memory = _Memory()


def _chunk(data: bytes, begin: int) -> bytes:
    """The data of the chunk that begins at `begin`, with which these bytes of a file start."""
    found = payload(data, begin)
    size = int.from_bytes(found[8:16], "little")
    if size > len(found) - _CHUNK_HEADER:
        raise ValueError("a chunk beyond the file's end")
    return found[_CHUNK_HEADER : _CHUNK_HEADER + size]


def _messages(data: bytes) -> list[dict[int, int]]:
    """The records of a chunk's data, each a message of integers: {field: value}."""
    if data[:1] != b"\0":
        raise ValueError("compressed")
    length, at = read_varint(data, 1)
    sizes, start = [], at
    while at < start + length:
        size, at = read_varint(data, at)
        sizes.append(size)
    found = []
    for size in sizes:
        end, fields = at + size, dict[int, int]()
        while at < end:
            tag, at = read_varint(data, at)
            if tag & 7:
                break  # no integer: the writer's options
            fields[tag >> 3], at = read_varint(data, at)
        found.append(fields)
        at = end
    return found
