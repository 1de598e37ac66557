"""Gradients of a batch that is spread over devices and computed in parts, reduced once.

The function under differentiation is additive over rows, so a gradient is a sum over devices and parts and nothing
needs averaging. Left to the partitioner, a scan over parts reduces the gradients of every part; here the axis `data`
is manual instead (`jax.shard_map`): each device differentiates its own rows, adds its parts up where they are, and
one sum over `data` follows. No activation can cross devices by construction. The axes `fsdp` and `tensor` stay with
the partitioner inside, because a manual `fsdp` would gather the whole model at once; so along `fsdp` every part gathers
parameters and reduces gradients anew, as ZeRO-3 does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from uwm_jax.models import target
from uwm_jax.parallel.mesh import DATA_AXIS, SWEEP_AXIS

Rows = Any  # a tree of arrays with the rows in front
Loss = Callable[[Any, Rows], tuple[jax.Array, Any]]


def value_and_grad(
    loss: Loss, params: Any, batch: Rows, *, mesh: Mesh | None, steps: int = 1
) -> tuple[tuple[jax.Array, Any], Any]:
    """((total, sums), gradients of total by params), as if `loss` saw the whole batch at once.

    Args:
      loss: (params, rows) -> (total (), sums: a tree of arrays). Both are additive: their values for a batch are the
        sums of their values for the parts of any partition of its rows. What a row draws at random must depend on
        the row's own number. It may close over arrays that are whole along `data`.
      params: float32 arrays, whole along `data`.
      batch: a tree of arrays with the rows in front, which lie over ("data", "fsdp").
      mesh: None for a single device.
      steps: parts that each device's rows are computed in, one after the other; activations of one part are alive at
        a time. It divides the rows of a device.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def local(params: Any, rows: Rows) -> Any:
        return sum_in_parts(lambda part: gradient(params, part), rows, steps)

    if mesh is None or mesh.shape[DATA_AXIS] == 1:
        return local(params, batch)

    def device_part(params: Any, rows: Rows) -> Any:
        return jax.lax.psum(local(params, rows), DATA_AXIS)

    # Without the check, values that differ along `data` need no casts inside the models' loops; the sum is explicit.
    return jax.shard_map(
        device_part,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA_AXIS)),
        out_specs=PartitionSpec(),
        axis_names={DATA_AXIS},
        check_vma=False,
    )(params, batch)


def sum_in_parts(function: Callable[[Rows], Any], rows: Rows, steps: int) -> Any:
    """`function(rows)`, a tree of sums over rows, computed in `steps` parts of the rows one after the other."""
    if steps == 1:
        return function(rows)
    # Row n goes to part n mod steps: wherever the rows are cut, every part lies over all devices.
    parts = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), rows)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, first))

    def add(sums: Any, part: Rows) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def each_value_and_grad(
    loss: Callable[[Any, Any, Rows], tuple[jax.Array, Any]],
    params: Any,
    members: Any,
    batch: Rows,
    *,
    mesh: Mesh | None,
    steps: int = 1,
    at_once: int = 0,
) -> tuple[tuple[jax.Array, Any], Any]:
    """`value_and_grad` for each of several members, which see the same batch; all results have a leading axis of them.

    Args:
      loss: (one member's params, what else is its own, rows) -> as `value_and_grad` takes it.
      params, members: trees with a leading axis of members, which lies over the mesh axis `sweep` where there is one.
      batch, steps: as `value_and_grad`.
      mesh: None for a single device.
      at_once: members of a device that are computed side by side, the others one after the other; 0 is all.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def local(params: Any, members: Any, rows: Rows) -> Any:
        def one(member: tuple[Any, Any]) -> Any:
            return sum_in_parts(lambda part: gradient(*member, part), rows, steps)

        return in_turn(one, (params, members), at_once)

    manual = {axis for axis in (SWEEP_AXIS, DATA_AXIS) if mesh is not None and mesh.shape.get(axis, 1) > 1}
    if not manual:
        return local(params, members, batch)

    def device_part(params: Any, members: Any, rows: Rows) -> Any:
        made = local(params, members, rows)
        return jax.lax.psum(made, DATA_AXIS) if DATA_AXIS in manual else made

    of_members = PartitionSpec(SWEEP_AXIS if SWEEP_AXIS in manual else None)
    of_rows = PartitionSpec(DATA_AXIS if DATA_AXIS in manual else None)
    return jax.shard_map(
        device_part,
        mesh=mesh,
        in_specs=(of_members, of_members, of_rows),
        out_specs=of_members,
        axis_names=manual,
        check_vma=False,
    )(params, members, batch)


def in_turn(function: Callable[[Any], Any], members: Any, at_once: int) -> Any:
    """`function` of every member of a tree with a leading axis of them, `at_once` side by side (0 is all); stacked.

    Accelerators run a loop with one compiled body. XLA's CPU compiler, whose loops compute products and convolutions
    eight times as slowly as straight code, gets one body after the other.
    """
    count = len(jax.tree.leaves(members)[0])
    size = min(at_once or count, count)
    # A batch of one would still make grouped convolutions of plain ones.
    body = jax.vmap(function) if size > 1 else lambda one: jax.tree.map(_lead, function(jax.tree.map(_first, one)))
    if size == count:
        return body(members)
    if target.platform() != "cpu":
        return jax.lax.map(function, members, batch_size=None if size == 1 else size)
    starts = range(0, count, size)
    made = [body(jax.tree.map(lambda x, i=i: x[i : i + size], members)) for i in starts]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)


def _first(x: jax.Array) -> jax.Array:
    return x[0]


def _lead(x: jax.Array) -> jax.Array:
    return x[None]
