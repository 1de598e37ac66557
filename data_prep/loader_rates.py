"""Windows per second and core of several ways to read the same random windows, measured in interleaved rounds."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.latent_files import STEPS_PER_PART, random_blocks, write_caches
from data_prep.loader_data import CAMERAS, NUMBERS, SIZE, Made
from data_prep.source_files import masked_crc
from uwm_jax import config as config_lib
from uwm_jax.data import example
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset, decode_image
from uwm_jax.data.run_data import RunData
from uwm_jax.data.source_latents import expected_fields
from uwm_jax.training.cached_latents import use_of

FRAMES = (0, 1, 17, 18)  # of a window: 2 current and 2 later ones
SPAN = 19  # steps of a window
BATCH = 36
VAE_STRIDE, VAE_CHANNELS = 8, 4  # of DROID's codec
COLUMNS = tuple(key.rpartition("/")[2] for key in NUMBERS)

Reader = Iterator[int]  # reads, and gives the number of windows that it has read since it was asked last


def config_of(dataset: os.PathLike[str]) -> Any:
    """The config of DROID's runs for the data; one thread's work is done where it is asked for."""
    config = config_lib.base()
    config.data.path = os.fspath(dataset)
    config.data.cameras, config.data.action = CAMERAS, (("action", "identity"),)
    config.data.low_dim = ("cartesian_position", "gripper_position")
    config.data.num_threads = 0
    config.batch_size = BATCH
    return config


def readers(made: Made, seed: int = 0) -> dict[str, Reader]:
    """{row: reader} of all rows."""
    rng = np.random.default_rng(seed)
    dataset, config = Dataset(made.dataset), config_of(made.dataset)
    cached = config.copy_and_resolve_references()
    cached.data.latents, cached.model.codec.posterior = config.model.codec.name, "mode"
    return {
        "pixels": _loader(RunData(config.data, seed=seed)),
        "latents": _loader(RunData(cached.data, seed=seed, latents=use_of(cached))),
        "decode_only": _decode_only(_files(dataset, made, rng, FRAMES)),
        "decode_only_latents": _decode_only(_files(dataset, made, rng, FRAMES[:2])),
        "whole_episode": _whole_episode(made, np.random.default_rng(seed)),
        "official_zarr": _zarr(made, np.random.default_rng(seed), whole=True),
        "zarr_needed": _zarr(made, np.random.default_rng(seed), whole=False),
    }


def make_latents(made: Made, seed: int = 0) -> None:
    """Caches random numbers in place of the latents of DROID's codec, with two variants."""
    config, dataset = config_of(made.dataset), Dataset(made.dataset)
    name, latent = config.model.codec.name, [*(side // VAE_STRIDE for side in config.data.crop), VAE_CHANNELS]
    fields = {
        key: {
            **expected_fields(config.data, name, dataset.split, key, SIZE),
            **{"latent": latent, "dtype": "float16", "moments": False},
            **{"variants": 2, "seed": seed, "steps_per_part": STEPS_PER_PART, "episodes": "all"},
        }
        for key in dataset.cameras
    }
    blocks, episodes = random_blocks(list(fields), seed), np.arange(dataset.num_episodes)
    write_caches(dataset, fields, episodes, blocks, command="python -m data_prep.benchmark", say=lambda text: None)


def _loader(data: RunData) -> Reader:
    """Batches of the training loader."""
    for _ in Loader(data, batch_size=BATCH):
        yield BATCH


def _files(
    dataset: Dataset, made: Made, rng: np.random.Generator, frames: Sequence[int], windows: int = 64
) -> list[list[bytes]]:
    """The JPEG files that random windows decode."""
    found = []
    for episode, origin in _windows(made, rng, windows):
        files = []
        for step in (origin + frame for frame in frames):
            chunk, offset = divmod(step, dataset.chunk_steps)
            record = dataset.record(episode, chunk)
            fields = example.scan(record)
            for camera in CAMERAS:
                span = example.bytes_spans(record, fields[f"steps/observation/{camera}".encode()])[offset]
                files.append(record[slice(*span)])
        found.append(files)
    return found


def _decode_only(windows: list[list[bytes]]) -> Reader:
    """What decoding alone costs: files in memory, into the same arrays."""
    out = np.empty((len(windows[0]), *SIZE, 3), np.uint8)
    while True:
        for files in windows:
            for data, frame in zip(files, out, strict=True):
                decode_image(data, frame)
            yield 1


def _whole_episode(made: Made, rng: np.random.Generator) -> Reader:
    """RLDS as TFDS stores it: the record of an episode is read whole, and one window of it is decoded."""
    out = np.empty((len(FRAMES), *SIZE, 3), np.uint8)
    keys = [f"steps/observation/{camera}".encode() for camera in CAMERAS]
    wanted = {*keys, b"steps/action"}
    while True:
        for episode, origin in _windows(made, rng, 64):
            path, offset, size = made.records[episode]
            with path.open("rb") as file:
                file.seek(offset)
                data, footer = file.read(size), file.read(4)
            assert int.from_bytes(footer, "little") == masked_crc(data)
            record = memoryview(data)
            fields = example.scan(record, wanted)
            example.floats(record, fields[b"steps/action"]).reshape(-1, 7)[origin : origin + SPAN].copy()
            for key in keys:
                spans = example.bytes_spans(record, fields[key], origin + SPAN)
                for frame, image in zip(FRAMES, out, strict=True):
                    decode_image(record[slice(*spans[origin + frame])], image)
            yield 1


def _zarr(made: Made, rng: np.random.Generator, *, whole: bool) -> Reader:
    """The official layout: all frames of a window, as its code reads them, or those that are needed."""
    import zarr

    root = zarr.open(zarr.DirectoryStore(str(made.zarr)), mode="r")
    cameras, columns = [root[name] for name in CAMERAS], [root[name] for name in COLUMNS]
    while True:
        for episode, origin in _windows(made, rng, 64):
            start = episode * made.steps + origin
            for array in columns:
                array[start : start + SPAN]
            for array in cameras:
                if whole:
                    array[start : start + SPAN]
                else:
                    array[start : start + 2]
                    array[start + SPAN - 2 : start + SPAN]
            yield 1


def _windows(made: Made, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """(episode, origin) of random windows."""
    episodes = rng.integers(made.episodes, size=count).tolist()
    return list(zip(episodes, rng.integers(made.steps - SPAN + 1, size=count).tolist(), strict=True))


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Keeps this process on one core; gives whether the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield False
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def measure(
    rows: Mapping[str, Reader], rounds: int, seconds: float, progress: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """{row: windows per second of CPU time in each round}; in a round every row has its turn, in an order that rotates.

    CPU time of the process, with its threads, is what a core would need: it does not count what other processes take.
    """
    names = list(rows)
    for reader in rows.values():  # files come into the page cache, and arrays into memory
        _rate(reader, seconds / 4)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(_rate(rows[name], seconds))
            progress()
    return found


def _rate(reader: Reader, seconds: float) -> float:
    windows, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        windows += next(reader)
    return windows / spent


def ratio(found: Mapping[str, Sequence[float]], row: str, other: str) -> float:
    """Median over rounds of the quotient of two rows, each of one round."""
    return statistics.median(a / b for a, b in zip(found[row], found[other], strict=True))
