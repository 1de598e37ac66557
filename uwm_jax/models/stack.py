"""Equal layers one after the other, with their parameters stacked along a leading axis."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from uwm_jax.models import layers as layers_lib

Array = jax.Array


class Stack(nn.Module):
    """Applies `depth` copies of a layer in turn: x -> layer(x, *shared).

    The parameters lie under `blocks`, every leaf with a leading axis of layers, or held apart (`layers.py`).

    Fields:
        layer: a detached module (`parent=None`) whose output has the shape and dtype of its first argument.
        depth: number of layers, each initialised independently.
        scan: one compiled layer in a `lax.scan`, or `depth` of them; parameters and results are the same. Layers held
            apart are never scanned.
        remat: "none", "dots" (recompute all but the dense layers' products) or "full" in the backward pass.
    """

    layer: Any
    depth: int
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Array, *shared: Array | None) -> Array:
        layers_lib.check_remat(self.remat)
        layer = self.layer.clone(parent=None)

        def init(key: Array) -> Any:
            # Shapes of parameters do not depend on rows or tokens; `shared` only needs to fit x.
            return jax.vmap(lambda k: layer.init(k, x, *shared)["params"])(jax.random.split(key, self.depth))

        # `param` would refuse layers that are held apart, whose shapes are not those of a new stack.
        blocks: Any = self.get_variable("params", layers_lib.BLOCKS)
        if blocks is None:
            blocks = self.param(layers_lib.BLOCKS, init)

        def apply(x: Array, params: Any) -> Array:
            return layer.apply({"params": params}, x, *shared)

        body = layers_lib.rematerialized(apply, self.remat, blocks, scan=self.scan)
        return layers_lib.run(body, x, blocks, self.depth, scan=self.scan)[0]
