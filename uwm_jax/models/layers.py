"""Parameters of the transformer's blocks: stacked, or held apart, one array for each layer.

At rest, in checkpoints, sharding rules and exports, the blocks are one tree whose leaves have a leading axis of
layers. A program that runs the layers one after the other copies a slice out of the stack for every layer and, where it
differentiates, puts the gradients together again: on a CPU, where a step reads every parameter for few rows, this takes
longer than the layers' own arithmetic of AdaLN. So a single device that runs them so, which CPUs do by default, holds
the layers apart, in training and in sampling; the stack is made again for a checkpoint. Accelerators and meshes keep
the stack, which `lax.scan` runs over: one layer to compile, and a layer's weights are gathered only while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from uwm_jax.models import target

BLOCKS = "blocks"  # the key under which the stacked tree lies

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps what the dense layers made
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Layers(flax.struct.PyTreeNode):
    """One parameter of all layers, held apart: `arrays[i]` is that of layer i, without the leading axis."""

    arrays: tuple[Any, ...]


Body = Callable[[jax.Array, Any], jax.Array]


def scans_by_default() -> bool:
    """The value that `config.model.scan_blocks=None` stands for; this module's docstring gives the reason."""
    return target.platform() != "cpu" or target.device_count() > 1


def check_remat(remat: str) -> None:
    """Raises ValueError unless `rematerialized` knows it."""
    if remat != "none" and remat not in REMAT_POLICIES:
        raise ValueError(f"remat must be one of none, {', '.join(REMAT_POLICIES)}; found {remat!r}")


def rematerialized(body: Body, remat: str, layers: Any, *, scan: bool) -> Body:
    """The body of `run`, told what to recompute in the backward pass.

    Args:
      remat: "none", "dots" (all but the dense layers' products) or "full".
      layers, scan: as `run` will get them.
    """
    if remat == "none":
        return body
    # A scan keeps XLA from merging the recomputation with the forward pass; unrolled code needs barriers.
    return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not _scans(layers, scan))


def run(body: Body, x: jax.Array, layers: Any, depth: int, *, scan: bool) -> tuple[jax.Array, jax.Array]:
    """Applies `body(x, layer)` with each layer of the tree `layers`, in order.

    Args:
      x: the stream, of one shape throughout.
      layers: leaves with a leading axis of `depth`, or held apart.
      scan: one compiled body in a `lax.scan`, or `depth` of them; layers that are held apart are never scanned.

    Returns:
      the stream after the last layer, and (depth, ...) after every layer.
    """
    if _scans(layers, scan):

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            x = body(x, layer)
            return x, x

        return jax.lax.scan(step, x, layers)
    hidden = []
    for layer in of_each(layers, depth):
        # The barrier keeps XLA from adding the stream up anew, from the first layer on, wherever it is used.
        x = jax.lax.optimization_barrier(body(x, layer))
        hidden.append(x)
    return x, jnp.stack(hidden)


def in_dtype(layers: Any, dtype: Any, *, scan: bool) -> Any:
    """`layers` of `run` in the dtype of their products, if they are scanned: cast once before the loop.

    Cast in the loop, each layer's slice would be kept in both dtypes for the backward pass, and its gradient put into a
    stack of float32. Only for layers that compute with all of their parameters in `dtype`.
    """
    return jax.tree.map(lambda x: x.astype(dtype), layers) if _scans(layers, scan) else layers


def _scans(layers: Any, scan: bool) -> bool:
    return scan and not are_apart(layers)


def of_each(tree: Any, depth: int) -> list[Any]:
    """The `depth` layers of a tree whose leaves are `Layers` or stacked arrays."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_apart)
    # `split` rather than indexing: its gradient is one concatenation instead of `depth` padded sums.
    parts = [x.arrays if _is_apart(x) else [s[0] for s in jax.lax.split(x, (1,) * depth)] for x in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]


def are_apart(tree: Any) -> bool:
    """Whether a tree holds layers apart."""
    return any(_is_apart(x) for x in jax.tree.leaves(tree, is_leaf=_is_apart))


def apart(tree: Any) -> Any:
    """A tree, such as a training state, with the blocks of all its parameters held apart.

    Args:
      tree: its stacked arrays are deleted, part by part, so that no more than one part is ever there in both forms.
        Shapes (`jax.ShapeDtypeStruct`) become shapes; what is held apart stays as it is.
    """

    def convert(node: Any) -> Any:
        if not _has_blocks(node) or are_apart(node[BLOCKS]):
            return node
        stack = node[BLOCKS]
        if all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(stack)):
            return {**node, BLOCKS: jax.tree.map(_shapes_apart, stack)}
        layers = _split(stack)
        jax.tree.map(lambda x: x.delete(), stack)
        return {**node, BLOCKS: layers}

    return jax.tree.map(convert, tree, is_leaf=_has_blocks)


def stacked(tree: Any) -> Any:
    """The tree that `apart` was given; what is stacked stays as it is, and nothing is deleted."""

    def convert(node: Any) -> Any:
        return {**node, BLOCKS: _stack(node[BLOCKS])} if _has_blocks(node) and are_apart(node[BLOCKS]) else node

    return jax.tree.map(convert, tree, is_leaf=_has_blocks)


@jax.jit
def _split(stack: Any) -> Any:
    return jax.tree.map(lambda x: Layers(tuple(x[i] for i in range(len(x)))), stack)


@jax.jit
def _stack(layers: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack(x.arrays), layers, is_leaf=_is_apart)


def _shapes_apart(x: jax.ShapeDtypeStruct) -> Layers:
    """A stack's sharding cuts no axis here (one device), so it is that of its layers too."""
    one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_of_layer(x.sharding))
    return Layers((one,) * x.shape[0])


def _of_layer(sharding: Any) -> Any:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


def _is_apart(x: Any) -> bool:
    return isinstance(x, Layers)


def _has_blocks(x: Any) -> bool:
    return isinstance(x, dict) and BLOCKS in x
