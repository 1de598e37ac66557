from __future__ import annotations

import numpy as np
import pytest

from uwm_jax.data.intervals import Intervals, pieces


def members(intervals: Intervals) -> set[int]:
    return {i for a, b in zip(intervals.starts, intervals.stops, strict=True) for i in range(a, b)}


@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_operations_are_those_of_sets(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        parts = []
        for _ in range(2):
            starts = rng.integers(0, 100, count)
            stops = np.minimum(starts + rng.integers(-3, 6, count), 100)
            found = Intervals.union(starts, stops)
            expected = {i for a, b in zip(starts, stops, strict=True) for i in range(a, b)}
            assert members(found) == expected and len(found) == len(expected)
            assert (found.stops > found.starts).all() and (found.starts[1:] > found.stops[:-1]).all()
            assert members(found.complement(100)) == set(range(100)) - expected
            assert np.flatnonzero(found.mask(100)).tolist() == sorted(expected)
            parts.append(found)
        assert members(Intervals.joined(*parts)) == members(parts[0]) | members(parts[1])


def test_pieces_are_runs_of_consecutive_integers() -> None:
    assert pieces((1, 2, 3, 7, 9, 8)) == [(1, 3), (7, 9)]
    assert pieces((-2,)) == [(-2, -2)] and pieces(()) == []
