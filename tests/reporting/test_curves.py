"""Curves for pages."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from uwm_jax.reporting import curves
from uwm_jax.reporting.curves import Curve, Panel, curves_svg


def test_curves_take_the_page_colour_and_reach_nothing_outside():
    panels = [
        Panel("losses", [Curve("training & more", [1, 2, 3], [1.0, 0.5, 0.1])], logarithmic=True),
        Panel("gap", [Curve("b", [1, 2], [1, 2], [0.5, 1.5], [1.5, 2.5], color="#123456")], zero=True),
        Panel("third", [Curve("c", [1], [1])]),
    ]
    svg = curves_svg(panels)
    assert svg == curves_svg(panels)  # the same bytes each time
    ElementTree.fromstring(svg)
    assert "currentColor" in svg and curves._PAGE not in svg and "#123456" in svg
    assert svg.count(">step<") == 3  # the place that is left over stays empty
    assert "training &amp; more" in svg and "<image" not in svg and "<metadata" not in svg
