"""The sources of a run: open datasets, the episodes used of each, and the order of their windows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from uwm_jax.data import fields as fields_lib
from uwm_jax.data.choices import keys_of
from uwm_jax.data.limits import StepRanges, bounded, find_limits
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.order import StreamOrder, mix
from uwm_jax.data.places import dataset_dir
from uwm_jax.data.records import Dataset
from uwm_jax.data.samples import Clip, Samples
from uwm_jax.data.selection import describe_not_finite, select
from uwm_jax.data.source_latents import LatentUse, SourceLatents
from uwm_jax.data.spec import Batch, DataSpec
from uwm_jax.data.stats import OfWindows, Stats, counted_steps, join_stats, key_stats, pool_stats
from uwm_jax.data.transforms import Columns, Transform, get_transform
from uwm_jax.data.windows import Windows, split_episodes
from uwm_jax.errors import UserError, warn
from uwm_jax.files import AnyPath

_BLOCK = 1 << 18  # actions in memory at a time


class Source:
    """A dataset of a run, with the episodes that are used, their windows and their order.

    Args:
        name: its name in the mixture.
        where: its name in messages.
        dataset: an open split; config: `config.data`; fields: those of `uwm_jax.config.source`.
        seed: of its order.
    Raises:
        UserError: as `Samples` and `select`; values that are not finite, unless `config.drop_nonfinite`; no training
            episode is long enough, or no window is left.

    Attributes:
        selection: the episodes that are used, with the rules of `limits`.
        limits: what their windows must meet, training and held-out ones.
        episodes, held_out: numbers of the training and of the validation episodes.
    """

    def __init__(self, name: str, where: str, dataset: Dataset, config: Any, fields: Any, seed: int):
        self.name, self.where, self.dataset = name, where, dataset
        self.use_actions = bool(fields.use_actions)
        self.weight = float(fields.weight)
        self.seed = seed
        self.samples = Samples(dataset, config, fields, where)
        self.selection = select(dataset, fields, where)
        broken = self.samples.not_finite(self.selection.kept)
        if broken and not config.drop_nonfinite:
            raise UserError(describe_not_finite(broken, dataset.num_episodes, where))
        if broken:
            self.selection = self.selection.without(np.unique(np.concatenate(list(broken.values()))))
        kept = self.selection.kept
        counted = np.where(kept, self.samples.action_lengths, 0)
        self.limits = find_limits(dataset, config, fields, name, self.samples.action_keys, counted)
        self.selection = self.selection.limited(limit.rule for limit in self.limits)
        # Held out first and selected then, so that sources of one dataset hold out the same episodes.
        train, held_out = split_episodes(dataset.num_episodes, config.val_ratio)
        self._num_held_out = len(held_out)
        self.episodes, self.held_out = train[kept[train]], held_out[kept[held_out]]
        what = f"training episodes of {where}"
        if self.selection.rules:
            what += f" ({self.selection})"
        self.windows = self._windows(self.episodes, what)
        self.order = StreamOrder(len(self.windows), config.num_streams, seed)
        self._begun: dict[int, tuple[list[Clip], int]] = {}  # position -> what `_drawn` gave, until it is loaded
        self._config = config
        self._val_ratio = config.val_ratio

    def cameras_of(self, views: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """{step key of a camera that is shown: (height, width) that its frames are resized to before `config.resize`}.

        Args:
            views: {view of the model: (height, width) of its frames}.
        Raises:
            UserError: a camera is shown in views of several sizes.
        """
        sizes: dict[str, set[tuple[int, int]]] = {}
        for view, keys in self.samples.shown_cameras.items():
            for key in keys:
                sizes.setdefault(key, set()).add(views[view])
        for key, found in sizes.items():
            if len(found) > 1:
                raise UserError(
                    f"config.data.latents: {self.where} shows {key} in views of {len(found)} sizes "
                    f"({', '.join(f'{h}x{w}' for h, w in sorted(found))}), but a cache holds frames of one."
                )
        return {key: found.pop() for key, found in sorted(sizes.items())}

    def open_latents(self, use: LatentUse, views: Mapping[str, tuple[int, int]]) -> None:
        """Opens the caches of its cameras, for batches with latents; arguments as for `cameras_of`.

        Raises:
            UserError: a camera has no cache that fits.
        """
        cameras, kept = self.cameras_of(views), self.selection.kept
        self.samples.latents = SourceLatents(self.dataset, self.where, use, self._config, cameras, kept)

    def held_out_windows(self, all_episodes: bool = False) -> Windows | None:
        """All windows of the validation episodes, or of all that it uses; None if there are none."""
        usable = self.usable()
        episodes = np.flatnonzero(usable) if all_episodes else self.held_out[usable[self.held_out]]
        return self._windows(episodes) if len(episodes) else None

    def usable(self) -> np.ndarray:
        """(E,) bool, the episodes of its dataset that it uses and that have a window."""
        counts = self.samples.window.count(self.dataset.episode_lengths, self.samples.action_lengths)
        usable = self.selection.kept & (counts > 0)
        if self.limits:
            found, usable = self._windows(np.flatnonzero(usable)).episodes, np.zeros_like(usable)
            usable[found] = True
        return usable

    def _windows(self, episodes: np.ndarray, what: str = "episodes") -> Windows:
        lengths, actions = self.dataset.episode_lengths, self.samples.action_lengths
        return Windows(self.samples.window, lengths, episodes, what, actions, self.limits)

    def about_held_out(self) -> str:
        """A sentence about the number and lengths of its validation episodes, for messages."""
        text = f"{self.where}: {self._num_held_out} of {self.dataset.num_episodes} episodes are held out"
        if self._num_held_out and self.selection.rules:
            text += f", {len(self.held_out)} of them used ({self.selection})"
        if len(self.held_out):
            longest = int(self.dataset.episode_lengths[self.held_out].max())
            text += f"; the longest has {longest} steps, and config.data.window spans {self.samples.window.span}"
        return text

    @property
    def identity(self) -> str:
        """Identifies what must stay the same when a run continues: the content of the dataset and of its caches of
        latents, if these are read, and the selection."""
        used = f" ({self.selection})" if self.selection.rules else ""
        latents = f" latents {self.samples.latents.identity}" if self.samples.latents else ""
        return f"{self.dataset.fingerprint}{used}{latents}"

    def clip(self, position: int) -> Clip:
        """The window at a position of this source's order."""
        return Clip(*self.windows.locate(self.order.window(position)))

    def load(self, batch: Batch, at: int, row: int, position: int, spec: DataSpec) -> None:
        """Writes the sample at a position of this source's order to index `at` of a batch, as row `row`."""
        begun = self._begun.pop(position, None)
        clips, draw = begun or self._drawn(position)
        self.samples.load(batch, at, row, clips, draw, spec)

    def begin(self, keys: Container[str], position: int) -> None:
        """Starts to read what `load` takes into a batch with these keys, where that saves time: from a bucket."""
        clips, draw = self._begun[position] = self._drawn(position)
        self.samples.begin(keys, clips, draw)

    def _drawn(self, position: int) -> tuple[list[Clip], int]:
        """The windows of the sample at a position, and its random bits."""
        draw = mix(mix(self.seed ^ 0x66696C6C) ^ position)  # independent of the order's seed
        clips = [self.clip(position)]
        for i in range(1, self.samples.num_clips):
            clips.append(Clip(*self.windows.locate(mix(draw ^ i) % len(self.windows))))
        return clips, draw

    def stats(self) -> dict[str, Stats]:
        """Statistics of `action`, where it is read, and of each low-dim key over the training episodes."""
        samples, identity, chosen = self.samples, get_transform("identity"), str(self.selection)
        if self.limits:  # then only steps count that windows hold, and which these are is the window's business too
            chosen += f"; steps of windows {json.dumps(samples.window.to_json(), sort_keys=True)}"

        def of(name: str, columns: Columns, transform: Transform, of_windows: OfWindows | None = None) -> Stats:
            return key_stats(
                self.dataset,
                columns,
                transform,
                val_ratio=self._val_ratio,
                episodes=self.episodes,
                selection=chosen,
                action_lengths=samples.action_lengths if name == "action" else None,
                steps=functools.partial(self.counted_steps, name) if self.limits else None,
                of_windows=of_windows,
            )

        stats = {name: of(name, Columns(key), identity) for name, key in samples.low_dim_keys.items()}
        parts = [
            of("action", part.columns, part.transform, self._of_windows(i))
            for i, part in enumerate(samples.robot.parts)
        ]
        return stats | ({"action": join_stats(parts)} if parts else {})

    def _of_windows(self, number: int) -> OfWindows | None:
        """The values of a part of the action in the training windows, where it depends on the window."""
        window, parts = self.samples.window, self.samples.robot.parts
        if parts[number].transform.state is None:
            return None
        start = sum(part.out_dim for part in parts[:number])
        columns = slice(start, start + parts[number].out_dim)

        def blocks() -> Iterator[np.ndarray]:
            for actions in self.training_actions(f"statistics of {parts[number].columns}"):
                yield actions[..., columns].reshape(-1, parts[number].out_dim)

        meaning = {"window": window.to_json(), "windows": len(self.windows)}
        return OfWindows(json.dumps(meaning, sort_keys=True), len(self.windows) * len(window.action), blocks)

    def training_actions(self, progress: str = "", stride: int = 1) -> Iterator[np.ndarray]:
        """The actions of every `stride`-th training window, raw units, (n, Ta, Da) float32 at a time.

        Args:
            progress: description of a progress bar, which appears where it takes long; "" = none.
        """
        indices = self.samples.window.action
        count, size = len(self.windows), stride * max(1, _BLOCK // len(indices))
        with tqdm(total=-(-count // stride), desc=progress, unit="window", delay=3, disable=not progress) as bar:
            for start in range(0, count, size):
                block = np.arange(start, min(start + size, count), stride)
                with np.errstate(invalid="ignore"):  # values that are not finite are counted
                    actions = self.samples.actions(*self.windows.locate_all(block), indices)
                yield actions
                bar.update(len(block))

    def counted_steps(self, name: str) -> np.ndarray:
        """(steps,) bool of all steps of the dataset, those whose `action`, or low-dim key, counts for the normaliser:
        of the training episodes all, but with `limits` those that a training window holds."""
        dataset, window = self.dataset, self.samples.window
        lengths = self.samples.action_lengths if name == "action" else dataset.episode_lengths
        if not self.limits:
            counted = np.zeros(dataset.num_episodes, np.int64)
            counted[self.episodes] = lengths[self.episodes]
            return counted_steps(dataset.episode_lengths, counted)
        indices = (window.action if name == "action" else window.obs) or (0,)
        return self.windows.steps_held(indices, lengths, dataset.episode_starts, int(dataset.episode_lengths.sum()))

    def used(self) -> str:
        """For people, what is trained on and held out of it, and how much each rule leaves out."""
        windows = (
            f"{len(self.windows)} training windows in {self.windows.num_episodes} episodes, {len(self.held_out)} "
            "episodes held out"
        )
        return "; ".join([*self.selection.counts, windows, *self.left_out()])

    def left_out(self) -> list[str]:
        """For people, how many training windows each limit leaves out, and what did not fit its file."""
        counts = [f"{count} left out by {name}" for name, count in self.windows.left_out.items()]
        return counts + [remark for limit in self.limits if isinstance(limit, StepRanges) for remark in limit.remarks]

    def describe(self) -> str:
        """A one-line summary."""
        lengths, dataset = self.dataset.episode_lengths, self.dataset
        counts = f" ({'; '.join(self.selection.counts)})" if self.selection.counts else ""
        of, left = (f" of {self.windows.total}", f" ({'; '.join(self.left_out())})") if self.limits else ("", "")
        use = "" if self.use_actions else "; used without actions"
        if dropped := int((self.samples.action_lengths < lengths).sum()):
            use = f"; the last action of {dropped} episodes is left out (is_last)"
        return (
            f"{dataset.directory} ({dataset.split}): {dataset.num_episodes} episodes{counts}, "
            f"{int(lengths.sum())} steps; {len(self.windows)}{of} training windows in {self.windows.num_episodes} "
            f"episodes{left}, {len(self.held_out)} held out; "
            f"cameras {', '.join(sorted(self.samples.camera_keys)) or 'none'}"
            f"{f'; {self.samples.texts.about()}' if self.samples.texts else ''}{use}"
        )


def _open(path: AnyPath, split: str, **reads: Any) -> Dataset:
    """The dataset; shards that it has to do without are told."""
    dataset = Dataset(path, split, **reads)
    if lost := dataset.lost_shards:
        shards = len(dataset.manifest["splits"][split]["shards"])
        first = next(iter(lost.values()))
        warn(f"{len(lost)} of {shards} shards are missing or damaged; their records are bad: {first}")
    return dataset


def open_sources(config: Any, seed: int) -> dict[str, Source]:
    """The sources of `config.data` by name, sorted; all of them, in every process.

    Without `config.data.sources`, the one source is the dataset of `config.data.path`, under its directory's name.

    Raises:
        UserError: as `Source`.
    """
    sources: dict[str, Source] = {}
    reads = {"read_timeout": config.read_timeout_seconds, "bear": config.max_bad_records > 0}
    if not config.sources:
        dataset = _open(dataset_dir(config.path), config.split, **reads)
        name = dataset.directory.name
        sources[name] = Source(name, str(dataset.directory), dataset, config, fields_lib.source(), seed)
    opened: dict[tuple[str, str], Dataset] = {}
    for name, fields in sorted(config.sources.items()):
        field = f"config.data.sources.{name}.path" if fields.path else "config.data.path"
        place = (str(dataset_dir(fields.path or config.path, field)), fields.split or config.split)
        if place not in opened:
            try:
                opened[place] = _open(*place, **reads)
            except UserError as e:
                raise UserError(f"{field}={fields.path or config.path}: source {name!r}: {e}") from e
        dataset = opened[place]
        # A single source keeps the run's seed. With several, one dataset in two roles must not show the same windows
        # at the same time.
        own = seed if len(config.sources) == 1 else mix(mix(seed) ^ _hash(name))
        where = f"source {name!r} ({dataset.directory})"
        sources[name] = Source(name, where, dataset, config, fields, own)
    for key, _ in config.max_action:
        read = {name: source.samples.action_keys for name, source in sources.items()}
        if not any(bounded(key, keys) for keys in read.values()):
            each = "; ".join(f"{name}: {', '.join(keys) or 'none'}" for name, keys in read.items())
            raise UserError(f"config.data.max_action: no source has {key!r} in its action, whose keys are: {each}.")
    return sources


def of_episodes(identity: str) -> str:
    """The part of a source's identity that tells which episodes it uses, without the latents that batches had."""
    return re.sub(r" latents [0-9a-f]{64}$", "", identity)


def keys_read(config: Any) -> dict[str, dict[str, Any]]:
    """{"cameras" and "action": {config field: keys}} of all sources with actions, or of the run without sources.

    Cameras are in the order of the views; of a choice all of its keys are told. `config` is `config.data`.
    """
    sources = {f"data.sources.{name}": s for name, s in config.sources.items() if s.use_actions} or {"data": config}
    found: dict[str, dict[str, Any]] = {"cameras": {}, "action": {}}
    for where, source in sources.items():
        for kind, fields in found.items():
            keys = source[kind] or config[kind]
            if kind == "cameras":
                keys = [key for _, key in sorted(zip(config.cameras, keys, strict=True))]
                keys = [" or ".join(keys_of(key, config.choices, source.choices)) for key in keys]
            fields[f"{where if source[kind] else 'data'}.{kind}"] = keys
    return found


def renamed(stored: Mapping[str, Any], ours: Sequence[str]) -> dict[str, Any]:
    """{source: value} that a run stored, under the current names of its sources.

    The single dataset of a run without `config.data.sources` is named after its directory, so its name changes if it is
    moved; the names of several sources are the config's, and determine the order of samples.
    """
    return dict(zip(ours, stored.values(), strict=True)) if len(stored) == len(ours) == 1 else dict(stored)


def spec_of(sources: Sequence[Source]) -> DataSpec:
    """The contents of the rows of all sources: as the first one with actions has it, with the robots of all; without a
    normaliser.

    Raises:
        UserError: another source has another width of the action or of a low-dimensional key.
    """
    first = next(source for source in sources if source.use_actions)
    spec = first.samples.spec()
    for source in sources:
        source.samples.check_fits(spec, first.where)
    robots = {source.name: source.samples.robot for source in sources if source.samples.robot.parts}
    return dataclasses.replace(spec, robots=robots)


def pooled_stats(sources: Sequence[Source]) -> dict[str, Stats]:
    """Statistics of `action` and of each low-dim key over the training episodes of all sources with actions, whatever
    their weights."""
    pooled: dict[str, list[Stats]] = {}
    for source in sources:
        if not source.use_actions:
            continue
        for key, values in source.stats().items():
            pooled.setdefault(key, []).append(values)
    return {key: pool_stats(parts) for key, parts in pooled.items()}


def fit_normalizer(sources: Sequence[Source], kind: str) -> Normalizer:
    """One normaliser from the statistics of `pooled_stats`."""
    stats = pooled_stats(sources)
    return Normalizer.from_stats(stats, kind, stats)


def check_normalizer(normalizer: Normalizer, spec: DataSpec, where: str) -> None:
    """Checks that a normaliser of a checkpoint is for the data keys of this run.

    A key without an entry is not normalised, and an entry without a key is unused; but both at once mean that the
    normaliser belongs to other keys.

    Raises:
        UserError: the normaliser is for other keys or widths.
    """
    ours = spec.widths
    theirs = {key: len(scale) for key, (scale, _) in normalizer.entries.items()}
    differing = any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys())
    if differing or (ours.keys() - theirs.keys() and theirs.keys() - ours.keys()):
        raise UserError(
            f"The normaliser of this run is for {_widths(theirs)}, but config.data.action and config.data.low_dim "
            f"read {_widths(ours)} from {where}. Use the data keys that the run was trained with."
        )


def _widths(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{key} ({width} numbers)" for key, width in sorted(sizes.items())) or "no keys"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
