"""Batches for training and held-out windows, read through grain.

`Loader` turns a position into a sample (mixture -> source -> order -> window -> frames, columns -> normalised arrays),
lets grain's threads work ahead, and joins samples to batches. It keeps no state but the step it is at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from uwm_jax.data.mixture import MixtureOrder, continued
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.ranges import Range, about_pool, ranges_of
from uwm_jax.data.remarks import far_out, few_held_out
from uwm_jax.data.samples import Clip
from uwm_jax.data.sources import Source, check_normalizer, fit_normalizer, open_sources, pooled_stats, renamed, spec_of
from uwm_jax.data.spec import Batch, DataSpec
from uwm_jax.data.windows import Windows
from uwm_jax.ending import leave_behind
from uwm_jax.errors import UserError
from uwm_jax.parallel.ahead import Ahead

CLOSE_SECONDS = 2.0  # for reads that are going on at the end


class Trace(NamedTuple):
    """The place of a sample: `origin` is the step of the episode at which its window begins."""

    source: str
    dataset: str
    shard: str
    episode: int
    origin: int


class _Rows:
    """The sequence that grain indexes: this process's rows of all batches from `start_step` on, in order.

    A row is decoded straight into the arrays of its batch, which saves a copy of every frame; the element that
    grain carries to the end of the pipeline is only the batch's number. Each iterator has rows of its own.
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
                self._batches[step] = loader.spec.empty(loader.local_batch_size)
            batch = self._batches[step]
        row = place * loader.process_count + loader.process_index
        loader.load(batch, place, row, (loader.start_step + step) * loader.batch_size + row)
        return step

    def take(self, steps: Sequence[int]) -> Batch:
        """The batch whose rows are all done."""
        with self._lock:
            return self._batches.pop(steps[0])


class Loader:
    """Training batches of a run's data from `start_step` on, and its held-out windows.

    Iterating yields flat dicts of numpy arrays, with b = batch_size / process_count rows of this process:
    `obs/<camera>`, `next_obs/<camera>` (b, T, H, W, 3) uint8 raw; `obs/<low-dim key>` (b, T, D) and `action`
    (b, Ta, Da) float32, normalised; `obs/text` (b, E) float32 if configured; `action_mask` (b,) bool; `row` (b,)
    int32, the row's index in the global batch. Rows of a source without actions have zeros for `action` and the
    low-dimensional keys, and `action_mask` False. Process p of P has the rows p, p + P, ...; the global batch of a
    step depends on nothing but (datasets, config, history of weights, batch_size, seed, step).

    Args:
        config: `config.data`; `batch_size`: global; `seed`: of the order.
        start_step: batches drawn before the first one.
        process_index, process_count: this process among those that share every batch.
        normalizer: to be used as it is (a checkpoint's); None: made from the training episodes of all sources with
            actions.
        state: what `state(start_step)` gave where the run stopped, wherever the datasets lay then. Its history of
            weights is continued, with the config's weights from here on where these differ.
    Raises:
        UserError: data that does not fit the config or, if given, `state`.

    Attributes:
        sources: {name: Source}, sorted.
        directory: dataset of the first source with actions, in the order of names: its cameras' sizes are the model's,
            and the PCA codec is the one that was fitted on it.
        camera_keys: {camera: step key} in that dataset.
        spec: of the batches; with the run's normaliser.
    """

    def __init__(
        self,
        config: Any,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        normalizer: Normalizer | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        self.config = config
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.process_index, self.process_count = process_index, process_count
        self._check_processes()
        self._reads = _Reads()
        self.sources = open_sources(config, seed)
        self._robots = [source for source in self.sources.values() if source.use_actions]
        self.directory = self._robots[0].dataset.directory
        self.camera_keys = dict(self._robots[0].samples.camera_keys)
        spec = spec_of(list(self.sources.values()))
        if normalizer is None:
            normalizer = fit_normalizer(self._robots, config.normalize)
        else:
            check_normalizer(normalizer, spec, str(self.directory))
        self.normalizer = normalizer
        self.spec: DataSpec = dataclasses.replace(spec, normalizer=normalizer)
        weights = {name: source.weight for name, source in self.sources.items()}
        history: list[Any] = [(0, weights)]
        if state is not None:
            state = _under_our_names(state, self.sources)
            self._check_identity(state)
            history = [(at, w) for at, w in state["weights"]]
        try:
            if state is not None:
                history = continued(history, weights, start_step * batch_size)
            self.order = MixtureOrder(history, config.num_streams, seed)
        except ValueError as e:
            raise UserError(f"config.data.sources: {e}.") from e
        self.local_batch_size = batch_size // process_count

    def ranges(self) -> dict[str, dict[str, Range]]:
        """{source with actions: {key: the range of its training data that a normaliser of it alone would have}}."""
        return {source.name: ranges_of(source.stats(), self.config.normalize) for source in self._robots}

    def manifest(self) -> dict[str, Any]:
        """The manifest of the data, for a checkpoint's assets: the dataset's manifest, or {source: its manifest}."""
        if not self.config.sources:
            return self._robots[0].dataset.manifest
        return {name: source.dataset.manifest for name, source in self.sources.items()}

    def summary(self) -> str:
        """A line about each source, for people."""
        action = f"action {self.spec.action_dim}-d" if self.spec.window.action else "no action"
        if len(self.sources) == 1:
            return f"data: {self._robots[0].describe()}; {action}"
        total = sum(source.weight for source in self.sources.values())
        lines = [
            f"  {name} ({source.weight / total:.1%} of the samples): {source.describe()}"
            for name, source in self.sources.items()
        ]
        cameras = ", ".join(self.spec.cameras) or "none"
        return "\n".join([f"data: {len(lines)} sources; cameras {cameras}; {action}", *lines])

    def warnings(self, clip: float, fewest: int) -> list[str]:
        """Lines for people about values that lie far out, sources in other units, and too few held-out episodes.

        Args:
            clip: as `far_out` takes it; fewest: episodes that an interval needs.
        """
        far = far_out(self._robots, self.normalizer, clip)
        return far + about_pool(self.ranges()) + few_held_out(self._robots, self.config.val_ratio, fewest)

    def __iter__(self) -> Iterator[Batch]:
        threads = self.config.num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16, 2 * threads) if threads else 0)
        rows = _Rows(self)
        elements = grain.MapDataset.source(rows).to_iter_dataset(options)
        return iter(elements.batch(self.local_batch_size, drop_remainder=True, batch_fn=rows.take))

    def load(self, batch: Batch, at: int, row: int, position: int) -> None:
        """Writes the sample of a global position into place `at` of a batch, as row `row`."""
        name, place = self.order.locate(position)
        source = self.sources[name]
        with self._reads.going_on(lambda: _where(source, source.clip(place))):
            source.load(batch, at, row, place, self.spec)

    def reading(self, source: Source, clip: Clip) -> contextlib.AbstractContextManager[None]:
        """Around the read of a window by others, so that `waits_for` knows of it."""
        return self._reads.going_on(lambda: _where(source, clip))

    def waits_for(self) -> str:
        """Dataset, shard, record and episode of the read that has been going on for longest, for people."""
        return self._reads.oldest()

    def state(self, step: int) -> dict[str, Any]:
        """State that a checkpoint after `step` steps keeps, JSON: no topology, only a position and what it counts."""
        return {
            "position": step * self.batch_size,
            "seed": self.seed,
            "num_streams": self.config.num_streams,
            "weights": [[start, weights] for start, weights in self.order.history],
            "datasets": {name: source.identity for name, source in self.sources.items()},
        }

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        """Checks that this loader continues the order that `state` was saved from.

        Raises:
            UserError: another dataset, seed or number of streams, or another place than `start_step`.
        """
        datasets = {name: source.identity for name, source in self.sources.items()}
        stored = state.get("datasets") or {}
        for what, names in (
            ("no source", sorted(datasets.keys() - stored.keys())),
            ("the source", sorted(stored.keys() - datasets.keys())),
        ):
            if names and stored:
                raise UserError(
                    f"config.data.sources: this run was started with {', '.join(sorted(stored))}; it has {what} "
                    f"{names[0]!r}. Sources cannot come or go while a run continues (a weight of 0 keeps a source from "
                    "being drawn): use a new --workdir."
                )
        expected = {
            "position": self.start_step * self.batch_size,
            "seed": self.seed,
            "num_streams": self.config.num_streams,
            "datasets": datasets,
        }
        for field, value in expected.items():
            if state.get(field) != value:
                raise self._mismatch(field, state.get(field), value)

    def _mismatch(self, field: str, stored: Any, ours: Any) -> UserError:
        if field == "datasets" and stored:
            field = next(name for name in ours if stored[name] != ours[name])
            stored, ours, field = stored[field], ours[field], f"datasets/{field}"
        return UserError(
            f"{self.directory}: the checkpoint's data order has {field} = {stored!r}, this run has {ours!r}. "
            "Continue with the same data and config, or use a new --workdir."
        )

    def _check_processes(self) -> None:
        fields = {"config.batch_size": self.batch_size, "config.data.num_streams": self.config.num_streams}
        for field, number in fields.items():
            if number % self.process_count:
                raise UserError(
                    f"{self.process_count} processes do not divide {field}={number}: every process reads the same "
                    "number of rows, from streams of its own. Choose a multiple."
                )

    def describe(self, position: int) -> Trace:
        """The place of the sample at a global position (step * batch_size + row)."""
        name, place = self.order.locate(position)
        source = self.sources[name]
        episode, origin = source.clip(place)
        shard = source.dataset.locate(episode, max(origin, 0)).shard
        return Trace(name, str(source.dataset.directory), shard, episode, origin)

    def mean_action(self) -> np.ndarray:
        """(Da,) float32 mean of all actions of the training episodes, normalised; only with actions in the window."""
        mean = np.asarray(pooled_stats(self._robots)["action"]["mean"], np.float32)
        return np.asarray(self.normalizer.normalize("action", mean), np.float32)

    def training_windows(self, num_windows: int, seed: int = 0) -> FixedWindows:
        """At most `num_windows` windows of training episodes, chosen as those of `held_out` are."""
        return self._spread([(source, source.windows) for source in self._robots], num_windows, seed)

    def held_out(self, num_windows: int, seed: int = 0, whole: Collection[str] = ()) -> FixedWindows:
        """At most `num_windows` windows of validation episodes of the sources with actions, evenly spread over all of
        them, always the same. The sources in `whole` give all their episodes.

        Raises:
            UserError: no source has a validation episode that passes its filter and is long enough.
        """
        found_in = [(source, source.held_out_windows(source.name in whole)) for source in self._robots]
        if not any(windows for _, windows in found_in):
            each = "\n".join(f"  {source.about_held_out()}" for source in self._robots)
            raise UserError(
                f"there is no held-out window to evaluate on (config.data.val_ratio={self.config.val_ratio}):\n{each}\n"
                "Only a new run can hold out other episodes; training works without (config.eval.every=0)."
            )
        return self._spread([(source, windows) for source, windows in found_in if windows], num_windows, seed)

    def _spread(self, found_in: Sequence[tuple[Source, Windows]], num_windows: int, seed: int) -> FixedWindows:
        sources, every = zip(*found_in, strict=True)
        ends = np.cumsum([len(windows) for windows in every])
        count = min(num_windows, int(ends[-1]))
        # One window from each of `count` equal parts of the list, at the same place of each part.
        place = np.random.default_rng(seed).random()
        chosen = ((np.arange(count) + place) * int(ends[-1]) / count).astype(np.int64)
        found = []
        for w in chosen:
            i = int(np.searchsorted(ends, w, side="right"))
            found.append((i, *every[i].locate(int(w - (ends[i - 1] if i else 0)))))
        return FixedWindows(self, sources, found)

    def close(self) -> None:
        """Closes the datasets' files, but for a read that hangs: its thread is left behind with them."""
        if not self._reads.end(CLOSE_SECONDS):
            leave_behind(self.waits_for())
            return
        for source in self.sources.values():
            source.dataset.close()


def _under_our_names(state: Mapping[str, Any], ours: Iterable[str]) -> dict[str, Any]:
    names = list(ours)
    datasets = renamed(state.get("datasets") or {}, names)
    return {**state, "datasets": datasets, "weights": [[at, renamed(w, names)] for at, w in state["weights"]]}


class _Reads:
    """The reads that are going on, by thread."""

    def __init__(self) -> None:
        self._going_on: dict[int, tuple[float, Callable[[], str]]] = {}

    @contextlib.contextmanager
    def going_on(self, where: Callable[[], str]) -> Iterator[None]:
        """Around a read; `where` tells what is read, for people."""
        self._going_on[threading.get_ident()] = time.monotonic(), where
        try:
            yield
        finally:
            del self._going_on[threading.get_ident()]

    def oldest(self) -> str:
        reads = sorted(self._going_on.copy().values(), key=lambda read: read[0])
        if not reads:
            return "the threads that read"
        began, where = reads[0]
        return f"{where()}, which is being read for {time.monotonic() - began:.0f} s"

    def end(self, seconds: float) -> bool:
        """Waits for the reads to end; whether they did within `seconds`."""
        deadline = time.monotonic() + seconds
        while self._going_on and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._going_on


def _where(source: Source, clip: Clip) -> str:
    step = max(clip.origin, 0)
    chunk = source.dataset.locate(clip.episode, step)
    return (
        f"{source.dataset.directory / chunk.shard}, record {chunk.record} (episode {clip.episode}, steps from {step})"
    )


class FixedWindows:
    """Windows for evaluation, in the order of their sources, episodes and steps.

    Attributes:
        episodes: (n,) int64 a number of each window's episode, other in each source: intervals are to be clustered by
            it. With one source it is the episode's number in the split.
        origins: (n,) int64 first step of each window.
        shuffled: (n,) int64 for each window one of another episode, or if there is but one episode another one: the
            window half of the set away, or the next after it that is of another episode.
    """

    def __init__(self, loader: Loader, sources: Sequence[Source], windows: list[tuple[int, int, int]]):
        self._loader, self._sources = loader, sources
        self._windows = windows
        first = np.cumsum([0, *(source.dataset.num_episodes for source in sources)])
        self.episodes = np.asarray([first[s] + episode for s, episode, _ in windows], np.int64)
        self.origins = np.asarray([origin for *_, origin in windows], np.int64)
        self.shuffled = strangers(self.episodes)

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, start: int, stop: int) -> Batch:
        """Windows [start, stop) as a batch; `row` is the window's number. Windows beyond the last start over.

        A batch with `action` has, next to what a training batch has: `last_action` (b, Da) float32, the normalised one
        just before the chunk, `has_last_action` (b,) bool, False where the episode has none, and `shuffled_action`
        (b, Ta, Da) float32, the chunk of the window `shuffled` names.
        """
        rows = np.arange(start, stop) % len(self)
        batch = self._loader.spec.empty(len(rows))
        for at, r in enumerate(rows):
            source, clip = self._window(int(r))
            with self._loader.reading(source, clip):
                source.samples.load(batch, at, int(r), [clip], 0, self._loader.spec)
        return batch | (self._actions(rows) if "action" in batch else {})

    def _actions(self, rows: np.ndarray) -> Batch:
        spec = self._loader.spec
        like = spec.batch_like(len(rows))["action"]
        last = np.empty((like.shape[0], like.shape[2]), like.dtype)
        has_last, shuffled = np.empty(len(rows), np.bool_), np.empty(like.shape, like.dtype)
        before = spec.window.action[0] - 1
        for at, r in enumerate(rows):
            source, clip = self._window(int(r))
            last[at] = source.samples.action(clip, (before,), spec.normalizer)[0]
            has_last[at] = clip.origin + before >= 0
            source, clip = self._window(int(self.shuffled[r]))
            shuffled[at] = source.samples.action(clip, spec.window.action, spec.normalizer)
        return {"last_action": last, "has_last_action": has_last, "shuffled_action": shuffled}

    def _window(self, number: int) -> tuple[Source, Clip]:
        source, episode, origin = self._windows[number]
        return self._sources[source], Clip(episode, origin)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in batches of one size, of which the one that begins at `start` (a multiple of `batch_size`)
        has `min(batch_size, len(self) - start)` windows of its own: the last batch is filled up from the beginning,
        and a mean over windows leaves these rows out."""
        for start in range(0, len(self), batch_size):
            yield self.batch(start, start + batch_size)


def strangers(episodes: np.ndarray) -> np.ndarray:
    """`FixedWindows.shuffled` of windows of these episodes (n,)."""
    count = len(episodes)
    shifts = (np.arange(count) + count // 2) % count
    found = np.empty(count, np.int64)
    for i in range(count):
        candidates = (i + shifts) % count
        others = candidates[episodes[candidates] != episodes[i]]
        found[i] = others[0] if len(others) else candidates[0]
    return found


def prefetch_to_device(
    batches: Iterator[Batch],
    sharding: jax.sharding.Sharding,
    depth: int,
    waits_for: Callable[[], str] = lambda: "data",
) -> Ahead[dict[str, jax.Array]]:
    """A loader's batches on the devices, `depth` of them ahead.

    Every process gives its own rows of the global batch; `sharding` says how the batch axis lies on the devices.
    """
    placed = ({k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()} for batch in batches)
    return Ahead(placed, depth, waits_for)
