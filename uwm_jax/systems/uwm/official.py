"""The official names and layouts of UWM's parameters."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_jax.torch_bridge import layout, names
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape


def entry_of(patch: Sequence[int]) -> EntryOf:
    """The entries of the tree {"obs_encoder", "noise_pred_net"}.

    Args:
      patch: latent (frames, rows, columns) of a video token.
    """
    values = tuple(patch)

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        name = _official_name(path, layer)
        module, leaf = path[-2], path[-1]
        if module == "patch_encoder" and leaf == "kernel":
            return layout.patch_encoder(name, path, layer, shape, values)
        if module == "patch_decoder":
            return layout.patch_decoder(name, path, layer, shape, values)
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        if path[:2] == ("obs_encoder", "img_encoder") and len(shape) == 4:
            return layout.convolution(name, path, layer, shape)
        return layout.linear(name, path, layer, shape, input_axes=2 if module == "proj" else 1)  # (heads, head size)

    return entry


def _official_name(path: Path, layer: int | None) -> str:
    if path[0] == "noise_pred_net":
        return names.of_network(path, layer, names.ACTIONS_AND_VIDEO)
    return names.of_obs_encoder(path, "obs_encoder.img_encoder.model")
