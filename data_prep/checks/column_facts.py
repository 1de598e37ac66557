"""Facts about columns that decide how they are best used: idle steps, two values, angles that wrap, jumps.

All of them come from one pass over a column, a block of episodes at a time, so that a corpus needs no more memory than
a sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from uwm_jax.data.columns import Column
from uwm_jax.data.records import Dataset

STILL = 1e-3  # of the range of a dimension: a step that changes none by more is idle
_WRAP = 1.5 * np.pi  # a change by more, inside of [-pi, pi], is a turn through +-pi
_ANGLE = np.pi + 0.05  # largest angle, with its rounding
_JUMP = 0.5  # of a dimension's range: a change of more in one step is a discontinuity, unless it has two values
_BLOCK = 1 << 18  # steps
_SAMPLE = 100_000  # steps that a column's usual range is estimated from


@dataclasses.dataclass(frozen=True)
class ColumnFacts:
    """Remarkable properties of a column of D dimensions.

    Attributes:
        steps: number of steps that count, finite ones.
        idle: share of the steps after an episode's first in which no dimension changes by more than `STILL` of the
            range of 98 % of its values, so that an outlier makes no step idle.
        two_valued: {dimension: its two values}.
        wraps: {dimension: number of turns through +-pi}, for dimensions within [-pi, pi].
        jumps: {dimension: (number of discontinuities, episode and step of the largest)}.
        low, high: (D,) the range of the finite values; inf and -inf of a dimension without one.
    """

    steps: int
    idle: float
    two_valued: dict[int, tuple[float, float]]
    wraps: dict[int, int]
    jumps: dict[int, tuple[int, int, int]]
    low: np.ndarray
    high: np.ndarray


def column_facts(dataset: Dataset, key: str, counted: np.ndarray) -> ColumnFacts:
    """Facts about a column.

    Args:
        counted: (E,) the first steps of each episode that count.
    """
    column = dataset.column(key)
    width = int(np.prod(column.shape[1:], dtype=np.int64))
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    sample, stride = [], -(-len(column) // _SAMPLE)
    for values, first, keep in _blocks(dataset, column, counted):
        finite = keep[:, None] & np.isfinite(values)
        low = np.minimum(low, values.min(axis=0, initial=np.inf, where=finite))
        high = np.maximum(high, values.max(axis=0, initial=-np.inf, where=finite))
        some = slice(-first % stride, None, stride)
        sample.append(np.where(finite[some], values[some], np.nan))
    known = low <= high  # dimensions that are finite somewhere
    if not known.any():
        return ColumnFacts(0, 0.0, {}, {}, {}, low, high)
    span = np.where(known, high, 0.0) - np.where(known, low, 0.0)
    usual = _usual(np.concatenate(sample), span)
    varies = span > 0
    angle = varies & (low >= -_ANGLE) & (high <= _ANGLE) & (span > _WRAP)
    two = varies.copy()
    steps = still = changes = 0
    wraps, jumps = np.zeros(width, np.int64), np.zeros(width, np.int64)
    largest, at = np.zeros(width), np.zeros(width, np.int64)
    for values, first, keep in _blocks(dataset, column, counted):
        values[:, ~known] = 0
        finite = np.isfinite(values)
        two &= ((values == low) | (values == high) | ~(keep[:, None] & finite)).all(axis=0)
        keep = keep & finite.all(axis=1)
        steps += int(keep.sum())
        inside = np.flatnonzero(keep[1:] & keep[:-1] & ~_starts(dataset, first, len(values))[1:])
        change = np.abs(values[inside + 1] - values[inside])
        changes += len(inside)
        still += int((change[:, varies] <= STILL * usual[varies]).all(axis=1).sum())
        turned = angle & (change > _WRAP)
        wraps += turned.sum(axis=0)
        jumped = ~turned & (change > _JUMP * span) & varies
        jumps += jumped.sum(axis=0)
        if len(inside):
            size = np.where(jumped, change, 0)
            most = size.max(axis=0)
            at = np.where(most > largest, first + inside[size.argmax(axis=0)] + 1, at)
            largest = np.maximum(largest, most)
    two_valued = {int(i): (float(low[i]), float(high[i])) for i in np.flatnonzero(two)}
    places = [_place(dataset, int(row)) for row in at]
    return ColumnFacts(
        steps=steps,
        idle=still / changes if changes else 0.0,
        two_valued=two_valued,
        wraps={int(i): int(wraps[i]) for i in np.flatnonzero(wraps)},
        jumps={int(i): (int(jumps[i]), *places[i]) for i in np.flatnonzero(jumps) if int(i) not in two_valued},
        low=low,
        high=high,
    )


def _usual(sample: np.ndarray, span: np.ndarray) -> np.ndarray:
    """(D,) the range of 98 % of the finite values of a sample (n, D); `span` where these are all equal."""
    usual = span.copy()
    for i in np.flatnonzero(span > 0):
        values = sample[np.isfinite(sample[:, i]), i]
        low, high = np.quantile(values, (0.01, 0.99)) if len(values) else (0.0, 0.0)
        usual[i] = high - low if high > low else span[i]
    return usual


def _blocks(dataset: Dataset, column: Column, counted: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Whole episodes at a time: values (n, D) float64, the first row, and which of them count (n,)."""
    starts, lengths = dataset.episode_starts, dataset.episode_lengths
    episode = 0
    while episode < len(lengths):
        first = int(starts[episode])
        last = max(episode + 1, int(np.searchsorted(starts, first + _BLOCK, side="right")) - 1)
        stop = int(starts[last - 1] + lengths[last - 1])
        values = np.asarray(column[first:stop], np.float64).reshape(stop - first, -1)
        of = np.repeat(np.arange(episode, last), lengths[episode:last])
        yield values, first, np.arange(first, stop) - starts[of] < counted[of]
        episode = last


def _starts(dataset: Dataset, first: int, count: int) -> np.ndarray:
    """(count,) bool, the rows from `first` on that begin an episode."""
    starts = dataset.episode_starts
    inside = starts[np.searchsorted(starts, first) : np.searchsorted(starts, first + count)] - first
    marks = np.zeros(count, np.bool_)
    marks[inside] = True
    return marks


def _place(dataset: Dataset, row: int) -> tuple[int, int]:
    """(episode, step) of a row of the columns."""
    episode = int(np.searchsorted(dataset.episode_starts, row, side="right")) - 1
    return episode, row - int(dataset.episode_starts[episode])
