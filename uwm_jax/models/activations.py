"""Names for the axes of activations, by which a run may spread them over devices.

A model says what an axis is, not where it lies: `constrain(x, "batch", "length", None, "heads")`. Flax's logical axis
rules say which mesh axes a name stands for. Without rules or without a mesh around the trace, nothing happens.

The names are `batch`, `length` (tokens), `heads`, and `hidden` (units inside an MLP); all other axes stay whole.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec

NAMES = ("batch", "length", "heads", "hidden")


def axes(name: str | None) -> tuple[tuple[str, ...], int]:
    """The mesh axes that `name` stands for at this point of the trace, and over how many devices they run.

    Axes that a surrounding `shard_map` has made manual are left out: there, an array is a device's own part already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules = dict(nn.get_logical_axis_rules())
    found = rules.get(name) if name is not None and not mesh.empty else None
    if not found:
        return (), 1
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = (found,) if isinstance(found, str) else tuple(found)
    names = tuple(a for a in names if types[a] == AxisType.Auto and mesh.shape[a] > 1)
    return names, math.prod(mesh.shape[a] for a in names)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its leading axes laid out as their names say; an axis that the devices do not divide stays whole."""
    found = [axes(name) for name in names]
    if all(count == 1 for _, count in found):
        return x
    spec = [a if size % count == 0 else () for size, (a, count) in zip(x.shape, found, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(a or None for a in spec)))
