"""Encodes the frames of a dataset with a frozen codec, many at a time, over the devices at hand."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.caches.latents.files import Block
from uwm_jax.codecs import Codec
from uwm_jax.data.cover import cover
from uwm_jax.data.images import NUMBERS, preprocess
from uwm_jax.data.latents import Layout, numbers_of
from uwm_jax.data.records import Dataset
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.ahead import Ahead
from uwm_jax.training.build import Program

_AHEAD = 2  # batches of frames that are read ahead of the devices
_MEASURED = 3  # batches that are timed, after one that compiles


class Camera(NamedTuple):
    """A camera that is encoded.

    Attributes:
        key: its step key. view: the number of the model's view that shows it. size: (height, width) that its frames
            are resized to, where they have another, before `config.data.resize`.
    """

    key: str
    view: int
    size: tuple[int, int]


class _Batch(NamedTuple):
    """Frames {`_name`: (B, 1, H, W, 3) uint8}, and the (episode, step) of each row that counts."""

    frames: dict[str, np.ndarray]
    places: list[tuple[int, int]]


class Encoder:
    """Encodes the frames of a dataset's cameras.

    Args:
        program: of the run, on the mesh of the devices that encode.
        codec, frozen: with its arrays.
        dataset: an open split.
        cameras: those that are encoded, together.
        seed: of the draws. augmented: whether there are any.
        moments: whether to give mean and log-variance in place of the mode.
        dtype: of what is brought to the host.
    """

    def __init__(
        self,
        program: Program,
        codec: Codec,
        frozen: Any,
        dataset: Dataset,
        cameras: Sequence[Camera],
        *,
        seed: int,
        augmented: bool,
        moments: bool,
        dtype: str,
    ):
        self._dataset, self._cameras, self._seed, self._augmented = dataset, list(cameras), seed, augmented
        data, self._rows_on = program.config.data, mesh_lib.batch_sharding(program.mesh)
        self._num_threads = max(data.num_threads, 1)
        each = max(1, program.config.model.codec.microbatch // len(cameras))
        self.rows = each * program.mesh.size
        self._frozen = mesh_lib.place(
            codec.for_views(frozen, [c.view for c in cameras]), mesh_lib.replicated(program.mesh)
        )
        precision = "highest" if program.config.model.dtype == "float32" else "default"
        augment = data.augment.to_dict()

        def encode(frozen: Any, batch: Mapping[str, jax.Array], numbers: jax.Array | None) -> jax.Array:
            images, _ = preprocess(batch, None, resize=data.resize, crop=data.crop, augment=augment, numbers=numbers)
            with jax.default_matmul_precision(precision):
                if moments:
                    latents = jnp.concatenate(codec.moments(frozen, images), axis=-1)
                else:
                    latents = codec.encode(frozen, images, None)
            return latents[:, :, 0].swapaxes(0, 1).astype(dtype)

        like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self._empty().items()}
        numbers = jax.ShapeDtypeStruct((self.rows, len(cameras), NUMBERS), np.float32) if augmented else None
        inputs = mesh_lib.with_sharding((like, numbers), self._rows_on)
        self._encode = program.compile(encode, self._frozen, *inputs)

    def blocks(self, layout: Layout, part: int) -> Iterator[Block]:
        """The latents of a part, as `files.write_caches` takes them."""
        first, last = layout.parts[part]
        with contextlib.closing(self._read_ahead(self._places(layout.episodes[first:last]))) as batches:
            start = 0
            waiting: list[tuple[int, int, int, jax.Array]] = []  # encoded while the next is read
            for batch in batches:
                found = self._start(batch, layout.variants)
                yield from self._finish(waiting)
                waiting = [(variant, start, len(batch.places), x) for variant, x in enumerate(found)]
                start += len(batch.places)
            yield from self._finish(waiting)
        if part == layout.black[0]:
            black = _Batch({name: np.zeros_like(x) for name, x in self._empty().items()}, [(0, 0)])
            yield from self._finish([(-1, 0, 1, self._start(black, 1)[0])])

    def rate(self, layout: Layout) -> float:
        """Frames of a camera and variant that are read and encoded in a second, measured on the first batches."""
        first, last = layout.parts[0]
        places = self._places(layout.episodes[first:last])
        head = list(itertools.islice(places, self.rows * (1 + _MEASURED)))
        with contextlib.closing(self._read_ahead(iter(head[: self.rows]))) as batches:
            jax.block_until_ready([self._start(batch, 1) for batch in batches])  # warm
        timed = head[self.rows :] or head
        began = time.perf_counter()
        with contextlib.closing(self._read_ahead(iter(timed))) as batches:
            for batch in batches:
                jax.block_until_ready(self._start(batch, layout.variants))
        return len(timed) * len(self._cameras) * layout.variants / (time.perf_counter() - began)

    def _start(self, batch: _Batch, variants: int) -> list[jax.Array]:
        frames = mesh_lib.place(batch.frames, self._rows_on)
        return [self._encode(self._frozen, frames, self._numbers(batch.places, k)) for k in range(variants)]

    def _finish(self, waiting: list[tuple[int, int, int, jax.Array]]) -> Iterator[Block]:
        for variant, start, count, encoded in waiting:
            latents = np.asarray(encoded)
            by_key = {c.key: latents[number, :count] for number, c in enumerate(self._cameras)}
            yield Block(variant, start, by_key)

    def _numbers(self, places: Sequence[tuple[int, int]], variant: int) -> Any:
        if not self._augmented:
            return None
        numbers = np.zeros((self.rows, len(self._cameras), NUMBERS), np.float32)
        for episode, rows in itertools.groupby(range(len(places)), lambda row: places[row][0]):
            these = list(rows)
            for view, camera in enumerate(self._cameras):
                numbers[these, view] = numbers_of(self._seed, episode, camera.key, variant)
        return mesh_lib.place(numbers, self._rows_on)

    # --- frames ---------------------------------------------------------------------------------

    def _places(self, episodes: np.ndarray) -> Iterator[tuple[int, int]]:
        """(episode, step) of all steps of episodes, in order."""
        for episode in map(int, episodes):
            for step in range(int(self._dataset.episode_lengths[episode])):
                yield episode, step

    def _read_ahead(self, places: Iterator[tuple[int, int]]) -> Ahead[_Batch]:
        return Ahead(self._batches(places), _AHEAD)

    def _batches(self, places: Iterator[tuple[int, int]]) -> Iterator[_Batch]:
        with concurrent.futures.ThreadPoolExecutor(self._num_threads) as pool:
            while rows := list(itertools.islice(places, self.rows)):
                batch = _Batch(self._empty(), rows)
                list(pool.map(lambda piece, b=batch: self._read(b, *piece), self._pieces(batch.places)))
                yield batch

    def _pieces(self, places: Sequence[tuple[int, int]]) -> list[tuple[int, list[int], list[int]]]:
        """(episode, steps, rows) of pieces that lie in one record each."""
        chunk = self._dataset.chunk_steps
        pieces = []
        for (episode, _), rows in itertools.groupby(
            range(len(places)), lambda row: (places[row][0], places[row][1] // chunk)
        ):
            these = list(rows)
            pieces.append((episode, [places[row][1] for row in these], these))
        return pieces

    def _read(self, batch: _Batch, episode: int, steps: list[int], rows: list[int]) -> None:
        into: dict[str, Any] = {}
        for number, camera in enumerate(self._cameras):
            size, frames = self._dataset.cameras[camera.key], batch.frames[_name(number)]
            same = size == camera.size
            into[camera.key] = [frames[r, 0] for r in rows] if same else np.empty((len(rows), *size, 3), np.uint8)
        self._dataset.frames(episode, dict.fromkeys(into, steps), into)
        for number, camera in enumerate(self._cameras):
            if self._dataset.cameras[camera.key] != camera.size:
                for row, frame in zip(rows, into[camera.key], strict=True):
                    batch.frames[_name(number)][row, 0] = cover(frame, camera.size)

    def _empty(self) -> dict[str, np.ndarray]:
        return {_name(number): np.zeros((self.rows, 1, *c.size, 3), np.uint8) for number, c in enumerate(self._cameras)}


def _name(number: int) -> str:
    """The name of a camera's frames, which sorts as the cameras do."""
    return f"{number:03}"
