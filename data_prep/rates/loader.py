"""Windows per second and core of several ways to read the same random windows, measured in interleaved rounds."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.caches.latents.files import STEPS_PER_PART, random_blocks, write_caches
from data_prep.jobs.child import Child
from data_prep.rates.loader_data import CAMERAS, NUMBERS, SIZE, Made
from data_prep.sources.source_files import masked_crc
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

ROWS = (
    *("pixels", "latents", "decode_only", "decode_only_latents"),
    *("whole_episode", "official_zarr", "zarr_needed"),
)
MOST_SECONDS = 900.0  # for a turn, on a machine that is busy

Reader = Iterator[int]  # reads, and gives the number of windows that it has read since it was asked last


def config_of(dataset: str | os.PathLike[str]) -> Any:
    """The config of DROID's runs for the data; one thread's work is done where it is asked for."""
    config = config_lib.base()
    config.data.path = os.fspath(dataset)
    config.data.cameras, config.data.action = CAMERAS, (("action", "identity"),)
    config.data.low_dim = ("cartesian_position", "gripper_position")
    config.data.val_ratio, config.data.num_threads = 0.0, 0
    config.batch_size = BATCH
    return config


def reader(row: str, made: Made, seed: int = 0) -> Reader:
    """The reader of a row."""
    rng, config = np.random.default_rng(seed), config_of(made.dataset)
    if row == "latents":
        config.data.latents, config.model.codec.posterior = config.model.codec.name, "mode"
    makers: dict[str, Callable[[], Reader]] = {
        **dict.fromkeys(
            ("pixels", "latents"), lambda: _loader(RunData(config.data, seed=seed, latents=use_of(config)))
        ),
        "decode_only": lambda: _decode_only(made, rng, FRAMES),
        "decode_only_latents": lambda: _decode_only(made, rng, FRAMES[:2]),
        "whole_episode": lambda: _whole_episode(made, rng),
        "official_zarr": lambda: _zarr(made, rng, whole=True),
        "zarr_needed": lambda: _zarr(made, rng, whole=False),
    }
    return makers[row]()


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


def _decode_only(made: Made, rng: np.random.Generator, frames: Sequence[int], windows: int = 64) -> Reader:
    """What decoding alone costs: files in memory, into the same arrays."""
    dataset, files = Dataset(made.dataset), list[list[bytes]]()
    for episode, origin in _windows(made, rng, windows):
        files.append([])
        for step in (origin + frame for frame in frames):
            chunk, offset = divmod(step, dataset.chunk_steps)
            record = dataset.record(episode, chunk)
            fields = example.scan(record)
            for camera in CAMERAS:
                span = example.bytes_spans(record, fields[f"steps/observation/{camera}".encode()])[offset]
                files[-1].append(record[slice(*span)])
    out = np.empty((len(files[0]), *SIZE, 3), np.uint8)
    while True:
        for window in files:
            for data, frame in zip(window, out, strict=True):
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


class Turn(NamedTuple):
    """What a row's process is asked for: to read for so many seconds of CPU time."""

    row: str
    made: Made
    seconds: float


_readers: dict[str, Reader] = {}  # of this process


def take(turn: Turn, mark: Callable[[int], None] = lambda number: None) -> float:
    """Windows per second of CPU time of this process, with its threads: other processes do not count in it."""
    with one_core():
        if turn.row not in _readers:
            _readers[turn.row] = reader(turn.row, turn.made)
            _rate(_readers[turn.row], turn.seconds / 4)  # files come into the page cache, and arrays into memory
        return _rate(_readers[turn.row], turn.seconds)


def measure(
    made: Made, rounds: int, seconds: float, progress: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """{row: windows per second of CPU time in each round}.

    Each row reads in a process of its own. In a round every row has its turn, in an order that rotates.
    """
    rows, found = ROWS, {row: list[float]() for row in ROWS}
    with contextlib.ExitStack() as closing:
        children = {row: closing.enter_context(Child(take)) for row in rows}
        for number in range(rounds):
            for row in (*rows[number % len(rows) :], *rows[: number % len(rows)]):
                found[row].append(children[row].call(Turn(row, made, seconds), MOST_SECONDS))
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
