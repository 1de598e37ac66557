"""The data of a run, opened: sources, the contents of a batch, statistics, and fixed windows for evaluation.

A run opens its data once. What iterates over training batches is `uwm_jax.data.loader.Loader`, of which there may be
several over the same opened data: a run that falls back to an older checkpoint makes another one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from uwm_jax.data.faults import Faults
from uwm_jax.data.held_out import FixedWindows
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.remarks import far_out, few_held_out
from uwm_jax.data.samples import Clip
from uwm_jax.data.source_latents import LatentUse, cached_of
from uwm_jax.data.sources import Source, check_normalizer, fit_normalizer, open_sources, pooled_stats, spec_of
from uwm_jax.data.spec import CachedLatents, DataSpec
from uwm_jax.data.value_ranges import Range, about_pool, ranges_of
from uwm_jax.data.windows import Windows
from uwm_jax.ending import leave_behind
from uwm_jax.errors import UserError

CLOSE_SECONDS = 2.0  # for reads that are going on at the end


class RunData:
    """The opened data of a run.

    Args:
        config: `config.data`.
        seed: of the order of samples.
        normalizer: used as it is (a checkpoint's); None: fitted to the training episodes of all sources with actions.
        latents: what training batches have in place of frames; None for frames alone.
    Raises:
        UserError: data that does not fit the config or the normaliser; a source without latents that fit.

    Attributes:
        config, seed: as given.
        sources: {name: Source}, sorted.
        faults: the bad records that were met.
        directory: dataset of the first source with actions, in the order of names: its cameras' sizes are the model's,
            and a codec that is fitted on data is the one that was fitted on it.
        camera_keys: {camera: step key} in that dataset.
        spec: of batches of frames, with the normaliser.
    """

    def __init__(
        self, config: Any, *, seed: int, normalizer: Normalizer | None = None, latents: LatentUse | None = None
    ):
        self.config, self.seed = config, seed
        self.sources = open_sources(config, seed)
        self.faults = Faults(config.max_bad_records)
        self._reads = _Reads()
        self._robots = [source for source in self.sources.values() if source.use_actions]
        self.directory = self._robots[0].dataset.directory
        self.camera_keys = dict(self._robots[0].samples.camera_keys)
        self.spec: DataSpec = spec_of(list(self.sources.values()))
        if normalizer is None:
            normalizer = fit_normalizer(self._robots, config.normalize)
        else:
            check_normalizer(normalizer, self.spec, str(self.directory))
        self.spec = dataclasses.replace(self.spec, normalizer=normalizer)
        self._cached: CachedLatents | None = None
        if latents:
            for source in self.sources.values():
                source.open_latents(latents, self.spec.cameras)
            self._cached = cached_of({name: s.samples.latents for name, s in self.sources.items() if s.samples.latents})

    @property
    def training_spec(self) -> DataSpec:
        """Of training batches: `spec`, with latents in place of some frames where these are read."""
        return dataclasses.replace(self.spec, cached=self._cached)

    def with_normalizer(self, normalizer: Normalizer) -> RunData:
        """The same opened data under another normaliser; closing either closes both.

        Raises:
            UserError: the normaliser is for other keys.
        """
        check_normalizer(normalizer, self.spec, str(self.directory))
        other = copy.copy(self)
        other.spec = dataclasses.replace(self.spec, normalizer=normalizer)
        return other

    def identities(self) -> dict[str, str]:
        """{source: what must not change while a run continues}: dataset content and choice of episodes."""
        return {name: source.identity for name, source in self.sources.items()}

    def ranges(self) -> dict[str, dict[str, Range]]:
        """{source with actions: {key: the range of its training data that a normaliser of it alone would have}}."""
        return {source.name: ranges_of(source.stats(), self.config.normalize) for source in self._robots}

    def manifest(self) -> dict[str, Any]:
        """The manifest of the data, for a checkpoint's assets: the dataset's manifest, or {source: its manifest}."""
        if not self.config.sources:
            return self._robots[0].dataset.manifest
        return {name: source.dataset.manifest for name, source in self.sources.items()}

    def used(self) -> dict[str, str]:
        """{source: what it is trained on, with counts of what its conditions leave out}, for a checkpoint's assets; its
        name is as in `manifest`, "" of the only dataset."""
        names = list(self.sources) if self.config.sources else [""]
        return {name: source.used() for name, source in zip(names, self.sources.values(), strict=True)}

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
        far = far_out(self._robots, self.spec.normalizer, clip)
        return far + about_pool(self.ranges()) + few_held_out(self._robots, self.config.val_ratio, fewest)

    def reading(self, source: Source, clip: Callable[[], Clip]) -> contextlib.AbstractContextManager[None]:
        """The context of a window's read, so that `waits_for` knows of it."""
        return self._reads.going_on(lambda: _where(source, clip()))

    def waits_for(self) -> str:
        """Dataset, shard, record and episode of the read that has been going on for longest, for people."""
        return self._reads.oldest()

    def mean_action(self) -> np.ndarray:
        """(Da,) float32 mean of all actions of the training episodes, normalised; only with actions in the window."""
        mean = np.asarray(pooled_stats(self._robots)["action"]["mean"], np.float32)
        return np.asarray(self.spec.normalizer.normalize("action", mean), np.float32)

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
        return FixedWindows(self.spec, sources, found, self.reading, self.faults)

    def close(self) -> None:
        """Closes the datasets' files, but for a read that hangs: its thread is left behind with them."""
        if not self._reads.end(CLOSE_SECONDS):
            leave_behind(self.waits_for())
            return
        for source in self.sources.values():
            source.dataset.close()
            if source.samples.latents:
                source.samples.latents.close()


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
