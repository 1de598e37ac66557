"""torchvision's names of a Vision Transformer's tensors, and ImageNet weights from a file that has them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from uwm_jax.errors import UserError
from uwm_jax.models.layers import BLOCKS
from uwm_jax.torch_bridge import layout
from uwm_jax.torch_bridge.hub import locate_weights
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape
from uwm_jax.torch_bridge.tensor_file import read_safetensors

_LAYERS = "encoder.layers.encoder_layer_"
_BLOCK = {
    "norm1": "ln_1.",
    "norm2": "ln_2.",
    "qkv": "self_attention.in_proj_",  # torch's packed projection is no module of its own
    "proj": "self_attention.out_proj.",
    "fc1": "mlp.0.",
    "fc2": "mlp.3.",
}
_LEAVES = {"kernel": "weight", "scale": "weight"}


def entry_of(patch: int) -> EntryOf:
    """The entries of a `uwm_jax.models.vit.ViT`, whose patches have `patch` rows and columns."""

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        name, module, leaf = _name(path, layer), path[-2] if len(path) > 1 else "", path[-1]
        if module == "conv_proj" and leaf == "kernel":
            return layout.patch_encoder(name, path, layer, shape, (patch, patch))
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        return layout.linear(name, path, layer, shape, input_axes=2 if module == "proj" else 1)  # (heads, head size)

    return entry


def _name(path: Path, layer: int | None) -> str:
    leaf = _LEAVES.get(path[-1], path[-1])
    if BLOCKS in path:
        return f"{_LAYERS}{layer}.{_BLOCK[path[-2]]}{leaf}"
    if path == ("pos_embedding",):
        return "encoder.pos_embedding"
    return ".".join(["encoder.ln" if path[0] == "ln" else path[0], leaf] if len(path) > 1 else path)


def sizes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """`patch`, `width`, `depth` and `mlp_dim` of the ViT that tensors of these shapes make, by torchvision's names.

    A size is left out where the tensor that tells it is absent or has another number of axes.
    """
    found: dict[str, int] = {}
    if len(conv := shapes.get("conv_proj.weight", ())) == 4:
        found |= {"width": conv[0], "patch": conv[2]}
    if len(mlp := shapes.get(f"{_LAYERS}0.mlp.0.weight", ())) == 2:
        found["mlp_dim"] = mlp[0]
    if layers := {int(m[1]) for name in shapes if (m := re.match(re.escape(_LAYERS) + r"(\d+)\.", name))}:
        found["depth"] = max(layers) + 1
    return found


def load_imagenet_vit(path_or_hub: str | os.PathLike[str], vit_params: Mapping[str, Any]) -> dict[str, Any]:
    """A classifier's weights as the parameters of a ViT; its head is ignored.

    Args:
        path_or_hub: a safetensors file with torchvision's names (conv_proj.weight, encoder.ln.weight, ...), a folder
            with such a model.safetensors, or a hub name "owner/name[@revision][/file]" (by default its
            model.safetensors).
        vit_params: the parameters of a `uwm_jax.models.vit.ViT` of the same sizes.
    Returns:
        parameters of the same structure, float32 numpy.
    Raises:
        UserError: the file cannot be had or read, or a tensor is missing, extra or misshaped; each is named.
    """
    path = locate_weights(path_or_hub, "torchvision's ViT names")
    tensors = read_safetensors(path, f"ImageNet weights: {path}")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("heads.")}
    values, _ = vit_params["conv_proj"]["kernel"].shape
    patch = round((values / 3) ** 0.5)
    if faults := layout.find_faults(tensors, vit_params, entry_of(patch)):
        found = sizes({name: tensor.shape for name, tensor in tensors.items()})
        told = f"they make a ViT with {', '.join(f'{k} {v}' for k, v in found.items())}; " if found else ""
        raise UserError(
            f"{path}: the weights do not fit the encoder, {len(faults)} times:\n  " + "\n  ".join(faults) + "\n"
            f"Use a torchvision ViT with the sizes of config.model.encoder; {told}encoder.pos_embedding has one row "
            "for each patch of config.data.crop, and one for the class token (ViT-B/32: patch 32, width 768, depth "
            "12, mlp_dim 3072, crop (224, 224))."
        )
    return layout.from_official(tensors, vit_params, entry_of(patch), str(path))
