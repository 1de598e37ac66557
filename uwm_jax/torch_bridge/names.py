"""Official names of modules that several networks of the Unified World Models code have."""

from __future__ import annotations

import re
from collections.abc import Mapping

from uwm_jax.torch_bridge.layout import Path

# Ours within the network: theirs; within a block, of `blocks.<layer>`.
TRANSFORMER: Mapping[str, str] = {
    "blocks/qkv": "attn.qkv",
    "blocks/proj": "attn.proj",
    "blocks/fc1": "mlp.fc1",
    "blocks/fc2": "mlp.fc2",
    "blocks/adaln": "adaLN_modulation.1",
    "head/linear": "head.linear",
    "head/adaln": "head.adaLN_modulation.1",
}
ACTIONS_AND_VIDEO: Mapping[str, str] = {
    **TRANSFORMER,
    "patch_encoder": "obs_patchifier.patch_encoder",
    "patch_decoder": "obs_patchifier.patch_decoder",
    "action_encoder/fc1": "action_encoder.0",
    "action_encoder/fc2": "action_encoder.2",
    "action_decoder/fc1": "action_decoder.0",
    "action_decoder/fc2": "action_decoder.2",
    "timestep_embedding/fc1": "timestep_embedding.proj.0",
    "timestep_embedding/fc2": "timestep_embedding.proj.2",
}


def of_network(path: Path, layer: int | None, modules: Mapping[str, str]) -> str:
    """The official name of a parameter of the noise-prediction network.

    Args:
      path: from `noise_pred_net` on.
      layer: of a stacked parameter.
      modules: such as `ACTIONS_AND_VIDEO`.
    """
    *inner, leaf = path[1:]
    name = [modules["/".join(inner)]] if inner else []
    block = [] if layer is None else ["blocks", str(layer)]
    return ".".join([path[0], *block, *name, {"kernel": "weight"}.get(leaf, leaf)])


def of_obs_encoder(path: Path, resnet: str) -> str:
    """The official name of a parameter of the observation encoder.

    Args:
      path: from `obs_encoder` on.
      resnet: the official name of the ResNet, such as `obs_encoder.img_encoder.model`.
    """
    *modules, leaf = path
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    if modules == ["obs_encoder", "text_head"]:
        return f"obs_encoder.text_encoder.head.{leaf}"
    if modules[:2] == ["obs_encoder", "img_encoder"]:
        inside = [re.sub(r"^(layer\d+|downsample)_(\d+)$", r"\1.\2", m) for m in modules[2:]]
        return ".".join([resnet, *inside, leaf])
    raise ValueError(f"parameter {'/'.join(path)} has no official name")
