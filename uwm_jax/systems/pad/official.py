"""The official names and layouts of PAD's parameters, in the Unified World Models code."""

from __future__ import annotations

import math
from collections.abc import Sequence

from uwm_jax.torch_bridge import layout, names
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape


def entry_of(patch: Sequence[int]) -> EntryOf:
    """The entries of the tree {"noise_pred_net"}.

    Args:
      patch: latent (frames, rows, columns) of a video token.
    """
    values = tuple(patch)

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        name = names.of_network(path, layer, names.ACTIONS_AND_VIDEO)
        module, leaf = path[-2], path[-1]
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        if module == "patch_encoder":
            return layout.patch_encoder(name, path, layer, shape, values)
        if module == "patch_decoder":
            return _patch_decoder(name, path, layer, shape, values)
        return layout.linear(name, path, layer, shape, input_axes=2 if module == "proj" else 1)  # (heads, head size)

    return entry


def _patch_decoder(name: str, path: Path, layer: int | None, shape: Shape, patch: Shape) -> Entry:
    """A kernel (D, patch values), channel innermost; torch has a transposed convolution (D, C, *patch)."""
    channels, axes = shape[1] // math.prod(patch), len(patch)
    order = (0, axes + 1, *range(1, axes + 1))
    return Entry(name, path, layer, (shape[0], *patch, channels), order, (shape[0], channels, *patch))
