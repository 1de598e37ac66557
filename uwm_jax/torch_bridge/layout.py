"""Official state dicts and our parameter trees, exact in both directions.

Every official tensor is one parameter of ours, or one slice of a stacked one, with its axes split, permuted and joined
again; no value changes, so the round trip is bit-exact. The same map carries gradients. A system says which tensor a
parameter is, in its `official.py`, with the layouts below: torch kernels are (outputs, inputs...), ours (inputs...,
outputs...); a flattened patch is (channel, frame, row, column) there and (frame, row, column, channel) here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uwm_jax.errors import UserError
from uwm_jax.models.layers import BLOCKS

Path = tuple[str, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One official tensor: parameter `path` (slice `layer` of it when stacked) has axes `split`, which
    `order` permutes into torch's, joined to `torch_shape`."""

    name: str
    path: Path
    layer: int | None
    split: Shape
    order: Shape
    torch_shape: Shape

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(value.reshape(self.split).transpose(self.order)).reshape(self.torch_shape)

    def from_torch(self, value: np.ndarray, shape: Shape) -> np.ndarray:
        permuted = value.reshape(tuple(self.split[axis] for axis in self.order))
        return np.ascontiguousarray(permuted.transpose(np.argsort(self.order))).reshape(shape)


# The entry of the parameter at a path: (path, layer or None, shape without the axis of layers)
EntryOf = Callable[[Path, int | None, Shape], Entry]


def table(params: Any, entry_of: EntryOf) -> list[Entry]:
    """The entries of a parameter tree, sorted by official name.

    Args:
      params: the tree, of arrays or of anything with a `shape`; what lies under `blocks` is stacked.
      entry_of: of the system whose tree it is.
    """
    entries = []
    for path, leaf in _flatten(params).items():
        shape = tuple(int(n) for n in leaf.shape)
        if BLOCKS in path:
            entries += [entry_of(path, layer, shape[1:]) for layer in range(shape[0])]
        else:
            entries.append(entry_of(path, None, shape))
    return sorted(entries, key=lambda e: e.name)


def to_official(params: Any, entry_of: EntryOf) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under official names, in torch's layouts, dtypes kept."""
    flat = {path: np.asarray(leaf) for path, leaf in _flatten(params).items()}
    return {
        e.name: e.to_torch(flat[e.path] if e.layer is None else flat[e.path][e.layer]) for e in table(params, entry_of)
    }


def from_official(tensors: Mapping[str, np.ndarray], like: Any, entry_of: EntryOf, source: str) -> dict[str, Any]:
    """Official tensors as our parameter tree, float32.

    Args:
      tensors: by official name; other floating dtypes are converted.
      like: the expected tree (anything with `shape`).
      entry_of: as in `table`.
      source: what to call the tensors in messages.

    Raises:
      UserError: naming every tensor that is missing, extra, misshaped or not of a floating dtype.
    """
    entries = table(like, entry_of)
    if complaints := find_faults(tensors, like, entry_of):
        raise UserError(refusal(source, complaints))
    shapes = {path: tuple(leaf.shape) for path, leaf in _flatten(like).items()}
    flat: dict[Path, np.ndarray] = {}
    for e in entries:
        value = np.asarray(tensors[e.name]).astype(np.float32)
        if e.layer is None:
            flat[e.path] = e.from_torch(value, shapes[e.path])
        else:
            stacked = flat.setdefault(e.path, np.empty(shapes[e.path], np.float32))
            stacked[e.layer] = e.from_torch(value, shapes[e.path][1:])
    return _unflatten(flat)


def find_faults(tensors: Mapping[str, np.ndarray], like: Any, entry_of: EntryOf) -> list[str]:
    """One line about each tensor that is not one of `like`'s; arguments as in `from_official`."""
    entries, faults = table(like, entry_of), []
    for e in entries:
        if e.name not in tensors:
            faults.append(f"missing tensor {e.name} {e.torch_shape}")
        elif tensors[e.name].shape != e.torch_shape:
            faults.append(f"tensor {e.name} has shape {tensors[e.name].shape}, expected {e.torch_shape}")
        elif not is_float(tensors[e.name].dtype):
            faults.append(f"tensor {e.name} is {tensors[e.name].dtype}, expected a floating dtype")
    return faults + [f"extra tensor {name}" for name in sorted(set(tensors) - {e.name for e in entries})]


def refusal(source: str, faults: Sequence[str], conflicts: Sequence[str] = ()) -> str:
    """The message about tensors that do not fit.

    Args:
      faults: one line about each tensor.
      conflicts: one line about each field of the configuration that the tensors contradict.
    """
    lines = [f"{source}:"]
    if faults:
        lines += [f"tensors unlike those that the configuration describes ({len(faults)}):"]
        lines += [f"  {fault}" for fault in faults]
    if conflicts:
        lines += [f"fields of the configuration that the tensors contradict ({len(conflicts)}):"]
        lines += [f"  {conflict}" for conflict in conflicts]
    return "\n".join([*lines, "Use the weights and the configuration of one and the same official run."])


def is_float(dtype: np.dtype) -> bool:
    """float16, float32, float64 or ml_dtypes' bfloat16."""
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def as_it_is(name: str, path: Path, layer: int | None, shape: Shape) -> Entry:
    """A scale, a table or a query: torch's tensor has the same axes."""
    return Entry(name, path, layer, shape, tuple(range(len(shape))), shape)


def bias(name: str, path: Path, layer: int | None, shape: Shape) -> Entry:
    """A bias, whose axes torch's tensor joins."""
    return Entry(name, path, layer, shape, tuple(range(len(shape))), (math.prod(shape),))


def linear(name: str, path: Path, layer: int | None, shape: Shape, input_axes: int = 1) -> Entry:
    """A kernel (inputs..., outputs...) with `input_axes` axes of inputs; torch's is (outputs, inputs)."""
    inputs = math.prod(shape[:input_axes])
    outputs = math.prod(shape) // inputs
    return Entry(name, path, layer, (inputs, outputs), (1, 0), (outputs, inputs))


def convolution(name: str, path: Path, layer: int | None, shape: Shape) -> Entry:
    """A kernel (rows, columns, inputs, outputs) of any number of leading axes; torch's is (outputs, inputs, rows,
    columns). The same permutation takes a transposed convolution (taps, outputs, inputs) to (inputs, outputs, taps)."""
    axes = len(shape) - 2
    order = (axes + 1, axes, *range(axes))
    return Entry(name, path, layer, shape, order, tuple(shape[axis] for axis in order))


def patch_encoder(name: str, path: Path, layer: int | None, shape: Shape, patch: Shape) -> Entry:
    """A kernel (patch values, D), channel innermost; torch has a convolution (D, C, *patch)."""
    channels, axes = shape[0] // math.prod(patch), len(patch)
    order = (axes + 1, axes, *range(axes))
    return Entry(name, path, layer, (*patch, channels, shape[1]), order, (shape[1], channels, *patch))


def patch_decoder(name: str, path: Path, layer: int | None, shape: Shape, patch: Shape) -> Entry:
    """A kernel (D, patch values) or a bias (patch values,), channel innermost; torch's have it outermost."""
    split, axes = (*patch, shape[-1] // math.prod(patch)), len(patch)
    if len(shape) == 1:
        return Entry(name, path, layer, split, (axes, *range(axes)), shape)
    return Entry(name, path, layer, (shape[0], *split), (axes + 1, *range(1, axes + 1), 0), shape[::-1])


def _flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return flat


def _unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, leaf), value in flat.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
