"""Fixed windows of a run's data, for evaluation: always the same, each with what comparisons need besides a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import jax
import numpy as np

from uwm_jax.data.faults import BAD, BadRecord, Faults, UnreadRecord
from uwm_jax.data.samples import Clip
from uwm_jax.data.sources import Source
from uwm_jax.data.spec import Batch, DataSpec


class FixedWindows:
    """Windows for evaluation, in the order of their sources, episodes and steps.

    Args:
        spec: of the batches.
        sources: those with the windows.
        windows: (number of the source, episode, origin) of each.
        reading: (source, its window) -> the context of the read.
        faults: of the data. Where they allow bad records, a window that needs one shows the last good window before it
            (the first has the last good one of the set before it), which is told by name.

    Attributes:
        spec: of the batches.
        episodes: (n,) int64 a number of each window's episode, other in each source: intervals are to be clustered by
            it. With one source it is the episode's number in the split.
        origins: (n,) int64 first step of each window. Both are those of the window in its place where one is bad.
        shuffled: (n,) int64 for each window one of another episode, or if there is but one episode another one: the
            window half of the set away, or the next after it that is of another episode.
        bad: {number of a window that cannot be read: why}, of those that were read so far.
    """

    def __init__(
        self,
        spec: DataSpec,
        sources: Sequence[Source],
        windows: list[tuple[int, int, int]],
        reading: Callable[[Source, Callable[[], Clip]], AbstractContextManager[None]],
        faults: Faults,
    ):
        self.spec, self._faults = spec, faults
        self.bad: dict[int, str] = {}
        self._sources, self._windows, self._reading = sources, windows, reading
        first = np.cumsum([0, *(source.dataset.num_episodes for source in sources)])
        self.episodes = np.asarray([first[s] + episode for s, episode, _ in windows], np.int64)
        self.origins = np.asarray([origin for *_, origin in windows], np.int64)
        self.shuffled = windows_of_others(self.episodes)

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, start: int, stop: int) -> Batch:
        """Windows [start, stop) as a batch; `row` is the window's number. Windows beyond the last start over.

        A batch with `action` has, next to what a training batch has: `last_action` (b, Da) float32, the normalised one
        just before the chunk, `has_last_action` (b,) bool, False where the episode has none, and `shuffled_action`
        (b, Ta, Da) float32, the chunk of the window `shuffled` names.
        """
        rows = np.arange(start, stop) % len(self)
        batch = self.spec.empty(len(rows))
        for source, clip in map(self._window, rows.tolist()):
            source.samples.begin(batch, [clip], None)
        shown = np.asarray([self._load(batch, at, int(r)) for at, r in enumerate(rows)])
        return batch | (self._actions(shown) if "action" in batch else {})

    def batch_like(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch of `rows` windows."""
        return windows_like(self.spec, rows)

    def _load(self, batch: Batch, at: int, number: int) -> int:
        """Loads a window as row `number`; gives the number of the window that the row shows."""
        failure: BadRecord | UnreadRecord | None = None
        for other in (*range(number, -1, -1), *range(len(self) - 1, number, -1)):
            source, clip = self._window(other)
            if other in self.bad and other != number:
                continue
            try:
                with self._reading(source, lambda clip=clip: clip):  # type: ignore[misc]
                    source.samples.load(batch, at, number, [clip], None, self.spec)
            except BAD as e:
                failure = failure or e
                if not self._faults.limit:
                    break
                self.bad[other] = str(e)
            else:
                if failure is not None:
                    self._faults.note_held_out(failure, self._about(number), f"window {other}")
                    self.episodes[number], self.origins[number] = self.episodes[other], clip.origin
                return other
        assert failure is not None
        raise type(failure)(f"{self._about(number)}: {failure}", failure.record) from failure

    def _about(self, number: int) -> str:
        source, clip = self._window(number)
        return f"window {number} for evaluation ({source.where}, episode {clip.episode}, step {clip.origin})"

    def _actions(self, rows: np.ndarray) -> Batch:
        spec = self.spec
        like = spec.batch_like(len(rows))["action"]
        last = np.empty((like.shape[0], like.shape[2]), like.dtype)
        has_last, shuffled = np.empty(len(rows), np.bool_), np.empty(like.shape, like.dtype)
        before = spec.window.action[0] - 1
        for at, r in enumerate(rows):
            source, clip = self._window(int(r))
            last[at] = source.samples.action(clip, (before,), spec.normalizer)[0]
            has_last[at] = clip.origin + before >= 0
            source, clip = self._window(int(self.shuffled[r]))  # of another episode, of which no record is read
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


def windows_like(spec: DataSpec, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `FixedWindows.batch` of `rows` windows."""
    like = spec.batch_like(rows)
    if "action" in like:
        action = like["action"]
        like["last_action"] = jax.ShapeDtypeStruct((rows, spec.action_dim), action.dtype)
        like["has_last_action"] = jax.ShapeDtypeStruct((rows,), np.bool_)
        like["shuffled_action"] = jax.ShapeDtypeStruct(action.shape, action.dtype)
    return like


def windows_of_others(episodes: np.ndarray) -> np.ndarray:
    """`FixedWindows.shuffled` of windows of these episodes (n,)."""
    count = len(episodes)
    shifts = (np.arange(count) + count // 2) % count
    found = np.empty(count, np.int64)
    for i in range(count):
        candidates = (i + shifts) % count
        others = candidates[episodes[candidates] != episodes[i]]
        found[i] = others[0] if len(others) else candidates[0]
    return found
