"""HTML whose values are escaped: the one way in which text from a run's files reaches a page."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import Any

# Controls, halves of surrogate pairs (of file names that are not UTF-8), and marks that turn the direction of text.
_HIDDEN = ("Cc", "Cs")
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Html(str):
    """A string that is HTML already. Only `fill` makes one of values."""

    __slots__ = ()


def fill(template: str, *values: Any, **named: Any) -> Html:
    """Puts values into the `{}` and `{name}` of a template of HTML.

    A value of type `Html` stays as it is, those of an iterable that is no string are joined, None is nothing, and
    everything else is escaped, so that it can stand as text or between the quotes of an attribute.
    """
    return Html(template.format(*map(_safe, values), **{name: _safe(value) for name, value in named.items()}))


def _safe(value: Any) -> str:
    if isinstance(value, Html):
        return value
    if value is None:
        return ""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return "".join(map(_safe, value))
    return html.escape("".join(map(_visible, str(value))))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) in _HIDDEN or character in _BIDIRECTIONAL:
        return f"\\u{ord(character):04x}"
    return character
