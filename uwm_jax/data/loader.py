"""Training batches of opened data, read through grain.

`Loader` turns a position into a sample (mixture -> source -> order -> window -> frames, columns -> normalised arrays),
lets grain's threads work ahead, and joins samples to batches. It keeps no state but the step it is at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax

from uwm_jax.data.buffers import Buffers
from uwm_jax.data.faults import BAD, BadRecord, UnreadRecord
from uwm_jax.data.mixture import MixtureOrder, continued
from uwm_jax.data.run_data import RunData
from uwm_jax.data.sources import Source, renamed
from uwm_jax.data.spec import Batch
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
        self._like = loader.data.training_spec.batch_like(loader.local_batch_size)
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self._batches: dict[int, Batch] = {}
        self._begun = 0  # rows whose reads were started
        self._ahead = any(source.dataset.is_remote for source in loader.data.sources.values())

    def __len__(self) -> int:
        return 1 << 48  # training stops by itself; epochs are the order's business

    def __getitem__(self, i: int) -> int:
        loader = self._loader
        step, place = divmod(int(i), loader.local_batch_size)
        if self._ahead:
            self._begin(int(i) + 1 + loader.data.config.read_ahead)
        with self._lock:
            if step not in self._batches:
                self._batches[step] = self._buffers.empty(self._like)
            batch = self._batches[step]
        loader.load(batch, place, *self._row(int(i)))
        return step

    def _row(self, i: int) -> tuple[int, int]:
        """(row of the global batch, global position) of this process's row `i`."""
        loader = self._loader
        step, place = divmod(i, loader.local_batch_size)
        row = place * loader.process_count + loader.process_index
        return row, (loader.start_step + step) * loader.batch_size + row

    def _begin(self, stop: int) -> None:
        """Starts the reads of rows before `stop` that were not started yet."""
        with self._lock:
            start, self._begun = self._begun, max(self._begun, stop)
        for i in range(start, stop):
            self._loader.begin(self._like, self._row(i)[1])

    def take(self, steps: Sequence[int]) -> Batch:
        """The batch whose rows are all done."""
        with self._lock:
            return self._batches.pop(steps[0])


class Loader:
    """Training batches of opened data from `start_step` on.

    Iterating yields batches as `data.training_spec` has them, numpy arrays with b = batch_size / process_count rows of
    this process; `row` is the row's index in the global batch. Rows of a source without actions have zeros for all that
    such a source does not record. Process p of P has the rows p, p + P, ...; the global batch of a step depends on
    nothing but (datasets, config, history of weights, batch_size, seed, step).

    Args:
        data: the run's.
        batch_size: global.
        start_step: batches drawn before the first one.
        process_index, process_count: this process among those that share every batch.
        state: what `state(start_step)` gave where the run stopped, wherever the datasets lay then. Its history of
            weights is continued, with the config's weights from here on where these differ.
    Raises:
        UserError: processes that do not divide the batch; data that does not fit `state`.
    """

    def __init__(
        self,
        data: RunData,
        *,
        batch_size: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        state: Mapping[str, Any] | None = None,
    ):
        self.data = data
        self.batch_size, self.start_step = batch_size, start_step
        self.process_index, self.process_count = process_index, process_count
        self._check_processes()
        self.local_batch_size = batch_size // process_count
        self._lost_streams: set[tuple[str, int]] = set()  # (source, stream) of which no window can be read
        weights = {name: source.weight for name, source in data.sources.items()}
        history: list[Any] = [(0, weights)]
        if state is not None:
            state = _under_our_names(state, data.sources)
            self._check_identity(state)
            history = [(at, w) for at, w in state["weights"]]
            data.faults.restore(state.get("bad"))  # older states have none
        try:
            if state is not None:
                history = continued(history, weights, start_step * batch_size)
            self.order = MixtureOrder(history, data.config.num_streams, data.seed)
        except ValueError as e:
            raise UserError(f"config.data.sources: {e}.") from e

    def __iter__(self) -> Iterator[Batch]:
        threads = self.data.config.num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16, 2 * threads) if threads else 0)
        rows = _Rows(self)
        # Not `source`, which measures the size of each element for metrics: these have none.
        elements = grain.MapDataset.range(len(rows)).map(rows.__getitem__).to_iter_dataset(options)
        batches = elements.batch(self.local_batch_size, drop_remainder=True, batch_fn=rows.take)
        for step, batch in enumerate(batches, self.start_step + 1):
            self.data.faults.check(step)
            yield batch

    def load(self, batch: Batch, at: int, row: int, position: int) -> None:
        """Writes the sample of a global position into place `at` of a batch, as row `row`.

        Where `config.data.max_bad_records` allows bad records, a sample that needs one is replaced by the last good one
        of its source before it in its stream (position c * S + s of the source's order by the last good c' < c), so
        that weights hold; if there is none, by the first good one after it, and where nothing of the stream is good by
        one of the next stream. So a row is a function of the datasets' content and of the position alone.

        Raises:
            BadRecord, UnreadRecord: none is allowed, or no other sample is good.
            UserError: this sample and those in its place need more bad records than are allowed.
        """
        name, place = self.order.locate(position)
        source = self.data.sources[name]
        failure: BadRecord | UnreadRecord | None = None
        met: dict[str, str] = {}  # {record: message}
        for other in self._tries(source, place):
            try:
                with self.data.reading(source, lambda other=other: source.clip(other)):  # type: ignore[misc]
                    source.load(batch, at, row, other, self.data.spec)
                return
            except BAD as e:
                # Not the exception itself: its frames would hold the batch until garbage is collected.
                failure = failure or type(e)(str(e), e.record)
                if not self.data.faults.limit:
                    break
                self.data.faults.note(e, position // self.batch_size + 1, position)
                met[e.record] = str(e)
                if end := self.data.faults.end([{"rows": 1, "records": met}]):  # before it has tried all others
                    raise end(position // self.batch_size) from e
        assert failure is not None
        raise failure

    def begin(self, keys: Container[str], position: int) -> None:
        """Starts to read the sample of a global position into a batch with these keys, where that saves time."""
        name, place = self.order.locate(position)
        self.data.sources[name].begin(keys, place)

    def _tries(self, source: Source, place: int) -> Iterator[int]:
        """A place of a source's order; those before it in its stream, the nearest first, and those after it; and a
        place of each of the other streams, if nothing of this one is good."""
        stride = self.data.config.num_streams
        most = stride * -(-len(source.windows) // source.order.num_streams)  # one pass over the stream's windows
        if (source.name, place % stride) not in self._lost_streams:
            yield place
            yield from range(place - stride, max(place - most, 0) - 1, -stride)
            yield from range(place + stride, place + most + 1, stride)
            self._lost_streams.add((source.name, place % stride))
        yield from range(place + 1, place + stride)

    def state(self, step: int) -> dict[str, Any]:
        """State that a checkpoint after `step` steps keeps, JSON: no topology, only a position and what it counts, and
        the bad records of the steps that `data.faults` has taken."""
        return {
            "position": step * self.batch_size,
            "seed": self.data.seed,
            "num_streams": self.data.config.num_streams,
            "weights": [[start, weights] for start, weights in self.order.history],
            "datasets": self.data.identities(),
            "bad": self.data.faults.state(),
        }

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        """Checks that this loader continues the order that `state` was saved from.

        Raises:
            UserError: another dataset, seed or number of streams, or another place than `start_step`.
        """
        datasets = self.data.identities()
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
            "seed": self.data.seed,
            "num_streams": self.data.config.num_streams,
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
            f"{self.data.directory}: the checkpoint's data order has {field} = {stored!r}, this run has {ours!r}. "
            "Continue with the same data and config, or use a new --workdir."
        )

    def _check_processes(self) -> None:
        fields = {"config.batch_size": self.batch_size, "config.data.num_streams": self.data.config.num_streams}
        for field, number in fields.items():
            if number % self.process_count:
                raise UserError(
                    f"{self.process_count} processes do not divide {field}={number}: every process reads the same "
                    "number of rows, from streams of its own. Choose a multiple."
                )

    def describe(self, position: int) -> Trace:
        """The place of the sample at a global position (step * batch_size + row)."""
        name, place = self.order.locate(position)
        source = self.data.sources[name]
        episode, origin = source.clip(place)
        shard = source.dataset.locate(episode, max(origin, 0)).shard
        return Trace(name, str(source.dataset.directory), shard, episode, origin)


def _under_our_names(state: Mapping[str, Any], ours: Iterable[str]) -> dict[str, Any]:
    names = list(ours)
    datasets = renamed(state.get("datasets") or {}, names)
    return {**state, "datasets": datasets, "weights": [[at, renamed(w, names)] for at, w in state["weights"]]}


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
