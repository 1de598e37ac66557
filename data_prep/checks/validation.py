"""Checks of a training dataset: what training would refuse, and what it would learn from without a word.

An error is something that training refuses or cannot read: a file that is missing or damaged, a record that differs
from the index or from its columns, an image that cannot be decoded, a value that is not finite. A warning is something
that is legal and often a mistake: a constant dimension, an outlier, a black camera, episodes too short for a window.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.checks.contact_sheet import DARK
from data_prep.jobs.workers import pool
from data_prep.sources.rlds import open_source
from uwm_jax.data import example
from uwm_jax.data.chunks import EpisodeError, Layout, cut_episode, plan_layout, step_features
from uwm_jax.data.columns import Column
from uwm_jax.data.features import STEPS
from uwm_jax.data.fitted import PATCHES, read_stored
from uwm_jax.data.normalize import is_constant
from uwm_jax.data.records import Dataset, decode_image, read_manifest
from uwm_jax.data.selection import not_finite, some_episodes
from uwm_jax.data.sidecar import find_sidecars
from uwm_jax.data.stats import Stats, column_stats, counted_lengths, counted_steps
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import Place

ERROR, WARNING = "error", "warning"
MAX_NAMED = 20  # records or frames of one kind that are described one by one
_BATCH = 16  # episodes that a process checks at a time
_BLOCK = 1 << 18


class Finding(NamedTuple):
    """One thing that is wrong: `level` is `ERROR` or `WARNING`, `where` a split, key or file, `text` what it is."""

    level: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits beyond which data are suspicious.

    Attributes:
        min_steps: an episode with fewer steps has no window; 19 is the paper's window.
        bound: largest distance from the middle of a column's range, in halves of the range from its 1 % to its 99 %
            quantile (1 = at the quantile): a value beyond it leaves little of [-1, 1] to all others.
        decode: frames of each camera and episode that are decoded, evenly spaced; -1 = all. Headers are read of all.
    """

    min_steps: int = 19
    bound: float = 10.0
    decode: int = 3


def validate(directory: Place, limits: Limits, splits: Iterable[str] = (), workers: int = 0) -> list[Finding]:
    """Checks a dataset in the training layout; reads every record once.

    Args:
        splits: those to check; all if empty.
        workers: processes; 0 = one per core.
    Returns:
        The findings, errors first.
    Raises:
        UserError: there is no dataset here, or no such split.
    """
    manifest = read_manifest(directory)
    if unknown := sorted(set(splits) - manifest["splits"].keys()):
        raise UserError(f"{directory}: no split {unknown[0]!r}; it has {', '.join(sorted(manifest['splits']))}.")
    layout, found = _schema(directory, manifest)
    for split in sorted(set(splits) or manifest["splits"]):
        try:
            dataset = Dataset(directory, split, bear=True)
        except UserError as e:
            found.append(Finding(ERROR, split, f"{e} Nothing else of this split was checked."))
            continue
        keys, unreadable = _files(dataset)
        found += unreadable + _lost(dataset)
        found += _lengths(dataset, limits.min_steps)
        found += [finding for key in keys for finding in _column(dataset, key, keys, limits.bound)]
        found += _flags(dataset, keys)
        if layout is not None:
            columns = {key: layout.columns[key] for key in layout.columns if key in keys}
            found += _records(dataset, dataclasses.replace(layout, columns=columns), limits.decode, workers)
    found += _codecs(directory) + _sidecars(directory)
    return sorted(found, key=lambda finding: finding.level != ERROR)


def _schema(directory: Place, manifest: dict[str, Any]) -> tuple[Layout | None, list[Finding]]:
    """The layout of the records by the two files of TFDS; whether these agree with the manifest."""
    try:
        source = open_source(directory, max_missing=1 << 40)  # `_lost` names them
    except UserError as e:
        return None, [Finding(ERROR, "schema", f"{e} No record was checked.")]
    found = []
    for split, info in manifest["splits"].items():
        shards = [(shard["file"], shard["records"]) for shard in info["shards"]]
        files, lengths = source.splits.get(split, []), source.lengths.get(split, [])
        declared = [(file.name, count) for file, count in zip(files, lengths, strict=True)]
        if shards != declared:
            found.append(
                Finding(ERROR, split, "dataset_info.json lists other shards or numbers of records than manifest.json")
            )
    features = step_features(source.features)
    described = manifest["step_features"]
    for key in sorted(features.keys() ^ described.keys()):
        has, lacks = ("features.json", "manifest.json") if key in features else ("manifest.json", "features.json")
        found.append(Finding(ERROR, key, f"a step key of {has} that {lacks} does not have"))
    for key in sorted(features.keys() & described.keys()):
        feature, entry = features[key], described[key]
        ours = (None if feature.shape is None else list(feature.shape), feature.dtype)
        if entry["image"] and not feature.image:
            found.append(Finding(ERROR, key, "an image by manifest.json, but not by features.json"))
        elif not feature.image and ours != (entry["shape"], entry["dtype"]):
            theirs = f"{entry['dtype']} of shape {entry['shape']}"
            found.append(
                Finding(ERROR, key, f"{ours[1]} of shape {ours[0]} by features.json, {theirs} by manifest.json")
            )
    sizes = {key: (c["height"], c["width"]) for key, c in manifest["cameras"].items()}
    return plan_layout(source.features, 1 << 40, sizes), found


def _files(dataset: Dataset) -> tuple[list[str], list[Finding]]:
    """The keys whose columns can be read; findings on the other columns and on the strings of episodes."""
    keys, found = [], []
    for key in dataset.column_keys:
        try:
            dataset.column(key)
        except UserError as e:
            found.append(Finding(ERROR, f"{dataset.split}: {key}", str(e)))
        else:
            keys.append(key)
    try:
        for key in dataset.text_keys():
            dataset.episode_texts(key)
    except UserError as e:
        found.append(Finding(ERROR, dataset.split, str(e)))
    return keys, found


def _lost(dataset: Dataset) -> list[Finding]:
    """Shards that are missing or have another size; `_records` leaves them out."""
    records = {shard["file"]: shard["records"] for shard in dataset.manifest["splits"][dataset.split]["shards"]}
    lost = list(dataset.lost_shards.items())
    texts = [f"{reason} Its {records[name]} records were not checked." for name, reason in lost[:MAX_NAMED]]
    texts += [f"{len(lost) - MAX_NAMED} more shards like these"] * (len(lost) > MAX_NAMED)
    return [Finding(ERROR, dataset.split, text) for text in texts]


def _lengths(dataset: Dataset, least: int) -> list[Finding]:
    short = np.flatnonzero(dataset.episode_lengths < least)
    if not len(short):
        return []
    text = f"shorter than {least} steps, so without a window of that span: {some_episodes(short)}"
    return [Finding(WARNING, dataset.split, text)]


def _column(dataset: Dataset, key: str, keys: Collection[str], bound: float) -> list[Finding]:
    """Values of one column: type, finiteness, constant dimensions, outliers; `keys` are those that can be read."""
    where = f"{dataset.split}: {key}"
    column = dataset.column(key)
    dtype = dataset.manifest["step_features"][key]["dtype"]
    expected = "f" if dtype.startswith(("float", "bfloat")) else "i"
    if column.dtype.kind != expected:
        return [Finding(ERROR, where, f"{dtype} by manifest.json, but its column holds {column.dtype}")]
    ends_known = "is_last" in keys or "is_last" not in dataset.column_keys
    counted = counted_lengths(dataset, key) if ends_known else dataset.episode_lengths
    keep = counted_steps(dataset.episode_lengths, counted)
    stats = column_stats(column, None, keep)
    found = []
    if stats["nonfinite"]:
        episodes = not_finite(column, dataset.episode_lengths, counted)
        text = f"{stats['nonfinite']} of {stats['count']} steps are NaN or infinite, in {some_episodes(episodes)}"
        found.append(Finding(ERROR, where, text))
    if "min" not in stats or key.rpartition("/")[2].startswith("is_"):
        return found
    low, high = np.asarray(stats["min"]), np.asarray(stats["max"])
    # RLDS has these two in every step, and most datasets fill them with one number.
    if key not in ("discount", "reward") and len(constant := np.flatnonzero(is_constant(low, high))):
        values = ", ".join(f"[{i}] = {low[i]:g}" for i in constant[:MAX_NAMED])
        found.append(Finding(WARNING, where, f"{len(constant)} of {len(low)} dimensions are constant ({values})"))
    return found + _outliers(dataset, where, column, keep, stats, bound)


def _outliers(
    dataset: Dataset, where: str, column: Column, keep: np.ndarray, stats: Stats, bound: float
) -> list[Finding]:
    low, high, q01, q99 = (np.asarray(stats[name], np.float64) for name in ("min", "max", "q01", "q99"))
    middle, half = (q01 + q99) / 2, (q99 - q01) / 2
    # Where 98 % of the values are equal there is no range to speak of: a gripper that is nearly always open.
    half = np.where(is_constant(q01, q99), np.inf, half)
    reach = np.maximum(np.abs(high - middle), np.abs(low - middle)) / half
    found = []
    dims = np.flatnonzero(reach > bound)
    beyond, rows = np.zeros((2, len(dims)), np.int64)
    worst = np.full(len(dims), -1.0)
    for start in range(0, len(column) if len(dims) else 0, _BLOCK):
        values = np.asarray(column[start : start + _BLOCK], np.float64).reshape(-1, len(low))[:, dims]
        distance = np.abs(values - middle[dims]) / half[dims]
        distance[~(keep[start : start + _BLOCK, None] & np.isfinite(values))] = 0
        beyond += (distance > bound).sum(axis=0)
        most = distance.max(axis=0)
        rows = np.where(most > worst, start + distance.argmax(axis=0), rows)
        worst = np.maximum(worst, most)
    for i, row, count in zip(dims, rows, beyond, strict=True):
        episode = int(np.searchsorted(dataset.episode_starts, row, side="right")) - 1
        value = np.asarray(column[int(row) : int(row) + 1], np.float64).reshape(-1)[i]
        found.append(
            Finding(
                WARNING,
                where,
                f"dimension {i} lies {reach[i]:.3g} times as far from its middle as 98 % of its values do (the limit "
                f"is {bound:g}): {value:g} in episode {episode} at step {row - int(dataset.episode_starts[episode])}, "
                f"and {count - 1} other values",
            )
        )
    return found


def _flags(dataset: Dataset, keys: Collection[str]) -> list[Finding]:
    """`is_first` and `is_last` of RLDS against the episodes' ends. Many datasets set neither, which says nothing."""
    found = []
    starts, lengths = dataset.episode_starts, dataset.episode_lengths
    for key, rows in (("is_first", starts), ("is_last", starts + lengths - 1)):
        if key not in keys:
            continue
        wrong = np.setdiff1d(
            np.flatnonzero(np.asarray(dataset.column(key)[:]).reshape(int(lengths.sum()), -1)[:, 0]), rows
        )
        if len(wrong):
            episodes = np.unique(np.searchsorted(starts, wrong, side="right") - 1)
            text = f"true at {len(wrong)} steps inside of episodes, in {some_episodes(episodes)}"
            found.append(Finding(WARNING, f"{dataset.split}: {key}", text))
    return found


# --- records -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Counts:
    """Findings of a process in some episodes: errors in words, decoded frames and black ones by camera and episode."""

    errors: list[str] = dataclasses.field(default_factory=list)
    decoded: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    black: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # camera -> episodes black throughout
    episodes: int = 0


_opened: tuple[Dataset, Layout, int] | None = None  # of this process


def _open(directory: str, split: str, layout: Layout, decode: int) -> None:
    global _opened
    _opened = Dataset(directory, split, bear=True), layout, decode


def _check_batch(start: int, stop: int) -> _Counts:
    assert _opened is not None
    dataset, layout, decode = _opened
    counts = _Counts()
    for episode in range(start, stop):
        _check_episode(dataset, layout, decode, episode, counts)
        counts.episodes += 1
    return counts


def _check_episode(dataset: Dataset, layout: Layout, decode: int, episode: int, counts: _Counts) -> None:
    length = int(dataset.episode_lengths[episode])
    shown = range(length) if decode < 0 else {int(i) for i in np.linspace(0, length - 1, min(decode, length)).round()}
    brightest = dict.fromkeys(dataset.cameras, -1)
    for chunk, first in enumerate(range(0, length, dataset.chunk_steps)):
        steps = min(dataset.chunk_steps, length - first)
        place = dataset.locate(episode, first)
        if place.shard in dataset.lost_shards:
            continue
        where = f"{place.shard}: record {place.record} (episode {episode}, steps from {first})"
        try:
            record = dataset.record(episode, chunk)
        except (UserError, RunError) as e:
            counts.errors.append(str(e))
            continue
        try:
            cut = cut_episode(record, layout)
        except EpisodeError as e:
            counts.errors.append(f"{where}: {e.reason}: {e}")
            continue
        found = _place(record)
        if (cut.length, found) != (steps, (first, length)):
            counts.errors.append(
                f"{where}: expected {steps} steps from {first} of {length} by the index, found {cut.length} steps from "
                f"{found[0]} of {found[1]}"
            )
            continue
        row = int(dataset.episode_starts[episode]) + first
        for key, values in cut.columns.items():
            stored = np.asarray(dataset.column(key)[row : row + steps])
            if not np.array_equal(values.astype(stored.dtype), stored, equal_nan=stored.dtype.kind == "f"):
                counts.errors.append(f"{where}: {key} has other values than its column")
        wanted = [step - first for step in shown if first <= step < first + steps]
        _decode(dataset, record, wanted, where, brightest, counts)
    for camera, most in brightest.items():
        if 0 <= most < DARK:
            counts.black.setdefault(camera, []).append(episode)


def _place(record: bytes) -> tuple[int, int]:
    """(first step, steps of the episode) as a chunk holds them; (-1, -1) without them."""
    names = (b"chunk/first_step", b"chunk/episode_steps")
    fields = example.scan(record, names)
    values = [example.ints(record, fields[name]) if name in fields else np.zeros(0) for name in names]
    return int(values[0][0]) if len(values[0]) else -1, int(values[1][0]) if len(values[1]) else -1


def _decode(
    dataset: Dataset, record: bytes, steps: list[int], where: str, brightest: dict[str, int], counts: _Counts
) -> None:
    if not steps:
        return
    fields = example.scan(record, {(STEPS + camera).encode() for camera in dataset.cameras})
    for camera, (height, width) in dataset.cameras.items():
        spans = example.bytes_spans(record, fields[(STEPS + camera).encode()])
        frame = np.empty((height, width, 3), np.uint8)
        for step in steps:
            try:
                decode_image(record[slice(*spans[step])], frame)
            except (ValueError, OSError) as e:
                counts.errors.append(f"{where}: {camera} at step {step} of the record cannot be decoded ({e})")
                continue
            counts.decoded[camera] += 1
            brightest[camera] = max(brightest[camera], int(frame.max()))


def _records(dataset: Dataset, layout: Layout, decode: int, workers: int) -> list[Finding]:
    total = dataset.num_episodes
    directory, split = str(dataset.directory), dataset.split
    edges = [*range(0, total, _BATCH), total]
    processes = min(workers or os.cpu_count() or 1, len(edges) - 1)
    counts = _Counts()
    with tqdm(total=total, desc=f"checking {split}", unit="episode") as bar:
        for part in _parts(processes, edges, (directory, split, layout, decode)):
            counts.errors += part.errors
            counts.decoded += part.decoded
            counts.episodes += part.episodes
            for camera, episodes in part.black.items():
                counts.black.setdefault(camera, []).extend(episodes)
            bar.update(part.episodes)
    found = [Finding(ERROR, split, text) for text in counts.errors[:MAX_NAMED]]
    if more := len(counts.errors) - MAX_NAMED:
        found += [Finding(ERROR, split, f"{more} more records, columns or frames like these")] * (more > 0)
    for camera, episodes in sorted(counts.black.items()):
        text = f"black in every decoded frame of {some_episodes(sorted(episodes))}"
        if len(episodes) == total:
            text = f"black in every decoded frame of all {total} episodes: a placeholder?"
        found.append(Finding(WARNING, f"{split}: {camera}", text))
    return found


def _parts(processes: int, edges: list[int], opening: tuple[str, str, Layout, int]) -> Iterator[_Counts]:
    """The counts of each batch of episodes, in order."""
    batches = list(itertools.pairwise(edges))
    if processes <= 1:
        _open(*opening)
        yield from itertools.starmap(_check_batch, batches)
        return
    with pool(processes, _open, opening) as executor:
        futures: collections.deque[concurrent.futures.Future[_Counts]] = collections.deque()
        submit: Callable[..., Any] = executor.submit
        try:
            for start, stop in batches:
                futures.append(submit(_check_batch, start, stop))
            while futures:
                yield futures.popleft().result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _codecs(directory: Place) -> list[Finding]:
    """Codecs fitted to the dataset, which it need not have: whether they can be read and are this dataset's."""
    found = []
    for name in PATCHES:
        if (directory / "codec" / f"{name}.npz").is_file():
            try:
                read_stored(directory, name)
            except UserError as e:
                found.append(Finding(ERROR, f"codec/{name}.npz", str(e)))
    return found


def _sidecars(directory: Place) -> list[Finding]:
    """Latents, texts and ranges inside the dataset: whether they fit it and their files are complete."""
    refused: list[tuple[Place, UserError]] = []
    for sidecar in find_sidecars(directory, refused):
        try:
            sidecar.verify()
        except UserError as e:
            refused.append((sidecar.directory, e))
    return [Finding(ERROR, str(folder).removeprefix(f"{directory}/"), str(e)) for folder, e in refused]
