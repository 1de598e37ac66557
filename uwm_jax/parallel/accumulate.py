"""Gradients of a batch, computed in one piece or in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


def value_and_grad(
    loss: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, batch: Any, *, mesh: Mesh | None, steps: int
) -> tuple[tuple[jax.Array, Any], Any]:
    """`((total, sums), gradients)` of a loss that is additive over the rows of `batch`.

    Args:
      loss: (params, rows) -> (() total, tree of sums); the values of a batch are the sums over any partition of it.
      batch: tree of arrays with the rows on their first axis.
      steps: into how many parts the rows are cut, computed one after the other.
    """
    compute = jax.value_and_grad(loss, has_aux=True)
    if steps == 1:
        return compute(params, batch)
    parts = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(compute, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(carry: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, compute(params, rows)), None

    return jax.lax.scan(add, zeros, parts)[0]
