"""The parts that pages of HTML are made of: one file, readable offline, light and dark, wide and narrow, no scripts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from uwm_jax.evaluation.metrics import TOO_FEW
from uwm_jax.files import Place
from uwm_jax.reporting.curves import Panel, curves_svg
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.results import Interval
from uwm_jax.reporting.sheets import Labels, Mark, read_labels

NOTHING = Html("")


class Section(NamedTuple):
    """A part of a page that its list of contents names.

    Attributes:
        anchor: after the `#` of its address.
        title: text.
        body: what is below the heading.
    """

    anchor: str
    title: str
    body: Html


def page(title: str, head: Html, sections: Sequence[Section]) -> str:
    """A whole page: `head`, the list of contents, and those sections that hold something."""
    sections = [section for section in sections if section.body]
    links = [fill('<li><a href="#{}">{}</a></li>', section.anchor, section.title) for section in sections]
    contents = fill('<nav aria-label="Contents"><b>Contents</b><ol>{}</ol></nav>', links) if links else NOTHING
    body = [
        fill('<section id="{}"><h2>{}</h2>\n{}</section>\n', section.anchor, section.title, section.body)
        for section in sections
    ]
    return fill(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{}</title>\n'
        "<style>{}</style></head>\n<body>\n{}\n{}\n{}</body></html>\n",
        title, Html(_STYLE), head, contents, body,
    )  # fmt: skip


# --- tables ------------------------------------------------------------------------------------------------------


def scroll(body: Html, label: str) -> Html:
    """A box that scrolls sideways where `body` is wider than the page; it can be reached by the keyboard."""
    return fill('<div class="scroll" tabindex="0" role="group" aria-label="{}">{}</div>', label, body)


def table(heads: Sequence[Any], rows: Iterable[Any], label: str) -> Html:
    """A table of rows of cells (`<td>`, `<th>`, or text), whose columns have `heads`; "" without a row."""
    body = [fill("<tr>{}</tr>\n", [_cell(cell) for cell in row]) for row in rows]
    if not body:
        return NOTHING
    head = fill("<thead><tr>{}</tr></thead>", map(_head, heads)) if heads else NOTHING
    return scroll(fill("<table>{}<tbody>\n{}</tbody></table>", head, body), label)


def _head(content: Any) -> Html:
    is_head = isinstance(content, Html) and content.startswith("<th")
    return content if is_head else fill('<th scope="col">{}</th>', content)


def _cell(content: Any) -> Html:
    is_cell = isinstance(content, Html) and content.startswith(("<td", "<th"))
    return content if is_cell else fill("<td>{}</td>", content)


def head(name: Any, about: Any = "") -> Html:
    """A `<th>` of a row, with a smaller line below it."""
    return fill('<th scope="row">{}</th>', two_lines(name, about))


def number_head(name: str, about: str = "") -> Html:
    """A `<th>` of a column of numbers."""
    return fill('<th scope="col" class="number">{}</th>', two_lines(name, about))


def two_lines(first: Any, second: Any) -> Html:
    """Text and a smaller line below it."""
    return fill("{}<br><small>{}</small>", first, second) if second else fill("{}", first)


def cell(m: Interval | None, form: Format, kind: str = "") -> Html:
    """A `<td>`: the mean, and below it its interval, or that there are too few episodes for one."""
    if m is None:
        return Html('<td class="number"></td>')
    return fill('<td class="number {}">{}<br><small>{}</small></td>', kind, form(m.mean), interval(m, form))


def interval(m: Interval, form: Format) -> str:
    """An interval in words, or that there are too few episodes for one."""
    return f"{form(m.lo)} to {form(m.hi)}" if m.is_conclusive else f"{TOO_FEW} ({m.episodes})"


def formats(rows: Sequence[Sequence[Interval | None]]) -> list[Format]:
    """A format for each column of a table, of means or, where they are 0, of the ends of intervals."""
    return [Format.of(m and (m.mean or m.hi) for m in column) for column in zip(*rows, strict=True)]


def fields(columns: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> Html:
    """A table of config fields: {heading of a column: {field: value}}, a row for each of `names`; a field that a column
    does not have is "-"."""

    def value(of: Mapping[str, Any], name: str) -> Any:
        return fill('<td class="value"><code>{}</code></td>', _json(of[name])) if name in of else "-"

    rows = [[head(fill("<code>{}</code>", name)), *(value(of, name) for of in columns.values())] for name in names]
    return table(["field", *columns], rows, "config fields")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# --- pictures ----------------------------------------------------------------------------------------------------


def figure(picture: Place, about: str, caption: Any) -> Html:
    """A picture with its labels around it, in a box that scrolls; "" where there is no such file.

    Args:
        about: what it shows, for those who do not see it.
        caption: text or `Html` below it.
    """
    try:
        data = picture.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            labels = read_labels(picture)
            if labels is None:  # of an older version, with text inside
                body = fill('<img alt="{}" src="{}">', about, _inline(data, picture.suffix))
            elif picture.suffix == ".gif":
                body = _moving(data, opened.size, labels, about)
            else:
                body = _tiles(opened, labels)
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # a damaged file
        return fill('<p class="missing">{} cannot be read: make it again.</p>', picture)
    marks = key(labels.key) if labels else NOTHING
    return fill("<figure>{}{}<figcaption>{}</figcaption></figure>", scroll(body, about), marks, caption)


def _tiles(picture: Image.Image, labels: Labels) -> Html:
    """A table of the tiles of a picture, each an image of its own with its caption."""
    rows, columns = len(labels.rows), len(labels.columns)
    width, height = picture.width / columns, picture.height / rows
    body = []
    for r, row in enumerate(labels.rows):
        cells = []
        for c, (column, _) in enumerate(labels.columns):
            caption = labels.captions[r][c] if labels.captions else ""
            if caption is None:
                cells.append(Html("<td></td>"))
                continue
            left, top, right, bottom = (round(x) for x in (c * width, r * height, (c + 1) * width, (r + 1) * height))
            buffer = io.BytesIO()
            picture.crop((left, top, right, bottom)).convert("RGB").save(buffer, "png", optimize=True)
            size = [round(x / labels.scale) for x in (right - left, bottom - top)]
            below = fill('<small style="width:{}px">{}</small>', size[0], caption) if caption else NOTHING
            alt = ": ".join(text for text in (column, row, caption) if text)
            cells.append(
                fill(
                    '<td><img alt="{}" width="{}" height="{}" src="{}">{}</td>',
                    alt, *size, _inline(buffer.getvalue(), ".png"), below,
                )
            )  # fmt: skip
        body.append(fill("<tr>{}{}</tr>\n", head(row), cells))
    wide = round(width / labels.scale)
    heads = [
        fill('<th scope="col"><div style="width:{}px">{}</div></th>', wide, two_lines(title, below))
        for title, below in labels.columns
    ]
    return fill('<table class="tiles"><thead><tr><td></td>{}</tr></thead><tbody>\n{}</tbody></table>', heads, body)


def _moving(picture: bytes, size: tuple[int, int], labels: Labels, about: str) -> Html:
    """A picture that moves is one image, so that its tiles keep step; the labels lie on a grid of the same sizes."""
    rows, columns = len(labels.rows), len(labels.columns)
    width, height = (round(x / labels.scale) for x in size)
    style = f"grid-template-columns: 7rem {width}px; grid-template-rows: auto {height}px"
    heads = [fill("<span>{}</span>", two_lines(title, below)) for title, below in labels.columns]
    sides = [fill("<span>{}</span>", row) for row in labels.rows]
    return fill(
        '<div class="moving" style="{}"><div></div><div class="heads" style="grid-template-columns: repeat({}, 1fr)">'
        '{}</div><div class="sides" style="grid-template-rows: repeat({}, 1fr)">{}</div>'
        '<img alt="{}" width="{}" height="{}" src="{}"></div>',
        style, columns, heads, rows, sides, about, width, height, _inline(picture, ".gif"),
    )  # fmt: skip


def _inline(data: bytes, suffix: str) -> str:
    return f"data:image/{suffix[1:]};base64,{base64.b64encode(data).decode()}"


_DASHES = {"-": "none", "--": "6 4", "-.": "8 3 2 3", ":": "2 3"}
_SWATCHES = {
    "frame": '<rect x="8" y="2" width="12" height="12" fill="none" stroke="{color}" stroke-width="3"/>',
    "outline": '<path d="M8 3h8v5h4v6H8z" fill="none" stroke="{color}" stroke-width="1.5"/>',
    "cross": '<path d="M14 2v12M8 8h12" fill="none" stroke="{color}" stroke-width="3"/>',
    "bar": '<rect x="1" y="5" width="26" height="6" fill="#d0d0d0"/><rect x="1" y="5" width="16" height="6" '
    'fill="{color}"/>',
    "o": '<circle cx="14" cy="8" r="5" fill="{color}"/>',
    "s": '<rect x="9" y="3" width="10" height="10" fill="{color}"/>',
    "^": '<path d="M14 2l6 11H8z" fill="{color}"/>',
    "D": '<path d="M14 1l7 7-7 7-7-7z" fill="{color}"/>',
    "ring": '<circle cx="14" cy="8" r="4.5" fill="none" stroke="{color}" stroke-width="2"/>',
    "tick": '<rect x="12" y="1" width="4" height="14" fill="{color}"/>',
    "scale": '<rect x="1" y="3" width="9" height="10" fill="#000004"/><rect x="10" y="3" width="9" height="10" '
    'fill="#b73779"/><rect x="19" y="3" width="8" height="10" fill="{color}"/>',
}
_LINE = '<path d="M1 8h26" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'


def key(marks: Sequence[Mark]) -> Html:
    """Key of lines, frames and colours; "" for none."""
    entries = []
    for mark in marks:
        shape = fill(_SWATCHES.get(mark.kind, _LINE), color=mark.color, dashes=_DASHES.get(mark.kind, "none"))
        swatch = fill('<svg width="28" height="16" viewBox="0 0 28 16" aria-hidden="true">{}</svg>', shape)
        entries.append(fill("<li>{}{}</li>", swatch, mark.text))
    return fill('<ul class="key">{}</ul>', entries) if entries else NOTHING


def curves(panels: Sequence[Panel]) -> Html:
    """Those panels that have a curve of at least two points, each with its key; "" where none has."""
    panels = [panel._replace(curves=[c for c in panel.curves if c.steps]) for panel in panels]
    panels = [panel for panel in panels if any(len(c.steps) > 1 for c in panel.curves)]
    if not panels:
        return NOTHING
    drawn = [
        fill(
            "<figure><figcaption><b>{}</b>, over {}</figcaption>"
            '<div class="curve" role="img" aria-label="{}">{}</div>{}</figure>\n',
            panel.title,
            panel.over,
            panel.title,
            Html(curves_svg(panel)),
            key(list(dict.fromkeys(Mark(c.style, c.color, c.label) for c in panel.curves))),
        )  # fmt: skip
        for panel in panels
    ]
    return fill('<div class="curves">{}</div>', drawn)


_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --page: #fff; --shade: rgba(0,0,0,.25);
  --good: #1a7f37; --bad: #b3261e; --link: #0057ae; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --soft: #999; --line: #444; --page: #16181c; --shade: rgba(0,0,0,.8); --good: #4cc26b;
    --bad: #ff8a80; --link: #7db8ff; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--page); overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } a { color: var(--link); }
p, .lead, figcaption { max-width: 60rem; }
.lead { font-size: 1.15rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 1rem 0; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
nav ol { columns: 18rem; margin: .25rem 0 1rem; padding-left: 1.5rem; }
figure { margin: 1rem 0 2rem; } figcaption, small, .missing { color: var(--soft); }
.missing code { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; max-width: 100%; background:
  linear-gradient(to right, var(--page) 30%, transparent) left / 2.5rem 100%,
  linear-gradient(to left, var(--page) 30%, transparent) right / 2.5rem 100%,
  linear-gradient(to right, var(--shade), transparent) left / .8rem 100%,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
.scroll::-webkit-scrollbar { height: 10px; }
.scroll::-webkit-scrollbar-track { background: var(--line); border-radius: 5px; }
.scroll::-webkit-scrollbar-thumb { background: var(--soft); border-radius: 5px; }
@supports not selector(::-webkit-scrollbar) { .scroll { scrollbar-color: var(--soft) var(--line); } }
table { border-collapse: collapse; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; } td code { white-space: pre-wrap; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; } thead .number { min-width: 6rem; }
td.number, .yes, .no, .open { white-space: nowrap; }
tbody th { min-width: 9rem; max-width: 22rem; font-weight: normal; } th b { white-space: nowrap; }
th small, thead small { font-weight: normal; } td:not([class]) { min-width: 6rem; }
.yes, .best { color: var(--good); font-weight: bold; } .no { color: var(--bad); font-weight: bold; }
.answers table { width: 100%; } .answers tbody th { max-width: none; width: 100%; }
.answers td:not(.number), .answers thead th { min-width: 12rem; } .answers .number { min-width: 7rem; }
.answers .number + .number { min-width: 13rem; }
.value { min-width: 8rem; max-width: 30rem; }
.tiles td, .tiles th { border: 0; padding: .1rem; } .tiles thead th { font-weight: normal; padding-right: .5rem; }
.tiles td:not([class]) { min-width: 0; }
.tiles tbody th { min-width: 6rem; max-width: 9rem; vertical-align: middle; }
.tiles img, .moving img { display: block; max-width: none; }
.tiles td small { display: block; text-align: center; line-height: 1.2; }
.moving { display: grid; width: max-content; gap: 0 .5rem; } .moving div { display: grid; }
.heads span { padding: 0 .5rem .25rem 0; } .sides span { align-self: center; overflow-wrap: anywhere; }
img { max-width: 100%; background: #fff; } .scroll > img { max-width: none; }
ul.key { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
ul.key li { display: flex; gap: .4rem; align-items: center; min-width: 0; }
ul.key svg { background: #fff; border-radius: 2px; flex: none; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 2rem; }
.curves figure { margin: 0 0 1.5rem; min-width: 0; } .curve svg { width: 100%; height: auto; }
.wide .curve { max-width: 52rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: 1rem; }
td pre { white-space: pre; border: 0; margin: 0; padding: 0; }
.bar { min-width: 8rem; width: 20rem; }
.bar i { display: block; height: 1rem; background: #0072b2; margin-top: .25rem; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } h1 { font-size: 1.6rem; } .lead { font-size: 1rem; }
  td, th { padding: .3rem .5rem; } tbody th { max-width: 13rem; } dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .4rem; }
  .bar { width: 8rem; }
  .answers tr { display: grid; grid-template-columns: minmax(0, 1fr) 5rem 10.8rem; }
  .answers tr > :first-child { grid-column: 1 / -1; border: 0; padding-bottom: 0; }
  .answers tr > * { min-width: 0 !important; padding-right: 0; font-size: .8rem; }
  .answers tr > .number { overflow-wrap: normal; padding-left: .25rem; }
  .answers tr > .open, .answers tr > .no { white-space: normal; }
}
"""
