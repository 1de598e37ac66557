"""Pictures that are grids of equal tiles and hold no text: the labels of their columns, rows and tiles are a page's.

A folder's `pictures.json` keeps the labels of its pictures: {file name: what `Labels` has}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uwm_jax.errors import UserError
from uwm_jax.files import Place, write_text
from uwm_jax.reading import read_json

FILE = "pictures.json"


class Mark(NamedTuple):
    """An entry of a key.

    Attributes:
        kind: a line's style as matplotlib has it ("-", "--", "-.", ":"), "o", "s", "^" or "D" as its markers are,
            or "frame", "cross", "outline", "scale", "ring".
        color: `#rrggbb`.
        text: what it stands for.
    """

    kind: str
    color: str
    text: str


class Labels(NamedTuple):
    """Labels that a page writes around a picture of `len(rows)` x `len(columns)` tiles of one size.

    Attributes:
        columns: (title, what is below it) of each column.
        rows: of each row.
        captions: below each tile, (rows, columns); None: the tile is empty. Empty where no tile has one.
        key: what lines, frames and colours stand for.
        scale: pixels of the picture that are one of the page.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[str]
    captions: Sequence[Sequence[str | None]] = ()
    key: Sequence[Mark] = ()
    scale: float = 1.0


def write_labels(folder: Place, labels: Mapping[str, Labels]) -> None:
    """Writes `pictures.json`; `labels`: {file name of a picture: its labels}."""
    found = {name: each._asdict() for name, each in labels.items()}
    write_text(folder / FILE, json.dumps(found, indent=1) + "\n")


def read_labels(picture: Place) -> Labels | None:
    """The labels of a picture; None where its folder keeps none of it, as older versions left it."""
    try:
        found = read_json(picture.parent / FILE)[picture.name]
        return _labels(found)
    except (OSError, UserError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _labels(found: Mapping[str, Any]) -> Labels:
    labels = Labels(
        [(str(title), str(below)) for title, below in found["columns"]],
        [str(row) for row in found["rows"]],
        [[None if text is None else str(text) for text in row] for row in found["captions"]],
        [Mark(str(kind), _color(color), str(text)) for kind, color, text in found["key"]],
        float(found["scale"]),
    )
    captions, size = labels.captions, (len(labels.rows), len(labels.columns))
    if (
        not all(size)
        or not 0.01 <= labels.scale <= 100
        or (captions and (len(captions), *map(len, captions)) != _shape(*size))
    ):
        raise ValueError("the labels do not fit each other")
    return labels


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    return (rows, *[columns] * rows)


def _color(text: Any) -> str:
    return text if re.fullmatch("#[0-9a-fA-F]{6}", str(text)) else "#777777"
