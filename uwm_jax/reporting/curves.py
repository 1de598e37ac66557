"""Curves over training steps, drawn for pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")

_PAGE = "#010203"  # stands for the page's colour while matplotlib draws
_PAGE_COLORS: dict[Any, Any] = {f"{part}.color": _PAGE for part in ("text", "xtick", "ytick", "grid")} | {
    "axes.edgecolor": _PAGE,
    "axes.labelcolor": _PAGE,
}


class Curve(NamedTuple):
    """A line over steps; with `low` and `high` an interval around every point."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str | None = None
    style: str = "-"


class Panel(NamedTuple):
    title: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    zero: bool = False  # draw a line at zero


def curves_svg(panels: Sequence[Panel], columns: int = 2) -> str:
    """An `<svg>` of panels for a page: no background, and the page's own text colour and font."""
    with matplotlib.rc_context({"svg.hashsalt": "uwm_jax", "svg.fonttype": "none", **_PAGE_COLORS}):
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(5.6 * columns, 3.6 * rows), layout="constrained", facecolor="none")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, panels, strict=False):
            axis.set(title=panel.title, xlabel="step", facecolor="none")
            for curve in panel.curves:
                marker = "" if len(curve.steps) > 20 else "o"
                axis.plot(
                    curve.steps, curve.values, curve.style + marker, color=curve.color, label=curve.label, markersize=4
                )
                if curve.low is not None and curve.high is not None:
                    color = axis.lines[-1].get_color()
                    axis.vlines(curve.steps, curve.low, curve.high, color=color, linewidth=2, alpha=0.6)
            if panel.logarithmic:
                axis.set_yscale("log")
            if panel.zero:
                axis.axhline(0, color=_PAGE, linewidth=0.8)
            axis.grid(alpha=0.2, which="both")
            axis.legend(fontsize=8, framealpha=0)
        for axis in axes[len(panels) :]:  # what is left of the last row
            axis.axis("off")
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue().replace(_PAGE, "currentColor")
    return svg[svg.index("<svg") :]
