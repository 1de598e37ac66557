"""Curves over the fields that a sweep varies."""

from __future__ import annotations

import pytest

from uwm_jax.reporting import varied
from uwm_jax.reporting.results import Interval
from uwm_jax.reporting.varied import Point


def of(mean, half=0.1):
    return {"loss/action": Interval(mean, mean - half, mean + half, 90, 9)}


@pytest.fixture
def rates():
    """Two widths at three rates; two seeds of one of them, and one member without a result."""
    found = [
        Point({"rate": rate, "width": width, "seed": seed}, of(rate * width + seed))
        for rate, width, seed in ((4e-3, 64, 0), (1e-4, 64, 0), (1e-3, 64, 0), (1e-3, 64, 1), (1e-3, 128, 0))
    ]
    return [*found, Point({"rate": 4e-3, "width": 128, "seed": 0}, {})]


def test_fields_with_several_numbers_are_varied(rates):
    assert varied.fields(rates) == ["rate"], "width has two values, seed is no field of its own"
    assert varied.fields([Point({"codec": name}, {}) for name in "abc"]) == []
    assert varied.fields([Point({"list": [i]}, {}) for i in range(3)]) == []
    assert varied.fields([Point({"flag": flag}, {}) for flag in (True, 0, 2)]) == []
    assert varied.fields([Point({"huge": 10**n}, {}) for n in (1, 2, 400)]) == []


def test_a_curve_is_the_mean_over_seeds_with_their_range(rates):
    (panel,) = varied.panels(rates, "rate", ["loss/action"])
    assert (panel.title, panel.over, panel.logarithmic_over) == ("loss: action", "rate", True)
    narrow, wide = panel.curves
    assert (narrow.label, wide.label) == ("width=64", "width=128") and narrow.color != wide.color
    assert narrow.steps == [1e-4, 1e-3, 4e-3] and wide.steps == [1e-3]
    assert narrow.values == pytest.approx([0.0064, 0.564, 0.256])
    assert narrow.low == pytest.approx([-0.0936, 0.064, 0.156]) and narrow.high == pytest.approx([0.1064, 1.064, 0.356])


def test_a_field_of_one_decade_is_drawn_as_it_is():
    points = [Point({"weight": float(w)}, of(w)) for w in (1, 2, 5)]
    (panel,) = varied.panels(points, "weight", ["loss/action"])
    assert not panel.logarithmic_over and [curve.label for curve in panel.curves] == ["all members"]
