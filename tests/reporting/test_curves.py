"""Curves for pages."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from uwm_jax.reporting.curves import PAGE_COLOR, Curve, Panel, curves_svg
from uwm_jax.reporting.page import curves as curves_html


def test_curves_take_the_page_colour_and_reach_nothing_outside():
    losses = Panel("losses", [Curve("training & more", [1, 2, 3], [1.0, 0.5, 0.1])], logarithmic=True)
    ends = ([0.5, 1.5], [1.5, 2.5])
    gap = Panel("gap", [Curve("b", [1, 2], [1, 2], *ends, color="#123456", style="--")], zero=True)
    for panel in (losses, gap):
        svg = curves_svg(panel)
        assert svg == curves_svg(panel)  # the same bytes each time
        ElementTree.fromstring(svg)
        assert "currentColor" in svg and PAGE_COLOR not in svg and "<image" not in svg and "<metadata" not in svg
        texts = re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", svg)
        assert texts and not [t for t in texts if re.search("[a-z]{2}", t)], "numbers of axes only"
    assert "#123456" in curves_svg(gap)


def test_a_logarithmic_axis_has_short_labels():
    """Between 0.105 and 0.115 they would be 1.05 x 10^-1 and so on, longer than there is room."""
    near, far = (Panel("loss", [Curve("a", [1, 2], [0.1, last])], logarithmic=True) for last in (0.12, 0.5))
    assert "10^" not in curves_svg(near) and "10^" in curves_svg(far)


def test_a_logarithmic_axis_of_values_has_the_values_that_occur():
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3]
    svg = curves_svg(Panel("loss", [Curve("a", rates, [4, 3, 2, 1])], over="rate", logarithmic_over=True))
    texts = re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", svg)
    assert texts[:4] == ["0.00025", "0.0005", "0.001", "0.002"] and "10^" not in svg


def test_two_panels_have_no_id_in_common():
    used = [
        set(re.findall(r' id="([^"]+)"', curves_svg(Panel(title, [Curve("a", [1, 2], [1.0, 0.5])]))))
        for title in ("one", "two")
    ]
    assert used[0] and not used[0] & used[1]


def test_every_curve_is_in_the_key_with_its_dashes(parse):
    curve = Curve("held out <1>", [1, 2], [1.0, 0.5], color="#123456", style="--")
    page = parse(curves_html([Panel("loss", [curve, curve._replace(label="never evaluated", steps=[], values=[])])]))
    assert "held out <1>" in page.text and "never evaluated" not in page.text
    dashes = [a["stroke-dasharray"] for tag, a in page.tags if a.get("stroke") == "#123456"]
    assert dashes == ["6 4"]


def test_curves_that_look_alike_share_an_entry_of_the_key(parse):
    curve = Curve("both", [1, 2], [1.0, 0.5])
    assert parse(curves_html([Panel("loss", [curve, curve._replace(values=[2.0, 1.0])])])).text.count("both") == 1
