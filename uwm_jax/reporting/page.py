"""The parts that pages of HTML are made of: one file, readable offline, light and dark, without scripts."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uwm_jax.evaluation.metrics import TOO_FEW
from uwm_jax.evaluation.results import Interval, number
from uwm_jax.reporting.curves import Panel, curves_svg


def image(path: Path, alt: str) -> str:
    """An `<img>` with the file inside, "" where there is none."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{path.suffix[1:]};base64,{data}">'


def cell(m: Interval | None, kind: str = "") -> str:
    """A `<td>`: the mean, and below it its interval, or that there are too few episodes for one."""
    if m is None:
        return "<td></td>"
    low_high = f"{number(m.lo)} to {number(m.hi)}" if m.tells else f"{TOO_FEW} ({m.episodes})"
    return f'<td class="number {kind}">{number(m.mean)}<br><small>{low_high}</small></td>'


def fields(columns: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str:
    """A table of config fields: {heading of a column: {field: value}}, a row for each of `names`; a field that a column
    does not have is "-"."""
    found = list(columns.values())
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(json.dumps(values[name])) if name in values else '-'}</td>" for values in found)
        + "</tr>"
        for name in names
    )
    heads = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns)
    return f"<table><tr><th></th>{heads}</tr>{rows}</table>"


def curves(panels: Sequence[Panel]) -> str:
    """A section of those panels that have a curve of at least two points; "" where none has."""
    panels = [panel._replace(curves=[c for c in panel.curves if c.steps]) for panel in panels]
    panels = [panel for panel in panels if any(len(c.steps) > 1 for c in panel.curves)]
    if not panels:
        return ""
    return f'<h2>Curves</h2><figure role="img" aria-label="curves over training steps">{curves_svg(panels)}</figure>'


def page(title: str, body: str) -> str:
    """A whole page; `title` is text, `body` HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --page: #fff; --good: #1a7f37;
  --bad: #b3261e; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ddd; --soft: #999; --line: #444; --page: #16181c; --good: #4cc26b; --bad: #ff8a80; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--page); }}
.lead {{ font-size: 1.15rem; max-width: 60rem; }}
figure {{ margin: 1rem 0 2rem; }} figcaption, small, .missing {{ color: var(--soft); }}
img {{ max-width: 100%; background: #fff; border-radius: 6px; }} svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }}
td, th {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
pre {{ white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: 1rem; }}
.yes, .best {{ color: var(--good); font-weight: bold; }} .no {{ color: var(--bad); font-weight: bold; }}
td.number, .yes, .no {{ white-space: nowrap; }}
.bar {{ width: 20rem; }} .bar i {{ display: block; height: 1rem; background: #0072b2; margin-top: .25rem; }}
</style></head><body>
{body}
</body></html>
"""
