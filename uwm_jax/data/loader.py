"""Batches for training and held-out windows, read through grain.

`Loader` turns a position into a sample (order -> window -> frames, columns -> normalised arrays), lets grain's
threads work ahead, and joins samples to batches. It keeps no state but the step it is at.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.order import MIN_RANGE, StreamOrder
from uwm_jax.data.records import Dataset, dataset_dir
from uwm_jax.data.stats import join_stats, key_stats
from uwm_jax.data.transforms import get_transform
from uwm_jax.data.windows import Windows, WindowSpec, split_episodes
from uwm_jax.errors import UserError

Batch = dict[str, np.ndarray]


def open_dataset(config: Any) -> Dataset:
    """The dataset that `config.data` names."""
    return Dataset(dataset_dir(config.path), config.split)


class Trace(NamedTuple):
    """Where a sample comes from: `origin` is the step of the episode at which its window begins."""

    dataset: str
    shard: str
    episode: int
    origin: int


class Samples:
    """Windows of a dataset as rows of batches, as `config.data` asks for them.

    Args:
        dataset: an open split.
        config: `config.data`.
        normalizer: to be used as it is (a checkpoint's); None: made from the training episodes.
    Raises:
        UserError: a key that the dataset does not have, a transform that does not fit, training values that are not
            finite, a normaliser for other keys or widths.
    """

    def __init__(self, dataset: Dataset, config: Any, normalizer: Normalizer | None = None):
        self.dataset = dataset
        self.spec = WindowSpec.from_config(config.window)
        self.cameras = {name: dataset.camera_key(name) for name in sorted(config.cameras)}
        self._low_dim = {name: dataset.column_key(name) for name in sorted(config.low_dim)}
        self._text = dataset.float_key(config.text) if config.text else ""
        self._action = [(dataset.column_key(key), get_transform(name)) for key, name in config.action]
        self.action_dim = sum(t.width(key, self._width(key)) for key, t in self._action)
        self.low_dim = {name: self._width(key) for name, key in self._low_dim.items()}
        self.text_dim = self._width(self._text) if self._text else 0
        if normalizer is None:
            normalizer = self._fit_normalizer(config.normalize, config.val_ratio)
        else:
            self._check_normalizer(normalizer)
        self.normalizer = normalizer

    def empty(self, rows: int) -> Batch:
        """Arrays for a batch of `rows` samples, to be filled by `load`."""
        spec = self.spec
        batch: Batch = {}
        for name, key in self.cameras.items():
            size = (*self.dataset.cameras[key], 3)
            batch[f"obs/{name}"] = np.empty((rows, len(spec.obs), *size), np.uint8)
            batch[f"next_obs/{name}"] = np.empty((rows, len(spec.next_obs), *size), np.uint8)
        for name, width in self.low_dim.items():
            batch[f"obs/{name}"] = np.empty((rows, len(spec.obs), width), np.float32)
        if self._text:
            batch["obs/text"] = np.empty((rows, self.text_dim), np.float32)
        batch["action"] = np.empty((rows, len(spec.action), self.action_dim), np.float32)
        batch["action_mask"] = np.empty(rows, np.bool_)
        batch["row"] = np.empty(rows, np.int32)
        return batch

    def load(self, batch: Batch, at: int, episode: int, origin: int, row: int) -> None:
        """Writes the sample of the window at `origin` of an episode into place `at` of a batch, as row `row`."""
        dataset, spec = self.dataset, self.spec
        length, start = int(dataset.episode_lengths[episode]), int(dataset.episode_starts[episode])
        obs = spec.steps(spec.obs, origin, length)
        steps = obs + spec.steps(spec.next_obs, origin, length)
        frames = {
            key: [*batch[f"obs/{name}"][at], *batch[f"next_obs/{name}"][at]] for name, key in self.cameras.items()
        }
        dataset.frames(episode, dict.fromkeys(frames, steps), frames)
        for name, key in self._low_dim.items():
            batch[f"obs/{name}"][at] = self.normalizer.normalize(name, self._rows(key, start, obs))
        if self._text:
            batch["obs/text"][at] = dataset.values(episode, obs[-1], self._text)
        action = spec.steps(spec.action, origin, length)
        parts = [transform.apply(self._rows(key, start, action)) for key, transform in self._action]
        batch["action"][at] = self.normalizer.normalize("action", np.concatenate(parts, axis=-1))
        batch["action_mask"][at] = True
        batch["row"][at] = row
        for name in ("action", *(f"obs/{name}" for name in self._low_dim)):
            # Training episodes are known to be finite from their statistics; held-out ones are met here.
            if not np.isfinite(batch[name][at]).all():
                raise UserError(
                    f"{dataset.directory}: {name} is NaN or infinite in episode {episode} of split {dataset.split!r}, "
                    f"in the window at step {origin}. Remove the episode from the source and reshard it."
                )

    def _fit_normalizer(self, kind: str, val_ratio: float) -> Normalizer:
        identity = get_transform("identity")
        stats = {name: key_stats(self.dataset, key, identity, val_ratio) for name, key in self._low_dim.items()}
        stats["action"] = join_stats(key_stats(self.dataset, key, t, val_ratio) for key, t in self._action)
        return Normalizer.from_stats(stats, kind, stats)

    def _check_normalizer(self, normalizer: Normalizer) -> None:
        """A key of ours without an entry is the identity, and an entry for nothing of ours is not used; but both at
        once mean that the normaliser belongs to other keys."""
        ours = {"action": self.action_dim, **self.low_dim}
        theirs = {key: len(scale) for key, (scale, _) in normalizer.entries.items()}
        differing = any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys())
        if differing or (ours.keys() - theirs.keys() and theirs.keys() - ours.keys()):
            raise UserError(
                f"The normaliser of this run is for {_widths(theirs)}, but config.data.action and config.data.low_dim "
                f"read {_widths(ours)} from {self.dataset.directory}. Use the data keys that the run was trained with."
            )

    def _rows(self, key: str, start: int, steps: list[int]) -> np.ndarray:
        rows = self.dataset.column(key)[[start + s for s in steps]]
        return np.asarray(rows, np.float32).reshape(len(steps), -1)

    def _width(self, key: str) -> int:
        return int(np.prod(self.dataset.step_shape(key), dtype=np.int64))


def _widths(sizes: dict[str, int]) -> str:
    return ", ".join(f"{key} ({width} numbers)" for key, width in sorted(sizes.items())) or "no keys"


class _Source:
    """What grain indexes: this process's rows of all batches from `start_step` on, in order.

    A row is decoded straight into the arrays of its batch, which saves a copy of every frame; the element that
    grain carries to the end of the pipeline is only the batch's number. Each iterator has a source of its own.
    """

    def __init__(self, loader: Loader):
        self._loader = loader
        self._lock = threading.Lock()
        self._batches: dict[int, Batch] = {}

    def __len__(self) -> int:
        return 1 << 48  # training stops by itself; epochs are the order's business

    def __getitem__(self, i: int) -> int:
        loader = self._loader
        step, place = divmod(int(i), loader.local_batch_size)
        with self._lock:
            if step not in self._batches:
                self._batches[step] = loader.samples.empty(loader.local_batch_size)
            batch = self._batches[step]
        row = place * loader.process_count + loader.process_index
        position = (loader.start_step + step) * loader.batch_size + row
        loader.samples.load(batch, place, *loader.windows.locate(loader.order.window(position)), row)
        return step

    def take(self, steps: Sequence[int]) -> Batch:
        """The batch whose rows are all done."""
        with self._lock:
            return self._batches.pop(steps[0])


class Loader:
    """Training batches of a dataset from `start_step` on, and its held-out windows.

    Iterating yields flat dicts of numpy arrays, with b = batch_size / process_count rows of this process:
    `obs/<camera>`, `next_obs/<camera>` (b, T, H, W, 3) uint8 raw; `obs/<low-dim key>` (b, T, D) and `action`
    (b, Ta, Da) float32, normalised; `obs/text` (b, E) float32 if configured; `action_mask` (b,) bool; `row` (b,)
    int32, the row's index in the global batch. Process p of P has the rows p, p + P, ...; the global batch of a
    step depends on nothing but (dataset, config, batch_size, seed, step).

    Args:
        dataset: an open split; `config`: `config.data`; `batch_size`: global; `seed`: of the order.
        start_step: batches drawn before the first one.
        process_index, process_count: this process among those that share every batch.
        normalizer: as for `Samples`.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Any,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        normalizer: Normalizer | None = None,
    ):
        self.dataset = dataset
        self.config = config
        self.batch_size = batch_size
        self.start_step = start_step
        self.process_index, self.process_count = process_index, process_count
        self.samples = Samples(dataset, config, normalizer)
        train, held_out = split_episodes(dataset.num_episodes, config.val_ratio)
        self.windows = Windows(self.samples.spec, dataset.episode_lengths, train, "training episodes")
        self._held_out_episodes = held_out
        self.order = StreamOrder(len(self.windows), config.num_streams, seed)
        for what, number in (("the batch size", batch_size), ("the number of streams", self.order.num_streams)):
            if number % process_count:
                raise UserError(
                    f"{process_count} processes do not divide {what}, {number} ({len(self.windows)} windows, "
                    f"config.batch_size={batch_size}, config.data.num_streams={config.num_streams}; a stream has at "
                    f"least {MIN_RANGE} windows). Use a number of processes that divides both, or more data."
                )
        self.local_batch_size = batch_size // process_count

    @property
    def normalizer(self) -> Normalizer:
        return self.samples.normalizer

    def facts(self) -> dict[str, Any]:
        """What a model must know: cameras {name: (H, W)}, low_dim {name: D}, action_dim, text_dim, normalizer."""
        return {
            "cameras": {name: self.dataset.cameras[key] for name, key in self.samples.cameras.items()},
            "low_dim": dict(self.samples.low_dim),
            "action_dim": self.samples.action_dim,
            "text_dim": self.samples.text_dim,
            "normalizer": self.normalizer,
        }

    def summary(self) -> str:
        """One line about the data, for people."""
        lengths = self.dataset.episode_lengths
        return (
            f"data: {self.dataset.directory} ({self.dataset.split}): {self.dataset.num_episodes} episodes, "
            f"{int(lengths.sum())} steps; {len(self.windows)} training windows in {len(self.windows.episodes)} "
            f"episodes, {len(self._held_out_episodes)} episodes held out; cameras {', '.join(self.samples.cameras)}; "
            f"action {self.samples.action_dim}-d"
        )

    def __iter__(self) -> Iterator[Batch]:
        threads = self.config.num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16, 2 * threads) if threads else 0)
        source = _Source(self)
        rows = grain.MapDataset.source(source).to_iter_dataset(options)
        return iter(rows.batch(self.local_batch_size, drop_remainder=True, batch_fn=source.take))

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps must keep, JSON: no topology, only a position and what it counts."""
        name = self.dataset.directory.name
        return {
            "position": step * self.batch_size,
            "seed": self.order.seed,
            "num_streams": self.order.num_streams,
            "weights": [[0, {name: 1.0}]],  # (from which position, weight of each source)
            "datasets": {name: self.dataset.fingerprint},
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Checks that this loader continues the order that `state` was saved from.

        Raises:
            UserError: another dataset, seed or number of streams, or another place than `start_step`.
        """
        expected = self.state(self.start_step)
        for field, value in expected.items():
            if state.get(field) != value:
                raise UserError(
                    f"{self.dataset.directory}: the checkpoint's data order has {field} = {state.get(field)!r}, "
                    f"this run has {value!r}. Continue with the same data and config, or use a new --workdir."
                )

    def describe(self, position: int) -> Trace:
        """Where the sample at a global position (step * batch_size + row) comes from."""
        episode, origin = self.windows.locate(self.order.window(position))
        shard = self.dataset.locate(episode, max(origin, 0)).shard
        return Trace(str(self.dataset.directory), shard, episode, origin)

    def held_out(self, num_windows: int, seed: int = 0) -> HeldOut:
        """At most `num_windows` windows of validation episodes, evenly spread over all of them, always the same.

        Raises:
            UserError: there are no validation episodes, or none is long enough.
        """
        if not len(self._held_out_episodes):
            raise UserError(
                f"{self.dataset.directory}: no episodes are held out "
                f"(config.data.val_ratio={self.config.val_ratio}, {self.dataset.num_episodes} episodes)."
            )
        windows = Windows(
            self.samples.spec, self.dataset.episode_lengths, self._held_out_episodes, "validation episodes"
        )
        count = min(num_windows, len(windows))
        # One window from each of `count` equal parts of the list, at the same place of each part.
        place = np.random.default_rng(seed).random()
        chosen = ((np.arange(count) + place) * len(windows) / count).astype(np.int64)
        return HeldOut(self.samples, [windows.locate(int(w)) for w in chosen])

    def close(self) -> None:
        """Closes the dataset's files."""
        self.dataset.close()


class HeldOut:
    """Fixed windows for evaluation.

    Attributes:
        episodes: (n,) int64 episode of each window: intervals are to be clustered by it.
        origins: (n,) int64 first step of each window.
    """

    def __init__(self, samples: Samples, windows: list[tuple[int, int]]):
        self._samples = samples
        self.episodes, self.origins = np.asarray(windows, np.int64).T

    def __len__(self) -> int:
        return len(self.episodes)

    def batch(self, start: int, stop: int) -> Batch:
        """Windows [start, stop) as a batch; `row` is the window's number. Windows beyond the last start over."""
        rows = np.arange(start, stop) % len(self)
        batch = self._samples.empty(len(rows))
        for at, r in enumerate(rows):
            self._samples.load(batch, at, int(self.episodes[r]), int(self.origins[r]), int(r))
        return batch

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in batches of one size, of which the one that begins at `start` (a multiple of `batch_size`)
        has `min(batch_size, len(self) - start)` windows of its own: the last batch is filled up from the beginning,
        and a mean over windows leaves these rows out."""
        for start in range(0, len(self), batch_size):
            yield self.batch(start, start + batch_size)


def prefetch_to_device(batches: Iterator[Batch], sharding: jax.sharding.Sharding, depth: int) -> DevicePrefetch:
    """A loader's batches on the devices, `depth` of them ahead."""
    return DevicePrefetch(batches, sharding, depth)


class DevicePrefetch(Iterator[dict[str, jax.Array]]):
    """Iterates over a loader's batches, already on the devices: a thread keeps `depth` batches ahead.

    Every process gives its own rows of the global batch; `sharding` says how the batch axis lies on the devices.
    An exception of the loader is raised where the batch would have come.

    Attributes:
        wait_seconds: how long `next` has waited for data so far.
    """

    def __init__(self, batches: Iterator[Batch], sharding: jax.sharding.Sharding, depth: int):
        self.wait_seconds = 0.0
        self._sharding = sharding
        self._depth = max(depth, 1)
        self._ready: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(batches,), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            if not self._ready:
                raise StopIteration
            item = self._ready[0]
            if isinstance(item, BaseException):
                raise item  # stays first: it is the end of the iterator
            self._ready.popleft()
            self._changed.notify_all()
        self.wait_seconds += time.perf_counter() - began
        return item

    def close(self) -> None:
        """Stops the thread and lets go of the batches."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self, batches: Iterator[Batch]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                if self._closed:
                    return
            item: Any
            try:
                batch = next(batches)
                item = {k: jax.make_array_from_process_local_data(self._sharding, x) for k, x in batch.items()}
            except BaseException as e:  # noqa: BLE001 - handed to the consumer, StopIteration too
                item = e
            with self._changed:
                if self._closed:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
