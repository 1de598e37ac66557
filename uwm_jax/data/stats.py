"""Statistics of low-dimensional columns, raw or after an action transform."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from uwm_jax.data.columns import Column
from uwm_jax.data.records import Dataset
from uwm_jax.data.selection import not_finite
from uwm_jax.data.transforms import Columns, Transform
from uwm_jax.data.windows import split_episodes
from uwm_jax.errors import UserError
from uwm_jax.files import Place, write_text
from uwm_jax.reading import read_json
from uwm_jax.storage.errors import StorageError

Stats = dict[str, Any]

_BLOCK = 1 << 18  # rows in memory at a time
_QUANTILE_VALUES = 1 << 26  # values that quantiles are computed from; more are thinned evenly
_LONGEST_NAME = 120  # characters of keys and transform in a file's name, of which file systems take 255 in all
_FIELDS = ("min", "max", "mean", "std", "q01", "q99")


def column_stats(
    column: Column,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    keep: np.ndarray | None = None,
) -> Stats:
    """Statistics per dimension of N rows of values.

    The column is read once, in order, a block at a time.

    Args:
        column: (rows, ...), in memory or on disk.
        transform: applied to (n, D) blocks, if given.
        keep: (rows,) bool, the rows that count; all if None.
    Returns:
        {"count": N, "nonfinite": rows with NaN or infinity (left out of the rest), and lists of D floats
        "min", "max", "mean", "std", "q01", "q99"}. Quantiles come from at most 2**26 values, rows evenly thinned.
    """

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(column), _BLOCK):
            block = np.asarray(column[start : start + _BLOCK])
            block = block.reshape(len(block), -1)
            block = block if keep is None else block[keep[start : start + _BLOCK]]
            with np.errstate(invalid="ignore"):  # values that are not finite are counted
                block = block if transform is None else transform(block)
            yield block

    return stats_of(blocks(), len(column) if keep is None else int(np.count_nonzero(keep)))


def stats_of(blocks: Iterable[np.ndarray], total: int) -> Stats:
    """The statistics of `column_stats` of `total` rows, which come in blocks (n, D)."""
    rows, finite_rows, thinned = 0, 0, []
    stride = 1
    low = high = mean = square = np.zeros(0)
    for number, block in enumerate(blocks):
        if number == 0:
            low, high = np.full(block.shape[1], np.inf), np.full(block.shape[1], -np.inf)
            mean = square = np.zeros(block.shape[1])
            stride = max(1, -(-total * block.shape[1] // _QUANTILE_VALUES))
        thinned.append(block[-rows % stride :: stride].astype(np.float32))
        rows += len(block)
        block = block[np.isfinite(block).all(axis=1)].astype(np.float64)
        if not len(block):
            continue
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
        # Chan et al. 1979: merging the moments of two sets is accurate in float64 for any count.
        delta, n = block.mean(axis=0) - mean, len(block)
        square = square + block.var(axis=0) * n + delta**2 * (finite_rows * n / (finite_rows + n))
        mean = mean + delta * (n / (finite_rows + n))
        finite_rows += n
    result: Stats = {"count": total, "nonfinite": total - finite_rows}
    if finite_rows:
        sample = np.concatenate(thinned)
        sample = sample[np.isfinite(sample).all(axis=1)]
        q01, q99 = np.quantile(sample, [0.01, 0.99], axis=0) if len(sample) else (low, high)
        values = (low, high, mean, np.sqrt(square / finite_rows), q01, q99)
        result |= {name: [float(v) for v in value] for name, value in zip(_FIELDS, values, strict=True)}
    return result


def dataset_stats(dataset: Dataset) -> dict[str, Stats]:
    """Statistics of every column of a split, by step key, over all its episodes; of actions, without last steps that
    `is_last` marks. If values are not finite, `nonfinite_episodes` lists the episodes."""
    found = {}
    for key in dataset.column_keys:
        counted = counted_lengths(dataset, key)
        found[key] = column_stats(dataset.column(key), None, counted_steps(dataset.episode_lengths, counted))
        if found[key]["nonfinite"]:
            broken = not_finite(dataset.column(key), dataset.episode_lengths, counted)
            found[key]["nonfinite_episodes"] = broken.tolist()
    return found


def counted_lengths(dataset: Dataset, key: str) -> np.ndarray:
    """(E,) int64, the first steps of each episode whose value of a step key counts: of actions, without last steps that
    `is_last` marks."""
    return dataset.action_lengths if is_action(key) else dataset.episode_lengths


def is_action(key: str) -> bool:
    """Whether a step key holds actions, by its name: `action`, `action_dict/...`, `observation/action...`."""
    return key.startswith("action") or key.rpartition("/")[2].startswith("action")


def counted_steps(lengths: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(rows,) bool of all episodes' steps, one episode after another: True for the first `counted` (E,) of each."""
    # Where a count begins and where it ends: sums of one byte a step, for a corpus has many.
    change = np.zeros(int(lengths.sum()) + 1, np.int8)
    starts = np.cumsum(lengths) - lengths
    np.add.at(change, starts, 1)
    np.add.at(change, starts + np.clip(counted, 0, lengths), -1)
    return np.cumsum(change[:-1], dtype=np.int8) > 0


@dataclasses.dataclass(frozen=True)
class OfWindows:
    """Values of a part of the action in windows.

    Attributes:
        meaning: which windows these are, and which steps of them, for the cache.
        rows: their number.
        blocks: gives them, (n, D) at a time.
    """

    meaning: str
    rows: int
    blocks: Callable[[], Iterable[np.ndarray]]


def key_stats(
    dataset: Dataset,
    columns: Columns,
    transform: Transform,
    val_ratio: float,
    episodes: np.ndarray | None = None,
    selection: str = "",
    action_lengths: np.ndarray | None = None,
    steps: Callable[[], np.ndarray] | None = None,
    of_windows: OfWindows | None = None,
) -> Stats:
    """Statistics of columns after a transform, over the training episodes that `val_ratio` leaves.

    Computed once, in a pass over the column, and cached in the dataset's `derived_stats/` if that is writable, with a
    digest of the file's content. A file of another selection is replaced; so is an edited or damaged one, with a
    message.

    Args:
        episodes: the training episodes to use, if not all; `selection` is a description of them.
        action_lengths: (E,) for a column of actions: the number of steps to use of each episode, if not all.
        steps: called if nothing is cached: (rows,) bool, the steps that count, in place of all those of `episodes`;
            `selection` tells which these are.
        of_windows: for a transform whose values depend on the window that a step is seen from: these values.
    Raises:
        UserError: the cached file is of another dataset.
    """
    chosen = f".{hashlib.sha256(selection.encode()).hexdigest()[:8]}" if selection else ""
    counted = dataset.episode_lengths if action_lengths is None else action_lengths
    dropped = bool((counted < dataset.episode_lengths).any())
    chosen = f".last_dropped{chosen}" if dropped else chosen
    chosen += f".{hashlib.sha256(of_windows.meaning.encode()).hexdigest()[:8]}" if of_windows else ""
    what = re.sub(r"[^\w.-]", "_", f"{columns}.{transform.name}".replace("/", "."))
    if is_long := len(what) > _LONGEST_NAME:
        what = f"{what[:_LONGEST_NAME]}.{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    name = f"derived_stats/{dataset.split}.{what}.val_{val_ratio:g}{chosen}.json"
    meaning: dict[str, Any] = {"fingerprint": dataset.fingerprint, "val_ratio": float(val_ratio)}
    meaning["last_action"] = "drop" if dropped else "keep"
    if selection:
        meaning["selection"] = selection
    if of_windows:
        meaning["windows"] = of_windows.meaning
    if is_long or columns != Columns(columns.key) or transform.state or ":" in transform.name:
        meaning |= {"columns": str(columns), "transform": transform.name}  # which the file's name does not tell exactly
    file = dataset.directory / name
    stored = _read_derived(file)
    if stored.get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise UserError(
            f"{file} holds statistics of another dataset (fingerprint {str(stored['fingerprint'])[:12]}, this one is "
            f"{dataset.fingerprint[:12]}). If the dataset is the right one, delete {file.parent}, which is computed "
            "again."
        )
    if meaning.items() <= stored.items():
        return stored["stats"]
    if of_windows:
        stats = stats_of(of_windows.blocks(), of_windows.rows)
    else:
        if steps is None:
            if episodes is None:
                episodes, _ = split_episodes(dataset.num_episodes, val_ratio)
            in_training = np.zeros(dataset.num_episodes, np.int64)
            in_training[episodes] = counted[episodes]
            kept = counted_steps(dataset.episode_lengths, in_training)
        else:
            kept = steps()
        stats = column_stats(dataset.column(columns.key), lambda block: transform.apply(columns.of(block)), kept)
    try:
        value = meaning | {"stats": stats}
        write_text(file, json.dumps(value | {"digest": _digest(value)}, indent=1))
    except (OSError, StorageError):
        pass  # a read-only dataset: the next start computes them again
    return stats


def _read_derived(file: Place) -> dict[str, Any]:
    """The content of a file that `key_stats` wrote; {} if there is none, or if it was changed."""
    if not file.exists() or not file.stat().st_size:
        return {}
    try:
        stored = read_json(file)
        if stored.pop("digest", None) == _digest(stored):
            return stored
    except (OSError, UserError, TypeError):
        pass
    print(f"{file}: edited, damaged or of an older version; the statistics are computed again.", file=sys.stderr)
    return {}


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def join_stats(parts: Iterable[Stats]) -> Stats:
    """Statistics of a vector that is a concatenation of parts."""
    parts = list(parts)
    joined: Stats = {"count": parts[0]["count"], "nonfinite": sum(p["nonfinite"] for p in parts)}
    return joined | {name: sum((p[name] for p in parts), []) for name in _FIELDS if all(name in p for p in parts)}


def pool_stats(parts: Iterable[Stats]) -> Stats:
    """Statistics of the pooled steps of several datasets.

    Exact except for the quantiles, which the parts do not determine: they are the smallest 1 % and the largest 99 %
    quantile of any part, so that even the middle of a small part lies between them.
    """
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    count = [p["count"] - p["nonfinite"] for p in parts]
    pooled: Stats = {"count": sum(p["count"] for p in parts), "nonfinite": sum(p["nonfinite"] for p in parts)}
    parts = [p for p, n in zip(parts, count, strict=True) if n]
    if not parts:
        return pooled
    weight = np.asarray([n for n in count if n], np.float64)[:, None] / sum(count)
    values = {name: np.asarray([p[name] for p in parts], np.float64) for name in _FIELDS}
    mean = (weight * values["mean"]).sum(axis=0)
    variance = (weight * (values["std"] ** 2 + (values["mean"] - mean) ** 2)).sum(axis=0)
    joined = {
        "min": values["min"].min(axis=0),
        "max": values["max"].max(axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "q01": values["q01"].min(axis=0),
        "q99": values["q99"].max(axis=0),
    }
    return pooled | {name: [float(v) for v in joined[name]] for name in _FIELDS}
