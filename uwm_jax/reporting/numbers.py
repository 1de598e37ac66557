"""Numbers of one column in one format."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

FEWEST_DIGITS = 2  # significant digits of the smallest number of a column
MOST_DIGITS = 3  # of the largest
MOST_DECIMALS = 6  # above which numbers have an exponent


class Format(NamedTuple):
    """A number of decimals, with an exponent or without one."""

    decimals: int
    exponent: bool = False

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Format:
        """The format in which the smallest number has two significant digits and the largest three; zeros and what is
        not finite count for nothing."""
        found = [math.floor(math.log10(abs(x))) for x in values if x is not None and math.isfinite(x) and x != 0]
        if not found:
            return cls(0)
        decimals = max(0, FEWEST_DIGITS - 1 - min(found), MOST_DIGITS - 1 - max(found))
        if decimals > MOST_DECIMALS or max(found) > MOST_DECIMALS:
            return cls(MOST_DIGITS - 1, exponent=True)
        return cls(decimals)

    def __call__(self, x: float) -> str:
        text = f"{x:.{self.decimals}{'e' if self.exponent else 'f'}}"
        if text.startswith("-") and not text.strip("-0."):
            text = text[1:]  # no negative zero
        return text.replace("-", "\N{MINUS SIGN}") if not self.exponent else text
