"""Sets of integers as disjoint half-open intervals, vectorised: a few million of them take a fraction of a second."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Intervals:
    """A set of integers: [starts[i], stops[i]), rising, neither empty nor touching each other.

    Attributes:
        starts, stops: (n,) int64.
    """

    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def union(cls, starts: np.ndarray, stops: np.ndarray) -> Intervals:
        """The integers that lie in any of the intervals, which may overlap, be empty and come in any order."""
        starts, stops = np.asarray(starts, np.int64), np.asarray(stops, np.int64)
        starts, stops = starts[stops > starts], stops[stops > starts]
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(stops[order])
        first = np.flatnonzero(np.concatenate([[True], starts[1:] > reach[:-1]])[: len(starts)])
        last = np.concatenate([first[1:], [len(starts)]])[: len(first)] - 1
        return cls(starts[first], reach[last])

    @classmethod
    def joined(cls, *parts: Intervals) -> Intervals:
        """The integers of any of the sets."""
        return cls.union(*(np.concatenate([getattr(p, end) for p in parts]) for end in ("starts", "stops")))

    def complement(self, size: int) -> Intervals:
        """The integers of 0 .. size - 1 that are not in this set, which lies within them."""
        return Intervals.union(np.concatenate([[0], self.stops]), np.concatenate([self.starts, [size]]))

    def __len__(self) -> int:
        """How many integers there are."""
        return int((self.stops - self.starts).sum())

    def mask(self, size: int) -> np.ndarray:
        """(size,) bool, True for the integers of this set, which lies within 0 .. size - 1."""
        change = np.zeros(size + 1, np.int8)
        change[self.starts], change[self.stops] = 1, -1
        return np.cumsum(change[:-1], dtype=np.int8).view(np.bool_)


def pieces(indices: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive integers among `indices`."""
    found = Intervals.union(np.asarray(indices, np.int64), np.asarray(indices, np.int64) + 1)
    return [(int(start), int(stop) - 1) for start, stop in zip(found.starts, found.stops, strict=True)]
