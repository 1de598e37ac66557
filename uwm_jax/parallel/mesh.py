"""The device mesh, and where the rows of a batch lie on it.

Three axes, from the slowest links to the fastest, each of any size from 1:

- `data`: rows of the batch; parameters are whole along it, and gradients are summed over it once a step;
- `fsdp`: rows of the batch too, and every large parameter with its moments and its average is cut along it;
- `tensor`: heads, hidden units and channels; all devices along it work on the same rows.

Slices of accelerators, which only a data-centre network connects, share `data` among them: each holds a block of
consecutive places along it, so that nothing but sums over `data` crosses that network.

A sweep has one more axis in front, `sweep`, which cuts its members: devices along it share batches and nothing else.

What is cut where is a table (`uwm_jax.parallel.sharding`).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from uwm_jax.errors import UserError

DATA_AXIS, FSDP_AXIS, TENSOR_AXIS = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
SWEEP_AXIS = "sweep"


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None, members: int = 0) -> Mesh:
    """The mesh that `config.mesh` asks for, over `devices` (default: all of this run, of every process).

    Args:
      members: of a sweep, whose mesh has the axis `sweep` too (`config.sweep.devices`); 0 for a run.

    Raises UserError when the sizes do not use every device, the batch or the members do not divide over them, the
    devices lie in another number of slices, or the sizes cannot be laid onto the links between the devices.
    """
    devices = jax.devices() if devices is None else devices
    all_devices, kind = len(devices), getattr(devices[0], "platform", "")
    sweep, data, fsdp, tensor = find_sizes(config, all_devices, kind, members)
    slices = config.mesh.slices
    by_process = _slice_attribute(slices, devices) == "process_index"
    if data % slices:
        raise UserError(
            f"config.mesh.slices={slices} does not divide the {data} devices along config.mesh.data, which slices "
            f"share: choose fsdp and tensor so that their product, {fsdp * tensor} now, divides the "
            f"{data * fsdp * tensor // slices} devices of a slice."
        )
    before: tuple[int, ...] = (sweep,) if members else ()
    axes = (SWEEP_AXIS, *AXES) if members else AXES
    inside = (*before, data // slices, fsdp, tensor)
    across = (*[1 for _ in before], slices, 1, 1)
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(
                inside, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
            )
    except (NotImplementedError, ValueError) as e:
        raise UserError(
            f"{_text(config)} cannot be laid onto the links between the {all_devices} {kind} devices of this run "
            f"({str(e).splitlines()[0] if str(e) else type(e).__name__}): choose sizes of config.mesh.data, "
            "config.mesh.fsdp and config.mesh.tensor that are products of the sides of the devices' grid (on a 4x4 "
            "slice 4 and 4, or 16), or give all devices to one of them."
        ) from e
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def find_sizes(config: ConfigDict, count: int, kind: str, members: int = 0) -> tuple[int, int, int, int]:
    """Devices along sweep, data, fsdp and tensor, of `count` of them in all.

    Args:
      kind: of device, for messages.
      members: as `make_mesh` takes it.

    Raises UserError when the sizes do not use every device, or the batch or the members do not divide over them; for a
    batch it names the nearest that do.
    """
    sweep = _sweep_devices(config, count, members) if members else 1
    available = count // sweep
    data, fsdp, tensor = (config.mesh[name] for name in AXES)
    rest = fsdp * tensor
    each = f" for each of config.sweep.devices={sweep}" * (sweep > 1)
    if data == -1 and available % rest == 0:
        data = available // rest
    if data * rest != available:
        hint = (
            f"set config.mesh.data to {available // rest}, or to -1"
            if available % rest == 0
            else f"choose fsdp and tensor so that their product, {rest} now, divides {available}"
        )
        raise UserError(
            f"{_text(config)} does not fit the {available} {kind} device(s) of this run{each}: expected data x fsdp x "
            f"tensor = {available}; {hint}."
        )
    rows, parts = data * fsdp, config.accumulation_steps
    if config.batch_size % (rows * parts):
        in_parts = f" in config.accumulation_steps={parts} parts" if parts > 1 else ""
        most = math.gcd(config.batch_size, rows * parts) // parts * tensor
        usable = f"; {config.batch_size} rows can use at most {most} of the {available} devices" if most else ""
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over data x fsdp = {rows} devices{in_parts}{each}: "
            f"the nearest that do are {' and '.join(map(str, nearest_batches(config.batch_size, rows * parts)))}"
            f"{usable}."
        )
    return sweep, data, fsdp, tensor


def nearest_batches(batch: int, shares: int) -> list[int]:
    """The batch, if it divides over so many shares, else the nearest sizes that do, below and above."""
    below = batch // shares * shares
    return [batch] if below == batch else [size for size in (below, below + shares) if size]


def _text(config: ConfigDict) -> str:
    return ", ".join(f"config.mesh.{name}={config.mesh[name]}" for name in AXES)


def _sweep_devices(config: ConfigDict, available: int, members: int) -> int:
    """Devices along `sweep`: those that `config.sweep.devices` asks for, or as many as divide members and devices."""
    asked = config.sweep.devices
    if asked == -1:
        size = config.mesh[FSDP_AXIS] * config.mesh[TENSOR_AXIS] * max(config.mesh[DATA_AXIS], 1)
        return math.gcd(members, available // size if available % size == 0 else 1)
    if members % asked or available % asked:
        raise UserError(
            f"config.sweep.devices={asked} must divide the {members} members that train in one program and the "
            f"{available} devices: set it to {math.gcd(members, available)}, or to -1 for as many as do."
        )
    return asked


def _slice_attribute(slices: int, devices: Sequence[Any]) -> str:
    """The attribute of a device that tells its slice. Where the platform knows of none, a process is a slice.

    Raises UserError when the devices lie in another number of slices than `slices`, or in slices of different sizes.
    """
    kind = getattr(devices[0], "platform", "")
    told = len({getattr(device, "slice_index", None) for device in devices}) > 1 or kind == "tpu"
    attribute = "slice_index" if told else "process_index"
    sizes = collections.Counter(getattr(device, attribute, None) for device in devices).values()
    if slices == 1 and kind != "tpu" or len(sizes) == slices and len(set(sizes)) == 1:
        return attribute
    equal = len(set(sizes)) == 1
    found = f"{len(sizes)} slice(s) of {' and '.join(map(str, sorted(set(sizes))))}" + " (processes)" * (not told)
    hint = f"set config.mesh.slices to {len(sizes)}" if equal else "start the run on slices of equal size"
    raise UserError(
        f"config.mesh.slices={slices} does not fit the {len(devices)} {kind} device(s) of this run, which lie in "
        f"{found}: {hint}."
    )


def data_mesh(devices: Sequence[Any]) -> Mesh:
    """The mesh of devices that have all parameters each, and rows of a batch of their own."""
    return Mesh(np.array(devices).reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_group(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process loads share `index` of `count` equal shares of a batch's rows.

    Processes that hold the same rows, because only `tensor` or `sweep` runs between them, have the same index.

    Raises UserError when two processes share only a part of their rows.
    """
    return _data_group(mesh.devices, jax.process_index())


def _data_group(grid: np.ndarray, process: int) -> tuple[int, int]:
    *_, data, fsdp, tensor = grid.shape
    blocks: dict[int, set[int]] = {}
    for block, line in enumerate(grid.reshape(-1, data * fsdp, tensor).swapaxes(0, 1).reshape(data * fsdp, -1)):
        for device in line:
            blocks.setdefault(device.process_index, set()).add(block)
    shares = sorted({tuple(sorted(held)) for held in blocks.values()})
    if sum(map(len, shares)) != data * fsdp or len({len(share) for share in shares}) != 1:
        sizes = ", ".join(f"config.mesh.{name}={size}" for name, size in zip(AXES, grid.shape[-3:], strict=True))
        raise UserError(
            f"{sizes} gives {len(blocks)} processes rows that overlap only in part: choose config.mesh.tensor so that "
            "it divides the devices of a process, or the devices of a process divide it."
        )
    return shares.index(tuple(sorted(blocks[process]))), len(shares)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, put where `shardings` (a tree, or one for all) say; others stay."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(one, tree, _for_each(tree, shardings))


def with_sharding(shapes: Any, shardings: Any) -> Any:
    """Shapes (`jax.ShapeDtypeStruct` leaves) that carry `shardings`, a tree of them or one for all."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        _for_each(shapes, shardings),
    )


def _for_each(tree: Any, shardings: Any) -> Any:
    """One sharding as a tree of it."""
    return jax.tree.map(lambda _: shardings, tree) if isinstance(shardings, NamedSharding) else shardings
