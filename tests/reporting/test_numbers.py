"""One format for the numbers of a column."""

from __future__ import annotations

import math

import pytest

from uwm_jax.reporting.numbers import Format


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0541, 0.14, 0.0003], ["0.05410", "0.14000", "0.00030"]),  # two digits of the smallest
        ([25.73, 31.2, 9.949], ["25.7", "31.2", "9.9"]),  # three of the largest
        ([0.5, 0.0, 1.0], ["0.50", "0.00", "1.00"]),
        ([-0.02, 0.01], ["−0.0200", "0.0100"]),
        ([1234.0, 7.0], ["1234.0", "7.0"]),
        ([3e-9, 0.5], ["3.00e-09", "5.00e-01"]),  # an exponent for all or for none
        ([2e7, 5.0], ["2.00e+07", "5.00e+00"]),
        ([0.0], ["0"]),
    ],
)
def test_a_column_has_one_format(values, shown):
    form = Format.of(values)
    assert [form(x) for x in values] == shown


def test_what_is_absent_or_not_finite_counts_for_nothing():
    assert Format.of([None, math.nan, math.inf, 0.25]) == Format.of([0.25]) == Format(3)
    assert Format(2)(-0.001) == "0.00", "no negative zero"
