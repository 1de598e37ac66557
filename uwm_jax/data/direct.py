"""Reads records of an uncompressed ArrayRecord file straight into memory that is used again.

ArrayRecord's reader copies a record three times, into fresh memory. Where each record lies by itself and as it is
(`group_size:1,uncompressed`), one system call puts it where it is used. Nothing here verifies a record: the caller
compares its checksum, and reads what does not fit through ArrayRecord's reader, which says what is wrong.

Riegeli's file format: 64 KiB blocks, each beginning with a header of 24 bytes, through which chunks run; a chunk is a
header of 40 bytes and its data. ArrayRecord adds a chunk with the place of each record's chunk, and in the last block
one with the place of that chunk (riegeli: doc/riegeli_records_file_format.md; array_record: cpp/layout.proto).
"""

from __future__ import annotations

import os
import threading
import weakref

import numpy as np

from uwm_jax.data.example import read_varint, varint

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_MOST_PARTS = 512  # of a system call, which takes 1024
_SPARE = 1 << 20  # bytes that the memory of a thread grows by, at least

_memory = threading.local()


class DirectFile:
    """The records of one file; safe to use from many threads.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of the form that this reads.
    """

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)  # with the last reference: a thread may be reading
        last = os.fstat(self._descriptor).st_size - _BLOCK
        if last < 0 or last % _BLOCK:
            raise ValueError("not a padded file")
        try:
            postscript = _messages(self._chunk(last))[0]
            footers = _messages(self._chunk(postscript[1]))[1:]  # the first holds the writer's options
            if any(footer[3] != 1 for footer in footers):
                raise ValueError("chunks of several records")
            self._places = [(footer[1], footer[2]) for footer in footers]
        except (KeyError, IndexError) as e:
            raise ValueError("no table of records") from e

    def read(self, record: int) -> np.ndarray:
        """The bytes of a record, (n,) uint8, unverified; they stay until this thread reads again.

        Raises:
            OSError, ValueError, IndexError: it cannot be read.
        """
        begin, size = self._places[record]
        sizes = varint(size)
        # The chunk's header, a byte for no compression, the length of the sizes, and the size.
        head = _CHUNK_HEADER + 1 + len(varint(len(sizes))) + len(sizes)
        return self._payload(begin, head + size)[head:]

    def _chunk(self, begin: int) -> bytes:
        """The data of a small chunk."""
        header = self._payload(begin, _CHUNK_HEADER)
        size = int.from_bytes(header[8:16].tobytes(), "little")
        if size > 1 << 26:
            raise ValueError("a chunk that is too large")
        return self._payload(begin, _CHUNK_HEADER + size)[_CHUNK_HEADER:].tobytes()

    def _payload(self, begin: int, size: int) -> np.ndarray:
        """Bytes of the file from `begin` on without the blocks' headers, in this thread's memory."""
        memory = getattr(_memory, "array", None)
        if memory is None or len(memory) < size:
            memory = _memory.array = np.empty(size + max(size // 4, _SPARE), np.uint8)
        view, skipped = memory.data, bytearray(_BLOCK_HEADER)
        parts: list[memoryview | bytearray] = []
        at, place = 0, begin
        while at < size:
            if place % _BLOCK < _BLOCK_HEADER:
                header = _BLOCK_HEADER - place % _BLOCK
                parts.append(skipped[:header])
                place += header
            count = min(size - at, _BLOCK - place % _BLOCK)
            parts.append(view[at : at + count])
            at, place = at + count, place + count
        done = 0
        for first in range(0, len(parts), _MOST_PARTS):
            some = parts[first : first + _MOST_PARTS]
            wanted = sum(map(len, some))
            if os.preadv(self._descriptor, some, begin + done) != wanted:
                raise ValueError("the file ends before the record")
            done += wanted
        return memory[:size]


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
