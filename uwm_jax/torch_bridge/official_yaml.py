"""The saved YAML of an official PyTorch run: plain YAML, or Hydra's with `${a.b[0]}` references left in."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, as_place


class _Loader(yaml.SafeLoader):
    """The safe loader, for which `1e-4` is a number as in YAML 1.2 (PyYAML reads a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)

_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_TOKEN = re.compile(r"\[([^\[\]]+)\]|([^.\[\]]+)")
_REQUIRED = object()

MAX_BYTES = 4 << 20
MAX_DEPTH = 50
MAX_NODES = 100_000  # with every alias written out
MAX_UNFOLDED = 1_000_000  # values, and characters of strings, that following the references of a field may visit
MEANT = "The file meant is .hydra/config.yaml in the output folder of the official run."


class OfficialYaml:
    """A saved configuration whose references are followed when a field is read, and not before.

    Fields that are not read may therefore hold resolvers such as `${now:%Y}`. Raises UserError for a file that is
    no plain YAML mapping, is larger than `MAX_BYTES`, refers to itself, or is nested or unfolds beyond the limits.
    """

    def __init__(self, path: AnyPath):
        self.path = as_place(path)
        where = f"--official-config: {path}"
        try:
            size = self.path.stat().st_size
            if size > MAX_BYTES:
                raise UserError(f"{where}: {size} bytes; a saved configuration has at most {MAX_BYTES}. {MEANT}")
            text = self.path.read_text(encoding="utf-8")
            if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
                raise UserError(f"{where} is an HTML page, not YAML: download the file itself. {MEANT}")
            self._root = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
            unfit = _unfit(self._root)
        except OSError as e:
            raise UserError(f"--official-config: cannot read {str(path)!r} ({e.strerror}).") from e
        except RecursionError as e:
            raise UserError(f"{where} is nested more than {MAX_DEPTH} levels deep. {MEANT}") from e
        except (yaml.YAMLError, ValueError) as e:  # the latter for bytes that are no UTF-8 and dates that are none
            raise UserError(f"{where} is not plain YAML: {e}") from e
        if unfit:
            raise UserError(f"{where} {unfit}. {MEANT}")
        if not isinstance(self._root, dict):
            raise UserError(f"{where} should hold a mapping of fields, found {self._root!r:.60}.")
        if "defaults" in self._root and "model" not in self._root:
            raise UserError(f"{where} lists `defaults`, from which Hydra composes a configuration. {MEANT}")

    def get(self, field: str, default: Any = _REQUIRED) -> Any:
        """The value at `a.b.c` with every reference inside it followed.

        Raises UserError for an absent field without a default, a reference to nothing, a reference
        cycle, references that unfold beyond the limits, and a resolver (`${name:...}`), which only Hydra can run.
        """
        self._unfolded = 0
        try:
            return self._resolve(self._find(field, ()), ())
        except KeyError as e:
            if default is not _REQUIRED and e.args[0] == field:
                return default
            if e.args[0] == field:
                raise self.error(field, f"is missing from the official configuration. {MEANT.rstrip('.')}") from e
            raise self.error(field, f"refers to ${{{e.args[0]}}}, which is not in the file") from e

    def optional(self, field: str, default: Any) -> Any:
        """Like `get`, for what only describes the run: the default too where the value cannot be read."""
        try:
            return self.get(field, default)
        except UserError:
            return default

    def error(self, field: str, message: str) -> UserError:
        return UserError(f"--official-config: {self.path}: {field} {message}.")

    def _find(self, field: str, seen: tuple[str, ...]) -> Any:
        node = self._root
        for match in _TOKEN.finditer(field):
            token = (match[1] or match[2]).strip("'\"")
            node = self._resolve(node, seen) if isinstance(node, str) else node
            if isinstance(node, list) and token.isdigit() and int(token) < len(node):
                node = node[int(token)]
            elif isinstance(node, dict) and token in node:
                node = node[token]
            else:
                raise KeyError(field)
        return node

    def _resolve(self, value: Any, seen: tuple[str, ...]) -> Any:
        self._unfolded += len(value) if isinstance(value, str) else 1
        if self._unfolded > MAX_UNFOLDED:
            raise self.error(f"${{{seen[0]}}}" if seen else "a field", f"unfolds to more than {MAX_UNFOLDED} values")
        if isinstance(value, dict):
            return {k: self._resolve(v, seen) for k, v in value.items()}
        if isinstance(value, list):
            return [self._resolve(v, seen) for v in value]
        while isinstance(value, str) and (match := _INNERMOST.search(value)):
            reference = match[1].strip()
            if ":" in reference or reference.startswith("."):
                raise self.error(
                    f"${{{reference}}}", "is a resolver or relative reference; save the configuration resolved instead"
                )
            if len(seen) >= MAX_DEPTH:
                raise self.error(f"${{{seen[0]}}}", f"leads through more than {MAX_DEPTH} references")
            if reference in seen:
                raise self.error(f"${{{reference}}}", "refers to itself")
            target = self._resolve(self._find(reference, seen + (reference,)), seen + (reference,))
            if match.span() == (0, len(value)):
                return target
            value = value[: match.start()] + str(target) + value[match.end() :]
        return value


def _unfit(root: Any) -> str:
    """Why a parsed file is no configuration; empty where it may be one."""
    nodes = 0
    stack: list[tuple[Any, tuple[int, ...]]] = [(root, ())]
    while stack:
        node, above = stack.pop()
        nodes += 1
        if nodes > MAX_NODES:
            return f"unfolds to more than {MAX_NODES} values"
        if not isinstance(node, dict | list):
            continue
        if id(node) in above:
            return "holds an alias that refers to what it is part of"
        if len(above) >= MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} levels deep"
        stack += [(child, (*above, id(node))) for child in (node.values() if isinstance(node, dict) else node)]
    return ""


def typed(official: OfficialYaml, field: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = official.get(field, default)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # mlp_ratio: 4.0, num_train_steps: 1e2
    if type(value) is not kind:
        names = {int: "an integer", bool: "true or false", str: "a string"}
        raise official.error(field, f"should be {names[kind]}, found {value!r}")
    return value


def number(official: OfficialYaml, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise official.error(field, f"should be a finite number, found {value!r:.60}")
    return float(value)


def ints(official: OfficialYaml, field: str, length: int) -> tuple[int, ...]:
    value = official.get(field)
    if not isinstance(value, list) or len(value) != length or not all(type(v) is int and v > 0 for v in value):
        raise official.error(field, f"should be a list of {length} positive integers, found {value!r}")
    return tuple(value)
