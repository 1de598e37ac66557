from __future__ import annotations

import numpy as np
import pytest

from uwm_jax.data.order import StreamOrder, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_permute_is_a_permutation_that_depends_on_its_key(n: int) -> None:
    images = [[permute(i, n, key) for i in range(n)] for key in (0, 1, (1 << 64) - 1)]
    for image in images:
        assert sorted(image) == list(range(n))
    if n > 10:
        assert images[0] != images[1] != list(range(n))


def test_permutations_are_uniform_enough() -> None:
    # Where every element of 7 goes, over 3,000 keys: chi-square of 49 cells has 36 degrees of freedom.
    keys, n = 3000, 7
    counts = np.zeros((n, n))
    for key in range(keys):
        for i in range(n):
            counts[i, permute(i, n, key)] += 1
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi2 < 80


@pytest.mark.parametrize(("num_windows", "num_streams"), [(1024, 64), (1500, 64), (1000, 7), (1100, 64)])
def test_every_stream_visits_its_own_range_once_per_epoch(num_windows: int, num_streams: int) -> None:
    order = StreamOrder(num_windows, num_streams, seed=3)
    ranges = [order.stream_range(s) for s in range(num_streams)]
    assert ranges[0][0] == 0 and ranges[-1][1] == num_windows
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    sizes = [b - a for a, b in ranges]
    assert max(sizes) - min(sizes) <= 1
    for stream in (0, num_streams // 2, num_streams - 1):
        start, stop = ranges[stream]
        epochs = [
            [order.window((epoch * (stop - start) + i) * num_streams + stream) for i in range(stop - start)]
            for epoch in range(3)
        ]
        for epoch in epochs:
            assert sorted(epoch) == list(range(start, stop))
        if stop - start > 8:
            assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_and_nothing_else() -> None:
    a, b, c = (StreamOrder(500, 16, seed) for seed in (0, 0, 1))
    first = [a.window(n) for n in range(2000)]
    assert [b.window(n) for n in reversed(range(2000))] == first[::-1]
    assert [c.window(n) for n in range(2000)] != first


def test_golden_order() -> None:
    # The order is part of a checkpoint's meaning: a change here breaks every run that is to be continued.
    order = StreamOrder(100_000, 1024, seed=7)
    assert [order.window(n) for n in (0, 1, 1023, 1024, 5_000_000)] == GOLDEN


GOLDEN = [67, 180, 99954, 86, 81298]


@pytest.mark.parametrize(
    ("num_windows", "num_streams", "expected"),
    [
        (1, 1024, 1),
        (31, 1024, 1),
        (32, 1024, 2),
        (1000, 1024, 32),
        (16_383, 1024, 512),
        (16_384, 1024, 1024),
        (1600, 100, 100),
        (1599, 100, 50),
        (111, 7, 3),
        (20, 7, 1),
    ],
)
def test_few_windows_halve_the_streams(num_windows: int, num_streams: int, expected: int) -> None:
    assert StreamOrder(num_windows, num_streams, 0).num_streams == expected


@pytest.mark.parametrize("num_windows", [3, 40, 1025, 1500])
def test_every_window_is_drawn_nearly_equally_often(num_windows: int) -> None:
    order = StreamOrder(num_windows, 1024, 0)
    draws = 40 * num_windows
    counts = np.bincount([order.window(n) for n in range(draws)], minlength=num_windows)
    # One epoch more or less (40 are drawn), and ranges of n and n + 1 windows, n being at least 16.
    assert counts.min() >= 40 * 16 / 17 - 1 and counts.max() <= 40 * 17 / 16 + 1
