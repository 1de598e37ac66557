"""The official names and layouts of UWM's parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from uwm_jax.torch_bridge import layout
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape

_NET = {
    "patch_encoder": "obs_patchifier.patch_encoder",
    "patch_decoder": "obs_patchifier.patch_decoder",
    "action_encoder/fc1": "action_encoder.0",
    "action_encoder/fc2": "action_encoder.2",
    "action_decoder/fc1": "action_decoder.0",
    "action_decoder/fc2": "action_decoder.2",
    "timestep_embedding/fc1": "timestep_embedding.proj.0",
    "timestep_embedding/fc2": "timestep_embedding.proj.2",
    "blocks/qkv": "attn.qkv",
    "blocks/proj": "attn.proj",
    "blocks/fc1": "mlp.fc1",
    "blocks/fc2": "mlp.fc2",
    "blocks/adaln": "adaLN_modulation.1",
    "head/linear": "head.linear",
    "head/adaln": "head.adaLN_modulation.1",
}


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
    *modules, leaf = path
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    if modules[0] == "noise_pred_net":
        inner = "/".join(modules[1:])
        name = [_NET[inner]] if inner else []
        block = [] if layer is None else ["blocks", str(layer)]
        return ".".join(["noise_pred_net", *block, *name, leaf])
    if modules == ["obs_encoder", "text_head"]:
        return f"obs_encoder.text_encoder.head.{leaf}"
    if modules[:2] == ["obs_encoder", "img_encoder"]:
        inside = [re.sub(r"^(layer\d+|downsample)_(\d+)$", r"\1.\2", m) for m in modules[2:]]
        return ".".join(["obs_encoder.img_encoder.model", *inside, leaf])
    raise ValueError(f"parameter {'/'.join(path)} has no official name")
