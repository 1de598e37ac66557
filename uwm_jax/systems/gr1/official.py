"""Official checkpoints of GR1: the names and layouts of their tensors, and their configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from uwm_jax.models.layers import BLOCKS
from uwm_jax.torch_bridge import layout, names, torchvision_vit
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape

_ENCODER = "obs_encoder.img_encoder"
VIT = f"{_ENCODER}.model"
RESAMPLER = f"{_ENCODER}.perceiver_resampler"
# Modules outside stacks, and the parameters that are in none.
_NAMES = {
    "obs_encoder": _ENCODER,
    "obs_encoder/heads": f"{VIT}.heads",
    "obs_encoder/feat_head": f"{_ENCODER}.feat_head",
    "obs_encoder/patch_head": f"{_ENCODER}.patch_head",
    "obs_encoder/resampler": RESAMPLER,
    "obs_encoder/resampler/norm": f"{RESAMPLER}.norm",
    "action_head/fc1": "action_head.0",
    "action_head/fc2": "action_head.2",
    "action_head/fc3": "action_head.4",
    "decoder/proj": "decoder_proj",
    "decoder/norm": "decoder_head.0",
    "decoder/head": "decoder_head.1",
    "action_queries": "action_queries",
    "obs_queries": "obs_queries",
    "decoder/query_token": "decoder_query_token",
    "decoder/pos_embed": "decoder_pos_embed",
}
_BLOCK = {name.removeprefix("blocks/"): theirs for name, theirs in names.TRANSFORMER.items() if "blocks/" in name}
_ATTENTION = ("norm_media", "norm_latents", "to_q", "to_kv", "to_out")
_RESAMPLER_LAYER = {name: f"0.{name}" for name in _ATTENTION} | {"norm_ff": "1.0", "fc1": "1.1", "fc2": "1.3"}
# Stacks: what precedes a layer's number, and the names inside a layer.
_STACKS = {
    "transformer": ("transformer.", _BLOCK),
    "decoder/layers": ("decoder_blocks.", _BLOCK),
    "obs_encoder/resampler/layers": (f"{RESAMPLER}.layers.", _RESAMPLER_LAYER),
}
_LEAVES = {"kernel": "weight", "scale": "weight"}


def entry_of(vit_patch: int, patch: Sequence[int]) -> EntryOf:
    """The entries of GR1's tree.

    Args:
      vit_patch: rows and columns of the ViT's patches.
      patch: rows and columns of those that the image decoder predicts.
    """

    of_vit = torchvision_vit.entry_of(vit_patch)

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        if path[:2] == ("obs_encoder", "vit"):
            inner = of_vit(path[2:], layer, shape)
            return dataclasses.replace(inner, name=f"{VIT}.{inner.name}", path=path)
        name, module, leaf = _name(path, layer), path[-2] if len(path) > 1 else "", path[-1]
        if path[:2] == ("decoder", "head"):
            return layout.patch_decoder(name, path, layer, shape, tuple(patch))
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        joined = module == "to_out" or (module == "proj" and layer is not None)  # these read (heads, head size)
        return layout.linear(name, path, layer, shape, input_axes=2 if joined else 1)

    return entry


def _name(path: Path, layer: int | None) -> str:
    *modules, leaf = path
    official_leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    if layer is not None:
        at = modules.index(BLOCKS)
        prefix, inner = _STACKS["/".join(modules[:at])]
        return f"{prefix}{layer}.{inner.get(modules[at + 1], modules[at + 1])}.{official_leaf}"
    whole = "/".join(path)
    return _NAMES[whole] if whole in _NAMES else f"{_NAMES['/'.join(modules)]}.{official_leaf}"
