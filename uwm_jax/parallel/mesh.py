"""The device mesh and where arrays live on it."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from uwm_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(config: ConfigDict) -> Mesh:
    """A mesh with the axis `data` over the devices that `config.mesh.data` asks for (-1: all).

    Raises UserError when there are not as many devices, or the batch does not divide over them.
    """
    available = jax.device_count()
    size = available if config.mesh.data == -1 else config.mesh.data
    if size != available:
        raise UserError(
            f"config.mesh.data={config.mesh.data} does not fit the {available} {jax.default_backend()} device(s) "
            "of this run: set it to that number, or to -1."
        )
    if config.batch_size % size:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over {size} devices: choose a multiple of {size}."
        )
    return jax.make_mesh((size,), (DATA_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch spread over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, shapes: Any) -> Any:
    """A sharding for every leaf of a tree of shapes: parameters and optimizer state are whole on each device."""
    return jax.tree.map(lambda _: replicated(mesh), shapes)
