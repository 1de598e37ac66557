"""Published weights for parts of a fresh model, such as an image encoder that was trained on ImageNet."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from flax import traverse_util

from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.systems.base import System


def load(system: System, params: Any, fresh: Collection[str] | None = None) -> Any:
    """Parameters with the published weights that the config names, where they lie; `params` itself without any.

    Args:
      params: fresh ones, `jax.Array`s.
      fresh: names of the arrays that start fresh in a run that takes the others from an origin; None: all do.

    Raises:
      UserError: weights that cannot be read, or do not fit.
    """
    for part in system.tree.pretrained:
        value = functools.reduce(lambda node, name: node[name], part.field.split("."), system.config)
        if not value or (fresh is not None and part.marker not in fresh):
            continue
        flat, root = traverse_util.flatten_dict(params, sep="/"), f"{part.path}/"
        own = {name.removeprefix(root): x for name, x in flat.items() if name.startswith(root)}
        loaded = part.load(value, traverse_util.unflatten_dict(own, sep="/"))
        for name, x in traverse_util.flatten_dict(loaded, sep="/").items():
            flat[root + name] = mesh_lib.place(x, flat[root + name].sharding)
        params = traverse_util.unflatten_dict(flat, sep="/")
    return params
