"""The meanings of config fields, for `--help`: the comments that stand next to the fields in the source.

`uwm_jax.config.base`, `source` and the systems' `add_fields` are run under observation, so that the statement which
sets a field is known however it is reached. Its comment is what ends its lines, and comment lines directly above it. A
dictionary's comment counts for its keys; where a field is set more than once, the last statement with a comment does.
"""

from __future__ import annotations

import ast
import functools
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import config as config_lib

WIDTH = 100  # characters of a line of help

_SOURCE = "data.sources.NAME"
_SET = ConfigDict.__setitem__.__code__


def describe(spec: str, overrides: Iterable[tuple[str, str]]) -> list[str]:
    """All fields of a config with their values and meanings, as lines for the terminal.

    Args:
      spec: `FILE.py[:argument]`; "": the defaults of the system `uwm`.
      overrides: fields that flags change on top of it.

    Raises:
      UserError: the config cannot be used.
    """
    if spec:
        config, title = config_lib.load(spec, overrides), f"values of {spec}"
    else:
        config, title = config_lib.base(), "the defaults of the system uwm"
        config_lib.apply_overrides(config, overrides)
    known = meanings(functools.partial(config_lib.base, config.system))
    of_source = meanings(config_lib.source)
    lines = ["", f"Config fields, set by --config.FIELD=VALUE, with {title}:"]
    fields = config_lib.flatten(config)
    for name, value in fields.items():
        _, _, of = name.partition("data.sources.")
        field = of.partition(".")[2] or name
        described = of_source if of else known
        # The entries of `choices` have names of their own, and the meaning of the field.
        lines += _entry(name, value, described[field if field in described else field.rpartition(".")[0]])
    if not config.data.choices:
        lines += _entry("data.choices", {}, known["data.choices"])
    for name, source in config.data.sources.items():
        if not source.choices:
            lines += _entry(f"data.sources.{name}.choices", {}, of_source["choices"])
    if not any(name.startswith("data.sources.") for name in fields):
        lines += ["", f"Each source of a mixture, {_SOURCE} = uwm_jax.config.source(...):"]
        for field, value in config_lib.source().items():
            lines += _entry(
                f"{_SOURCE}.{field}", dict(value) if isinstance(value, ConfigDict) else value, of_source[field]
            )
    return lines


def _entry(name: str, value: Any, meaning: str) -> list[str]:
    return [
        f"  {name} = {value!r}",
        *textwrap.wrap(meaning, WIDTH, initial_indent="      ", subsequent_indent="      "),
    ]


def meanings(make: Callable[[], ConfigDict]) -> dict[str, str]:
    """The meaning of every field of the config that `make()` returns, by its dotted name; "" for one without. A group
    without fields, such as `data.choices`, is one field."""
    # Nodes are kept, so that none is made anew at the address of one that is gone.
    statements: dict[tuple[int, str], tuple[ConfigDict, list[str]]] = {}

    def observe(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is _SET:
            node, key = frame.f_locals["self"], frame.f_locals["key"]
            caller = frame.f_back
            while caller and caller.f_code.co_filename == _SET.co_filename:
                caller = caller.f_back
            if caller:
                found = _comment(caller.f_code.co_filename, caller.f_lineno)
                statements.setdefault((id(node), key), (node, []))[1].append(found)

    before = sys.getprofile()
    sys.setprofile(observe)
    try:
        config = make()
    finally:
        sys.setprofile(before)

    def walk(node: ConfigDict, prefix: str, inherited: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in node.items():
            _, comments = statements.get((id(node), key), (node, []))
            meaning = next((text for text in reversed(comments) if text), inherited)
            if isinstance(value, ConfigDict) and value:
                found |= walk(value, f"{prefix}{key}.", meaning)
            else:
                found[f"{prefix}{key}"] = meaning
        return found

    return walk(config, "", "")


def _comment(file: str, line: int) -> str:
    """The comment of the statement of a source file that a line belongs to."""
    comments, alone, statements = _source(file)
    within = [(first, last) for first, last in statements if first <= line <= last]
    if not within:
        return ""
    first, last = max(within)  # the innermost one
    above = first
    while above - 1 in alone:
        above -= 1
    return " ".join(comments[n] for n in range(above, last + 1) if n in comments)


@functools.cache
def _source(file: str) -> tuple[dict[int, str], frozenset[int], list[tuple[int, int]]]:
    """({line: comment}, lines that hold nothing but a comment, (first, last line) of every statement)."""
    text = Path(file).read_text(encoding="utf-8")
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").rstrip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    spans = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt)
    ]
    return comments, frozenset(alone), spans
