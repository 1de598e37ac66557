"""Names for the axes of activations, by which a run may spread them over devices.

A model says what an axis is, not where it lies: `constrain(x, "batch", "length", None, "heads")`. Flax's logical axis
rules say which mesh axes a name stands for. Without rules or without a mesh around the trace, nothing happens.

The names are `batch`, `length` (tokens), `heads`, `hidden` (units inside an MLP) and `width` (of what AdaLN's kernels
make of conditions, cut as those kernels are); all other axes stay whole.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec

from uwm_jax.models import target

NAMES = ("batch", "length", "heads", "hidden", "width")


def axes(name: str | None) -> tuple[tuple[str, ...], int]:
    """The mesh axes that `name` stands for at this point of the trace, and over how many devices they run.

    Axes that a surrounding `shard_map` has made manual are left out: there, an array is a device's own part already.
    """
    found = dict(nn.get_logical_axis_rules()).get(name) or ()
    sizes = divided_axes()
    names = tuple(a for a in ((found,) if isinstance(found, str) else found) if a in sizes)
    return names, math.prod(sizes[a] for a in names)


def axes_for(rows: int) -> tuple[tuple[str, ...], int, int]:
    """How devices share `rows` independent rows: (the mesh axes, the number of their devices, rows with padding).

    The axes are those of `batch` first, then all others, as far as the rows divide; or all of them, the rows padded to
    a multiple of the devices, where that leaves fewer for each. For what no axis cuts otherwise, such as frozen
    encoders: along `tensor` it would be repeated.
    """
    if not nn.get_logical_axis_rules():
        return (), 1, rows
    sizes, found, devices = divided_axes(), [], 1
    every = tuple(dict.fromkeys((*axes("batch")[0], *sizes)))
    for name in every:
        if rows % (devices * sizes[name]) == 0:
            found.append(name)
            devices *= sizes[name]
    most = math.prod(sizes.values())
    of_each = -(-rows // most)
    if of_each < rows // devices:
        return every, most, of_each * most
    return tuple(found), devices, rows


def divided_axes() -> dict[str, int]:
    """The mesh axes around the trace that are left to the partitioner and have more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True) if not mesh.empty else ()
    return {name: mesh.shape[name] for name, kind in types if kind == AxisType.Auto and mesh.shape[name] > 1}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its leading axes laid out as their names say; an axis that the devices do not divide stays whole."""
    return lay_out(x, *(axes(name)[0] for name in names))


def lay_out(x: jax.Array, *entries: tuple[str, ...]) -> jax.Array:
    """`x` with its leading axes over mesh axes; an axis that they do not divide stays whole."""
    sizes = divided_axes()
    if not nn.get_logical_axis_rules() or not sizes:
        return x
    # also without any axis to cut: that says that all is whole, which keeps layouts of weights from spreading
    spec = [a if n % math.prod(sizes[b] for b in a) == 0 else () for n, a in zip(x.shape, entries, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(a or None for a in spec)))


def on_one_cpu() -> bool:
    """Whether the trace is for a CPU and no axis is divided over devices by the compiler.

    The one place that decides where forms are used that only XLA's CPU compiler needs (`products`, `normalization`,
    `codecs.convolution`): accelerators do better with the plain ones, and so does the partitioner, which knows how to
    divide them.
    """
    return target.platform() == "cpu" and not divided_axes()
