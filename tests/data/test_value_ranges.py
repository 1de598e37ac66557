"""Ranges of columns, and which sources of a pool use little of it."""

from __future__ import annotations

import numpy as np

from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.stats import column_stats
from uwm_jax.data.value_ranges import about_pool, ranges_of


def test_ranges_are_what_a_normaliser_maps_onto_one():
    values = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    values[:, 2] = 4.0
    values[:3, 2] = 9.0  # more than its quantiles have
    stats = {"action": column_stats(values)}
    for kind in ("minmax", "quantile"):
        low, high = ranges_of(stats, kind)["action"]
        normalizer = Normalizer.from_stats(stats, kind, stats)
        np.testing.assert_allclose(normalizer.normalize("action", low), -1, rtol=1e-6)
        np.testing.assert_allclose(normalizer.normalize("action", high), 1, rtol=1e-6)
    np.testing.assert_array_equal(ranges_of(stats, "none")["action"], [values.min(axis=0), values.max(axis=0)])


def test_pixels_and_metres_in_one_pool():
    def span(*columns):
        return np.array([c[0] for c in columns], np.float64), np.array([c[1] for c in columns], np.float64)

    pixels = {"action": span((0, 512), (0, 512), (0, 1)), "state": span((0, 1))}
    metres = {"action": span((0.1, 0.6), (-0.2, 0.4), (0, 0.2))}
    told = about_pool({"a": pixels, "b": metres})
    assert len(told) == 1 and told[0].startswith("warning: source 'b' uses little of the range of action")
    assert "column 0 (0.10%), column 1 (0.12%)." in told[0] and "config.data.sources.b.use_actions=false" in told[0]
    still = {"action": span((7, 7), (0, 512), (0, 1))}  # a constant tells nothing of units
    assert about_pool({"a": pixels, "b": still}) == [] == about_pool({"a": metres})
