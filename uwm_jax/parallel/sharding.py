"""Sharding rules, which array lies on which axis of the mesh: an ordered table of patterns, applied and shown.

A table of parameters belongs to a system (`TreeInfo.mesh_rules`; `uwm_jax/systems/tables.py` explains them), or is
`PARAMS` of a Python file that `config.mesh.rules` names, which may have `ACTIVATIONS` too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uwm_jax.errors import UserError, suggest
from uwm_jax.files import local_path
from uwm_jax.models.activations import NAMES
from uwm_jax.parallel.mesh import AXES, replicated
from uwm_jax.reading import run_python

EXAMPLE = "docs/training.md"  # which explains a table

Entry = tuple[str, ...]  # the mesh axes that cut one axis of an array, outermost first; () = whole


@dataclasses.dataclass(frozen=True)
class Rules:
    """One table.

    Attributes:
      name: where it came from, for messages.
      params: (pattern of the parameter's path, one entry per leading axis) pairs; the first match counts.
      activations: (logical name, mesh axes) pairs.
    """

    name: str
    params: tuple[tuple[str, tuple[Entry, ...]], ...]
    activations: tuple[tuple[str, Entry], ...]

    def find(self, path: str) -> tuple[str, tuple[Entry, ...]]:
        """The rule of a parameter; ("-", ()) where none matches."""
        return next((rule for rule in self.params if fnmatch.fnmatchcase(path, rule[0])), ("-", ()))


# Which mesh axes cut the named axes of activations (`uwm_jax.models.activations`).
ACTIVATIONS = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("heads", "tensor"),
    ("hidden", "tensor"),
    ("width", ("tensor", "fsdp")),
)


def load_rules(file: str, system: str, params: Sequence[tuple[str, tuple[Any, ...]]]) -> Rules:
    """The table of a system, or that of a file.

    Args:
      file: `config.mesh.rules`: "" for the system's own, or a FILE.py.
      system: its name; params: its table, as `TreeInfo.mesh_rules`.

    Raises UserError for a missing or malformed file, an unknown mesh axis or an unknown activation name.
    """
    if not file:
        return _rules(system, params, ACTIVATIONS, f"the mesh rules of {system}")
    path = local_path(file, "config.mesh.rules")
    if not file.endswith(".py") or not path.is_file():
        raise UserError(
            f"config.mesh.rules={file!r}: there is no such file. Expected '', the table of the system ({system}), or "
            "the path of a FILE.py."
        )
    where = f"config.mesh.rules: {path}"
    module = run_python(path, where, f"tables as in {EXAMPLE}", lambda module: module)
    activations = getattr(module, "ACTIVATIONS", ACTIVATIONS)
    return _rules(file, getattr(module, "PARAMS", None), activations, where)


def _rules(name: str, params_table: Any, activations_table: Any, where: str) -> Rules:
    params = []
    for pattern, entries in _pairs(params_table, "PARAMS", where):
        if not isinstance(entries, tuple | list):
            raise UserError(
                f"{where}: the spec of {pattern!r} is {entries!r}, expected a tuple such as (None, 'fsdp')."
            )
        spec_of = tuple(_entry(e, f"{where}: PARAMS {pattern!r}") for e in entries)
        used = [axis for entry in spec_of for axis in entry]
        if len(set(used)) != len(used):
            raise UserError(f"{where}: the spec of {pattern!r} names a mesh axis twice: {entries!r}.")
        params.append((pattern, spec_of))
    activations = []
    for logical, entry in _pairs(activations_table, "ACTIVATIONS", where):
        if logical not in NAMES:
            raise UserError(
                f"{where}: ACTIVATIONS names {logical!r}, expected one of {', '.join(NAMES)}.{suggest(logical, NAMES)}"
            )
        activations.append((logical, _entry(entry, f"{where}: ACTIVATIONS {logical!r}")))
    return Rules(name, tuple(params), tuple(activations))


def _pairs(pairs: Any, name: str, where: str) -> list[tuple[str, Any]]:
    if not isinstance(pairs, tuple | list) or not all(
        isinstance(p, tuple | list) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        found = "nothing of that name" if pairs is None else repr(pairs)
        found = found if len(found) < 200 else found[:200] + "..."
        raise UserError(f"{where}: expected {name} = ((name, spec), ...), as in {EXAMPLE}; found {found}.")
    return [(p[0], p[1]) for p in pairs]


def _entry(entry: Any, where: str) -> Entry:
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    for axis in axes if isinstance(axes, tuple | list) else [axes]:
        if axis not in AXES:
            raise UserError(
                f"{where}: {axis!r} is no axis of the mesh; expected None, or of {', '.join(AXES)}."
                f"{suggest(str(axis), AXES)}"
            )
    return tuple(axes)


def state_sharding(mesh: Mesh, rules: Rules, shapes: Any) -> Any:
    """A NamedSharding for every leaf of a train state.

    Parameters follow the rules; any other array that ends in a parameter's path and has its shape (moments of the
    optimizer, moving averages) lies where the parameter does; the rest is whole on every device.

    Args:
      shapes: the state as arrays or ShapeDtypeStructs, with the parameters under `params`.

    Raises UserError for a rule whose spec has more entries than an array that it matches has axes.
    """
    params = {path: (x.shape, _fit(mesh, rules, path, x.shape)) for path, x in _leaves(shapes.params)}

    def place(path: Any, x: Any) -> NamedSharding:
        parts = _text(path).split("/")
        for start in range(1, len(parts)):
            shape, sharding = params.get("/".join(parts[start:]), (None, None))
            if sharding is not None and shape == x.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _fit(mesh: Mesh, rules: Rules, path: str, shape: tuple[int, ...]) -> NamedSharding:
    pattern, entries = rules.find(path)
    if len(entries) > len(shape):
        raise UserError(
            f"config.mesh.rules={rules.name!r}: the spec of {pattern!r} has {len(entries)} entries, but {path} has the "
            f"shape {shape}."
        )
    fitted = []
    for size, entry in zip(shape, entries, strict=False):
        axes = [axis for axis in entry if mesh.shape[axis] > 1]
        while axes and size % math.prod(mesh.shape[axis] for axis in axes):
            axes.pop()
        fitted.append(axes[0] if len(axes) == 1 else tuple(axes) or None)
    while fitted and fitted[-1] is None:
        fitted.pop()
    return NamedSharding(mesh, PartitionSpec(*fitted))


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(_text(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


@contextlib.contextmanager
def activations(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """While it is entered, traced models lay their activations out as the rules say.

    Enter it inside the function that is jitted: the layout is then part of the program, whoever calls it.
    """
    table = [(name, axes) for name, axes in rules.activations if axes]
    with nn.logical_axis_rules(table), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


# --- what a run shows at its start ---------------------------------------------------------------------


def table(mesh: Mesh, rules: Rules, shapes: Any, shardings: Any) -> str:
    """The parameters by rule: how many, how they are cut, and what each device holds of them and of the whole state.

    A line stands for all parameters that one rule cuts in the same way and shows the shape of the largest. MB are
    10^6 bytes.

    Args:
      shapes, shardings: a train state of shapes, and what `state_sharding` made of it.
    """
    placed = dict(_leaves(shardings.params))
    per_param, other = _state_bytes(shapes, shardings)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    order = {pattern: i for i, (pattern, _) in enumerate(rules.params)}
    for path, x in _leaves(shapes.params):
        pattern, entries = rules.find(path)
        key = pattern, _spec_text(mesh, entries, x.shape, placed[path].spec)
        group = groups.setdefault(key, {"arrays": 0, "size": 0, "largest": (), "params": 0, "state": 0})
        group["arrays"] += 1
        group["size"] += math.prod(x.shape)
        group["largest"] = max(group["largest"], x.shape, key=math.prod)
        group["params"] += _bytes_per_device(x, placed[path])
        group["state"] += per_param[path]
    header = ("rule", "arrays", "largest", "cut", "parameters", "MB/device", "with state")
    rows = [header]
    for (pattern, cut), g in sorted(groups.items(), key=lambda item: order.get(item[0][0], len(order))):
        shape = "x".join(map(str, g["largest"]))
        rows.append((pattern, str(g["arrays"]), shape, cut, f"{g['size']:,}", _mb(g["params"]), _mb(g["state"])))
    rows.append(("counters, scalars", "", "", "whole", "", "", _mb(other)))
    total = {k: sum(g[k] for g in groups.values()) for k in ("arrays", "size", "params", "state")}
    sums = (f"{total['size']:,}", _mb(total["params"]), _mb(total["state"] + other))
    rows.append(("total", str(total["arrays"]), "", "", *sums))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    left = (True, False, True, True, False, False, False)
    lines = [f"mesh: {', '.join(f'{axis} {mesh.shape[axis]}' for axis in AXES)}; rules {rules.name}"]
    for row in rows:
        cells = [t.ljust(w) if is_left else t.rjust(w) for t, w, is_left in zip(row, widths, left, strict=True)]
        lines.append("  ".join(cells).rstrip())
    if any("!" in row[3] for row in rows):
        lines.append("! not cut as the rule says: the mesh axis does not divide that axis of the array")
    return "\n".join(lines)


def _state_bytes(shapes: Any, shardings: Any) -> tuple[dict[str, int], int]:
    """Bytes per device of the whole state by the parameter that each leaf belongs to, and of all other leaves."""
    per_param = {path: 0 for path, _ in _leaves(shapes.params)}
    other = 0
    for (path, x), (_, sharding) in zip(_leaves(shapes), _leaves(shardings), strict=True):
        parts = path.split("/")
        owner = next((o for i in range(1, len(parts)) if (o := "/".join(parts[i:])) in per_param), None)
        if owner is None:
            other += _bytes_per_device(x, sharding)
        else:
            per_param[owner] += _bytes_per_device(x, sharding)
    return per_param, other


def _bytes_per_device(x: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f}"


def _spec_text(mesh: Mesh, asked: tuple[Entry, ...], shape: tuple[int, ...], spec: PartitionSpec) -> str:
    texts = []
    for i, entry in enumerate(asked):
        got = spec[i] if i < len(spec) else None
        got = () if got is None else (got,) if isinstance(got, str) else got
        short = len(got) < sum(mesh.shape[axis] > 1 for axis in entry)
        texts.append(("+".join(got) or ".") + "!" * short)
    return "whole" if all(t == "." for t in texts) else " ".join(texts)
