"""The index of a split: where its episodes and chunks lie, memory-mapped, so that the processes of a host share it."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np

from uwm_jax.data.columns import WrongChecksum, npy_header
from uwm_jax.data.direct import RecordPlace
from uwm_jax.errors import UserError
from uwm_jax.files import Place
from uwm_jax.reading import again

_BLOCK = 1 << 22
_LOCAL_HEADER = 30  # bytes of a member's header in a zip file before its name


class Chunk(NamedTuple):
    """A record with consecutive steps of an episode.

    Attributes:
        shard, record: number of its shard, and its own in it.
        crc32c: of its bytes.
        place: in the shard's file; None where the index does not tell.
    """

    shard: int
    record: int
    crc32c: int
    place: RecordPlace | None = None


class Index:
    """Where a split's episodes and chunks lie; read-only arrays that share their memory with other processes.

    Args:
        file: the npz, uncompressed. It is read once for its checksum; from a bucket it is read into memory.
        crc32c: of the file.
        info: the split's entry of manifest.json.
        chunk_steps: as manifest.json has it.
    Raises:
        WrongChecksum: its checksum is another.
        UserError: it is not such a file, or does not fit manifest.json.

    Attributes:
        episode_length, episode_first_chunk: (E,) int64.
        chunk_shard, chunk_record: (K,) int64.
        chunk_crc32c: (K,) uint32.
        chunk_offset, chunk_bytes: (K,) int64, the places of the records in their files; None in older datasets.
    """

    def __init__(self, file: Place, crc32c: int | None, info: Mapping[str, Any], chunk_steps: int):
        try:
            arrays = again(lambda: _open(file, crc32c), file)
            self.episode_length = arrays["episode_length"]
            self.episode_first_chunk = arrays["episode_first_chunk"]
            self.chunk_shard, self.chunk_record = arrays["chunk_shard"], arrays["chunk_record"]
            self.chunk_crc32c = arrays["chunk_crc32c"]
            self.chunk_offset, self.chunk_bytes = (arrays.get(name) for name in ("chunk_offset", "chunk_bytes"))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, struct.error) as e:
            raise UserError(f"{file}: the episode index cannot be read ({e}). Make the dataset again.") from e
        if unfit := self._unlike(info, chunk_steps):
            raise UserError(f"{file}: {unfit}. Make the dataset again.")

    def chunk(self, row: int) -> Chunk:
        """The chunk of a row of the index."""
        place = None
        if self.chunk_offset is not None and self.chunk_bytes is not None:
            place = RecordPlace(int(self.chunk_offset[row]), int(self.chunk_bytes[row]))
        return Chunk(int(self.chunk_shard[row]), int(self.chunk_record[row]), int(self.chunk_crc32c[row]), place)

    def _unlike(self, info: Mapping[str, Any], chunk_steps: int) -> str:
        """How the index differs from manifest.json; "" where it does not."""
        lengths, shards, records = self.episode_length, self.chunk_shard, self.chunk_record
        found = (len(lengths), int(lengths.sum()), len(shards))
        expected = (info["episodes"], info["steps"], info["chunks"])
        if found != expected:
            return f"expected (episodes, steps, chunks) {expected} as in manifest.json, found {found}"
        of_chunks = [x for x in (records, self.chunk_crc32c, self.chunk_offset, self.chunk_bytes) if x is not None]
        if len(self.episode_first_chunk) != found[0] or any(len(array) != found[2] for array in of_chunks):
            return "its arrays have different lengths"
        ends = self.episode_first_chunk + -(-lengths // chunk_steps)
        if found[0] and not (self.episode_first_chunk.min() >= 0 and ends.max() <= found[2]):
            return f"an episode lies in chunks up to {int(ends.max())}, but there are {found[2]}"
        entries: Sequence[Mapping[str, Any]] = info["shards"]
        if found[2] and not 0 <= shards.min() <= shards.max() < len(entries):
            return f"a chunk lies in shard {int(shards.max())}, but manifest.json lists {len(entries)}"
        counts = np.asarray([entry["records"] for entry in entries], np.int64)
        if found[2] and ((records < 0) | (records >= counts[shards])).any():
            wrong = int(np.flatnonzero((records < 0) | (records >= counts[shards]))[0])
            entry = entries[int(shards[wrong])]
            return f"a chunk is record {int(records[wrong])} of {entry['file']}, which has {entry['records']} records"
        return ""


def _open(file: Place, crc32c: int | None) -> dict[str, np.ndarray]:
    stream: IO[bytes]
    if isinstance(file, Path):
        data: np.ndarray = np.memmap(file, np.uint8, "r")
        stream = file.open("rb")
    else:
        content = file.read_bytes()
        data, stream = np.frombuffer(content, np.uint8), io.BytesIO(content)
    with stream:
        found = 0
        for at in range(0, len(data), _BLOCK):
            found = google_crc32c.extend(found, data[at : at + _BLOCK].tobytes())
        if found != crc32c:
            raise WrongChecksum
        return members(stream, data)


def members(stream: IO[bytes], data: np.ndarray) -> dict[str, np.ndarray]:
    """{name: array} of an uncompressed npz, without a copy; `data` are the bytes of `stream`.

    Raises:
        ValueError, zipfile.BadZipFile, struct.error: not an uncompressed npz.
    """
    arrays = {}
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            # The local header has lengths of its own: its extra field is not that of the directory at the end.
            header = data[member.header_offset :][:_LOCAL_HEADER].tobytes()
            name, extra = struct.unpack_from("<HH", header, _LOCAL_HEADER - 4)
            start = member.header_offset + _LOCAL_HEADER + name + extra
            body = data[start : start + member.file_size]
            shape, dtype, values = npy_header(body[:1024].tobytes())
            array = np.ndarray(shape, dtype, body, values)
            array.flags.writeable = False
            arrays[member.filename.removesuffix(".npy")] = array
    return arrays
