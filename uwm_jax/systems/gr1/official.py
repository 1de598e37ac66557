"""The official names and layouts of GR1's parameters."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_jax.models.layers import BLOCKS
from uwm_jax.torch_bridge import layout
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape

_ENCODER = "obs_encoder.img_encoder"
_VIT = f"{_ENCODER}.model"
_RESAMPLER = f"{_ENCODER}.perceiver_resampler"
# Modules outside stacks, and the parameters that are in none.
_NAMES = {
    "obs_encoder": _ENCODER,
    "obs_encoder/heads": f"{_VIT}.heads",
    "obs_encoder/feat_head": f"{_ENCODER}.feat_head",
    "obs_encoder/patch_head": f"{_ENCODER}.patch_head",
    "obs_encoder/vit": _VIT,
    "obs_encoder/vit/conv_proj": f"{_VIT}.conv_proj",
    "obs_encoder/vit/ln": f"{_VIT}.encoder.ln",
    "obs_encoder/resampler": _RESAMPLER,
    "obs_encoder/resampler/norm": f"{_RESAMPLER}.norm",
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
    "obs_encoder/vit/pos_embedding": f"{_VIT}.encoder.pos_embedding",
}
_BLOCK = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_VIT_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "qkv": "self_attention.in_proj",
    "proj": "self_attention.out_proj",
    "fc1": "mlp.0",
    "fc2": "mlp.3",
}
_ATTENTION = ("norm_media", "norm_latents", "to_q", "to_kv", "to_out")
_RESAMPLER_LAYER = {name: f"0.{name}" for name in _ATTENTION} | {"norm_ff": "1.0", "fc1": "1.1", "fc2": "1.3"}
# Stacks: what precedes a layer's number, and the names inside a layer.
_STACKS = {
    "transformer": ("transformer.", _BLOCK),
    "decoder/layers": ("decoder_blocks.", _BLOCK),
    "obs_encoder/vit/encoder": (f"{_VIT}.encoder.layers.encoder_layer_", _VIT_BLOCK),
    "obs_encoder/resampler/layers": (f"{_RESAMPLER}.layers.", _RESAMPLER_LAYER),
}
_LEAVES = {"kernel": "weight", "scale": "weight"}


def entry_of(vit_patch: int, patch: Sequence[int]) -> EntryOf:
    """The entries of GR1's tree.

    Args:
      vit_patch: rows and columns of the ViT's patches.
      patch: rows and columns of those that the image decoder predicts.
    """

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        name, module, leaf = official_name(path, layer), path[-2] if len(path) > 1 else "", path[-1]
        if module == "conv_proj" and leaf == "kernel":
            return layout.patch_encoder(name, path, layer, shape, (vit_patch, vit_patch))
        if path[:2] == ("decoder", "head"):
            return layout.patch_decoder(name, path, layer, shape, tuple(patch))
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        joined = module == "to_out" or (module == "proj" and layer is not None)  # these read (heads, head size)
        return layout.linear(name, path, layer, shape, input_axes=2 if joined else 1)

    return entry


def official_name(path: Path, layer: int | None) -> str:
    """The tensor that the parameter at `path` is, in layer `layer` of its stack."""
    *modules, leaf = path
    official_leaf = _LEAVES.get(leaf, leaf)
    if layer is not None:
        at = modules.index(BLOCKS)
        prefix, inner = _STACKS["/".join(modules[:at])]
        name = inner.get(modules[at + 1], modules[at + 1])
        separator = "_" if name.endswith("in_proj") else "."  # torch's packed projection is no module
        return f"{prefix}{layer}.{name}{separator}{official_leaf}"
    whole = "/".join(path)
    if whole in _NAMES:
        return _NAMES[whole]
    return f"{_NAMES['/'.join(modules)]}.{official_leaf}"
