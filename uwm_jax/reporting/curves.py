"""Curves over training steps, drawn for pages, which write titles and keys; the numbers of the axes are drawn.

Matplotlib is imported where something is drawn: a training run starts without it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PAGE_COLOR = "#010203"  # stands for the page's colour while matplotlib draws
_PAGE_COLORS: dict[Any, Any] = {f"{part}.color": PAGE_COLOR for part in ("xtick", "ytick", "grid")} | {
    "axes.edgecolor": PAGE_COLOR
}
_MOST_TICKS = 8  # along a logarithmic axis of values


class Curve(NamedTuple):
    """A line over steps, or what else its panel is over; with `low` and `high` an interval around every point."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str = "#777777"
    style: str = "-"


class Panel(NamedTuple):
    title: str
    curves: Sequence[Curve]
    logarithmic: bool = False  # where the largest value is twice the smallest
    zero: bool = False  # draw a line at zero
    over: str = "training steps"
    logarithmic_over: bool = False


def curves_svg(panel: Panel) -> str:
    """An `<svg>` of a panel, as `svg` makes it."""

    def draw(axis: Any) -> None:
        for curve in panel.curves:
            marker = "" if len(curve.steps) > 20 else "o"
            axis.plot(curve.steps, curve.values, curve.style + marker, color=curve.color, markersize=4)
            if curve.low is not None and curve.high is not None:
                axis.vlines(curve.steps, curve.low, curve.high, color=curve.color, linewidth=2, alpha=0.6)
        positive = [value for curve in panel.curves for value in curve.values if value > 0]
        if panel.logarithmic and max(positive, default=1) >= 2 * min(positive, default=1):
            axis.set_yscale("log")
        if panel.logarithmic_over:  # numbers at the values that occur, of which there are few
            axis.set_xscale("log")
            found = sorted({step for curve in panel.curves for step in curve.steps})
            shown = found[:: -(-len(found) // _MOST_TICKS) or 1]
            axis.set_xticks(shown, labels=[f"{step:g}" for step in shown])
            axis.set_xticks([], minor=True)
        if panel.zero:
            axis.axhline(0, color=PAGE_COLOR, linewidth=0.8)

    return svg(f"{panel.title}, over {panel.over}", draw)


def svg(title: str, draw: Callable[[Any], None]) -> str:
    """An `<svg>` for a page: no background, the page's own text colour, no text but the axes' numbers.

    Args:
      title: ids inside of it follow from this.
      draw: draws on matplotlib axes; `PAGE_COLOR` becomes the colour of the page's text.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", **_PAGE_COLORS}):
        figure = Figure(figsize=(5.6, 3.2), facecolor="none")
        axis = figure.add_axes((0.12, 0.1, 0.86, 0.87), facecolor="none")
        draw(axis)
        axis.grid(alpha=0.2)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    drawn = buffer.getvalue().replace(PAGE_COLOR, "currentColor")
    drawn = drawn[drawn.index("<svg") :]
    used = set(re.findall(r"#([\w.-]+)", drawn))
    return re.sub(
        r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", drawn
    )  # ids of a page are its own
