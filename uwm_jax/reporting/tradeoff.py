"""Two metrics of several runs against each other: which runs no other is better than in both, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uwm_jax.reporting.curves import PAGE_COLOR, svg
from uwm_jax.reporting.results import Interval

Pair = tuple[Interval, Interval]  # of one run: its metric across and its metric upwards


class Dot(NamedTuple):
    """A run in the picture.

    Attributes:
      at: its two metrics; their intervals are drawn as error bars.
      color: `#rrggbb`.
      marker: of matplotlib.
      filled: whether the marker is, rather than an outline.
    """

    at: Pair
    color: str
    marker: str
    filled: bool


def front(points: Mapping[str, Pair], more_is_better: tuple[bool, bool]) -> list[str]:
    """Names of the points that no other dominates by its means: is at least as good in both, and better in one."""
    signs = [1 if more else -1 for more in more_is_better]
    merits = {name: [sign * m.mean for sign, m in zip(signs, at, strict=True)] for name, at in points.items()}

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    return [name for name, own in merits.items() if not any(dominates(other, own) for other in merits.values())]


def picture(title: str, dots: Sequence[Dot]) -> str:
    """An `<svg>` of the dots with error bars, as `curves.svg` makes it; a line connects the filled ones. An axis whose
    values are positive and differ tenfold is logarithmic."""

    def draw(axis: Any) -> None:
        for side, scale in enumerate((axis.set_xscale, axis.set_yscale)):
            lowest = min(dot.at[side].lo for dot in dots)
            if lowest > 0 and max(dot.at[side].mean for dot in dots) >= 10 * min(dot.at[side].mean for dot in dots):
                scale("log")
        filled = sorted((dot.at[0].mean, dot.at[1].mean) for dot in dots if dot.filled)
        axis.plot([x for x, _ in filled], [y for _, y in filled], color=PAGE_COLOR, linewidth=0.8, alpha=0.5)
        for (x, y), color, marker, is_filled in dots:
            axis.hlines(y.mean, x.lo, x.hi, color=color, linewidth=1.2, alpha=0.5)
            axis.vlines(x.mean, y.lo, y.hi, color=color, linewidth=1.2, alpha=0.5)
            face = color if is_filled else "none"
            axis.plot([x.mean], [y.mean], marker, color=color, markerfacecolor=face, markersize=7, markeredgewidth=1.5)

    return svg(title, draw)
