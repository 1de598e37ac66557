"""Cached latents: those of a frozen codec for the frames of a dataset, as training reads them.

`data_prep.latents` makes one sidecar (`sidecar.py`) for each camera, in `latents/<codec>/<camera>/<split>`. Its files
are parts: consecutive episodes, whole, at most `MOST_PARTS` of them. A part holds `variants` blocks, one after the
other, and a block one record for each step of the part's episodes:

    record   the frame's latent, (h, w, C) in the cache's dtype, little-endian; with moments (h, w, 2 C), the mean and
             then the logarithm of the variance, both in the latents' own units; then CRC-32C, 4 bytes, little-endian

The checksum begins with the cache's own header, so that a record of another cache does not pass for one of this. The
frames of a window lie next to each other, so that a window takes one read of a few kilobytes for each view. The last
record of the last part is the latent of a black frame, which views without a camera show.

Variant k of an episode and camera is one draw of crop and jitter, `numbers_of(seed, episode, camera, k)`, the same for
all frames of the episode; a cache made without augmentation has one variant, the crop in the centre.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from io import FileIO
from typing import Any

import google_crc32c
import numpy as np

from uwm_jax.data.faults import BadRecord, UnreadRecord
from uwm_jax.data.images import NUMBERS
from uwm_jax.data.order import mix
from uwm_jax.data.records import Dataset, short_key
from uwm_jax.data.sidecar import Sidecar, open_sidecar
from uwm_jax.data.timed import within
from uwm_jax.errors import RunError
from uwm_jax.files import is_remote
from uwm_jax.reading import again
from uwm_jax.storage.ranged import RangedFolder

KIND = "latents"
DTYPES = ("float16", "float32")
MOST_PARTS = 128
EPISODES_FILE = "episodes.npy"  # of a cache that does not hold all of them
_CHECKSUM = 4  # bytes


def folder(codec: str, camera: str, split: str) -> str:
    """The folder of a camera's cache in its dataset; `camera` is the step key."""
    return f"latents/{codec}/{short_key(camera).replace('/', '.')}/{split}"


def numbers_of(seed: int, episode: int, camera: str, variant: int) -> np.ndarray:
    """(NUMBERS,) float32 in [0, 1), which decide the crop and the jitter of a variant (`images.preprocess`).

    Args:
        seed: of the cache. episode: its number in the split. camera: the step key. variant: k.
    """
    bits = _camera_bits(camera)
    for part in (seed, episode, variant):
        bits = mix(bits ^ mix(part))
    return np.array([mix(bits + i) >> 40 for i in range(NUMBERS)], np.float32) * np.float32(2.0**-24)


@functools.lru_cache
def _camera_bits(camera: str) -> int:
    return int.from_bytes(hashlib.sha256(camera.encode()).digest()[:8], "little")


# --- the files ------------------------------------------------------------------------------------------


class Layout:
    """The place of each frame in the parts of a cache.

    Args:
        lengths: (E,) steps of all episodes of the split.
        episodes: (n,) those that are cached, rising.
        shape: of a record's frame; dtype: of its numbers.
        variants: K.
        steps_per_part: a part ends with the episode that reaches a multiple of so many steps, or of more where there
            would be too many parts.

    Attributes:
        parts: (first, last + 1) places in `episodes` of each part.
        record: bytes of a record.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        episodes: np.ndarray,
        shape: Sequence[int],
        dtype: str,
        variants: int,
        steps_per_part: int,
    ):
        self.episodes, self.variants = np.asarray(episodes, np.int64), variants
        self.shape, self.dtype = tuple(shape), np.dtype(dtype).newbyteorder("<")
        self.frame = math.prod(self.shape) * self.dtype.itemsize
        self.record = self.frame + _CHECKSUM
        used = np.asarray(lengths, np.int64)[self.episodes]
        ends = np.cumsum(used)
        total = int(ends[-1]) if len(ends) else 0
        size = max(steps_per_part, -(-total // MOST_PARTS))
        closing = np.searchsorted(ends, np.arange(size, total, size)) + 1  # after the episode that reaches the size
        edges = np.unique([0, *closing, len(used)]).tolist()
        self.parts = list(zip(edges, edges[1:], strict=False))
        self._first = np.concatenate([[0], ends])[edges]  # steps before each part
        starts = ends - used
        # of every episode of the split: its part, -1 where it is not cached, and its first step there
        self._part = np.full(len(lengths), -1, np.int32)
        self._start = np.zeros(len(lengths), np.int64)
        for number, (first, last) in enumerate(self.parts):
            self._part[self.episodes[first:last]] = number
            self._start[self.episodes[first:last]] = starts[first:last] - self._first[number]

    def steps(self, part: int) -> int:
        """Steps of a part, of all its episodes."""
        return int(self._first[part + 1] - self._first[part])

    def records(self, part: int) -> int:
        """Records of a part, the black frame of the last one included."""
        return self.steps(part) * self.variants + (part == len(self.parts) - 1)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.records(part) for part in range(len(self.parts))) * self.record

    @property
    def has(self) -> np.ndarray:
        """(E,) bool, the episodes that are cached."""
        return self._part >= 0

    def locate(self, episode: int, step: int, variant: int) -> tuple[int, int]:
        """(part, number of the record in it) of a frame."""
        part = int(self._part[episode])
        return part, variant * self.steps(part) + int(self._start[episode]) + step

    @property
    def black(self) -> tuple[int, int]:
        """(part, number of the record in it) of the black frame."""
        last = len(self.parts) - 1
        return last, self.records(last) - 1

    def pack(self, frames: np.ndarray, salt: int) -> bytes:
        """The records of frames (n, *shape)."""
        values = np.ascontiguousarray(frames, self.dtype).reshape(len(frames), -1).view(np.uint8)
        packed = np.empty((len(frames), self.record), np.uint8)
        packed[:, : self.frame] = values
        checksums = [google_crc32c.extend(salt, row.tobytes()) for row in values]
        packed[:, self.frame :] = np.asarray(checksums, "<u4").view(np.uint8).reshape(len(frames), _CHECKSUM)
        return packed.tobytes()


def part_file(number: int) -> str:
    """The name of a part."""
    return f"part-{number:05}.latents"


def salt_of(fingerprint: str, fields: Mapping[str, Any]) -> int:
    """What the checksums of a cache's records begin with."""
    return google_crc32c.value(json.dumps([fingerprint, fields], sort_keys=True).encode())


class LatentCache:
    """A complete cache of one camera, opened for random access; safe to use from many threads.

    Args:
        dataset: an open split. codec: its name. camera: the step key.
        expected: {field: value} that it must have been made with.
        timeout: seconds that a read may take before it is tried again; 0 for any time.
    Raises:
        UserError: there is none, it is unfinished, or a field differs.

    Attributes:
        sidecar: with the `fields` that it was made with.
        camera, variants: as there.
        layout: of its files.
    """

    def __init__(
        self,
        dataset: Dataset,
        codec: str,
        camera: str,
        expected: Mapping[str, Any] | None = None,
        timeout: float = 0.0,
    ):
        self.camera, self._timeout = camera, timeout
        where = folder(codec, camera, dataset.split)
        command = "python -m data_prep.latents --config=FILE.py"
        self.sidecar: Sidecar = open_sidecar(dataset.directory, where, KIND, expected, command=command)
        fields = self.sidecar.fields
        self.variants, self.seed = int(fields["variants"]), int(fields["seed"])
        self.augmented = fields["augment"] is not None
        episodes = np.arange(dataset.num_episodes)
        if EPISODES_FILE in self.sidecar.files:
            episodes = self.sidecar.array(EPISODES_FILE)
        shape = (*fields["latent"][:2], fields["latent"][2] * (2 if fields["moments"] else 1))
        lengths, steps = dataset.episode_lengths, int(fields["steps_per_part"])
        self.layout = Layout(lengths, episodes, shape, fields["dtype"], self.variants, steps)
        self._salt = salt_of(dataset.fingerprint, fields)
        self._lock = threading.Lock()
        self._open: dict[int, FileIO] = {}  # parts
        directory = self.sidecar.directory
        self._ranged = RangedFolder(directory) if is_remote(directory) else None
        self._black: bytes | None = None  # the record of the black frame, once it was read
        self._given_up: dict[tuple[int, int, int], str] = {}  # (part, record, count) -> message, of reads

    def numbers(self, episode: int, variant: int) -> np.ndarray:
        """(NUMBERS,) float32 of the draw of a variant."""
        return numbers_of(self.seed, episode, self.camera, variant)

    def read(self, episode: int, steps: Sequence[int], variant: int, into: np.ndarray) -> None:
        """Reads the latents of an episode's steps.

        Args:
            into: (len(steps), h, w, c) receives the first c channels.
        Raises:
            BadRecord: a record is damaged.
            UnreadRecord: it cannot be read, even after retries. The same read is not tried again in this process.
        """
        part, reads = self._reads(episode, steps, variant)
        if len(reads) == 1:
            [(start, count)] = reads
            self._unpack(part, self._read(part, start, count), start, [step - min(steps) for step in steps], into)
            return
        for (number, _), place in zip(reads, into, strict=True):
            self._unpack(part, self._read(part, number, 1), number, [0], place[None])

    def begin(self, episode: int, steps: Sequence[int], variant: int) -> None:
        """Starts to read what `read` with the same arguments takes, where that saves time: from a bucket."""
        if self._ranged is not None:
            part, reads = self._reads(episode, steps, variant)
            for start, count in reads:
                if (part, start, count) not in self._given_up:
                    self._ranged.begin(part_file(part), *self._range(start, count))

    def _reads(self, episode: int, steps: Sequence[int], variant: int) -> tuple[int, list[tuple[int, int]]]:
        """The part that holds some steps, and (first record, number of records) of the reads that they take: one of a
        few frames more at most, or one for each step."""
        first, last = min(steps), max(steps)
        part, start = self.layout.locate(episode, first, variant)
        if last - first < 4 * len(steps):
            return part, [(start, last - first + 1)]
        return part, [(start + step - first, 1) for step in steps]

    def _range(self, start: int, count: int) -> tuple[int, int]:
        """[start, stop) of the bytes of some records in their part."""
        return start * self.layout.record, (start + count) * self.layout.record

    def read_black(self, into: np.ndarray) -> None:
        """Puts the latent of a black frame into each of `into` (T, h, w, c)."""
        part, number = self.layout.black
        if self._black is None:
            self._black = self._read(part, number, 1)
        self._unpack(part, self._black, number, [0] * len(into), into)

    def _unpack(self, part: int, data: bytes, start: int, places: Sequence[int], into: np.ndarray) -> None:
        layout, view = self.layout, memoryview(data)
        for place, target in zip(places, into, strict=True):
            record = view[place * layout.record : (place + 1) * layout.record]
            frame, checksum = bytes(record[: layout.frame]), int.from_bytes(record[layout.frame :], "little")
            if google_crc32c.extend(self._salt, frame) != checksum:
                raise BadRecord(
                    f"{self._file(part)}: record {start + place} has another checksum than its content: the file is "
                    "damaged or belongs to another cache. Copy it again, or make it again: python -m data_prep.latents "
                    "--overwrite.",
                    self._name(part, start + place),
                )
            target[...] = np.frombuffer(frame, layout.dtype).reshape(layout.shape)[..., : target.shape[-1]]

    def _read(self, part: int, start: int, count: int) -> bytes:
        size, file = self.layout.record, self._file(part)

        def read() -> bytes:
            return os.pread(self._opened(part).fileno(), count * size, start * size)

        def attempt() -> bytes:
            if self._ranged is not None:
                return self._ranged.read(part_file(part), *self._range(start, count), self._timeout)
            try:
                return within(self._timeout, read, file)
            except OSError:
                with self._lock:  # reopened by the next attempt: the file's handle may be stale
                    self._open.pop(part, None)
                raise

        if (given_up := self._given_up.get((part, start, count))) is not None:
            raise UnreadRecord(given_up, self._name(part, start))
        try:
            data = again(attempt, file)
        except RunError as e:
            self._given_up[part, start, count] = f"record {start}: {e}"
            raise UnreadRecord(f"record {start}: {e}", self._name(part, start)) from e
        except (OSError, ValueError) as e:
            cause = e.strerror if isinstance(e, OSError) else e
            raise BadRecord(f"{file} cannot be read ({cause}). Copy it again.", self._name(part, start)) from e
        if len(data) < count * size:
            lost = start + len(data) // size
            raise BadRecord(f"{file}: ends in record {lost}, or before it. Copy it again.", self._name(part, lost))
        return data

    def _name(self, part: int, record: int) -> str:
        """The name of a record, as bad ones are counted."""
        return f"{self.sidecar.digest[:12]}/{part_file(part)}#{record}"

    def _file(self, part: int) -> str:
        return str(self.sidecar.directory / part_file(part))

    def _opened(self, part: int) -> FileIO:
        with self._lock:
            if part in self._open:
                return self._open[part]
        file = FileIO(self._file(part))  # outside of the lock: a file that hangs must not stop other reads
        with self._lock:
            kept = self._open.setdefault(part, file)
        if kept is not file:
            file.close()
        return kept

    def close(self) -> None:
        """Closes the open parts; a later read opens them again."""
        if self._ranged:
            self._ranged.forget()
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()
