"""ImageNet weights for the observation encoder, from a safetensors file with torchvision's names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.hub import locate_weights
from uwm_jax.torch_bridge.tensor_file import read_safetensors

_NORM = re.compile(r"(^|\.)(bn\d+|downsample\.1)\.(weight|bias|running_mean|running_var|num_batches_tracked)$")


def load_imagenet_resnet(path_or_hub: str | os.PathLike[str], encoder_params: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a classifier's convolutions into fresh encoder parameters, as the official UWM code does.

    Convolutions are copied. BatchNorm's entries are discarded, since GroupNorm replaces it: norms restart at scale 1
    and bias 0. The classifier's `fc` is ignored and the encoder's stays as initialised.

    Args:
        path_or_hub: a safetensors file with torchvision's names (conv1.weight, layer1.0.bn1.running_mean, ...), a
            folder with such a model.safetensors, or a hub name "owner/name[@revision][/file]" (by default its
            model.safetensors).
        encoder_params: the parameters of a `uwm_jax.models.resnet.ResNet` of the same depth and width.
    Returns:
        new parameters of the same structure; float32 numpy where they changed.
    Raises:
        UserError: the file cannot be had or read, or a tensor is missing, extra or misshaped; each is named.
    """
    path = locate_weights(path_or_hub, "torchvision's ResNet names")
    tensors = read_safetensors(path, f"ImageNet weights: {path}")

    flat = dict(traverse_util.flatten_dict(encoder_params))
    unused = {name for name in tensors if not _NORM.search(name) and not name.startswith("fc.")}
    complaints = []
    for keys, value in flat.items():
        *modules, leaf = keys
        if modules[0] == "fc":
            continue
        if leaf in ("scale", "bias"):
            flat[keys] = np.full(value.shape, float(leaf == "scale"), np.float32)
            continue
        name = ".".join(re.sub(r"_(\d+)$", r".\1", module) for module in modules) + ".weight"
        rows, columns, inputs, outputs = value.shape
        expected = (outputs, inputs, rows, columns)
        if name not in unused:
            complaints.append(f"missing tensor {name} {expected}")
            continue
        unused.remove(name)
        if tensors[name].shape != expected:
            complaints.append(f"tensor {name} has shape {tensors[name].shape}, expected {expected}")
            continue
        flat[keys] = np.ascontiguousarray(tensors[name].astype(np.float32).transpose(2, 3, 1, 0))
    complaints += [f"extra tensor {name}" for name in sorted(unused)]
    if complaints:
        raise UserError(
            f"{path}: the weights do not fit the encoder, {len(complaints)} times:\n  " + "\n  ".join(complaints) + "\n"
            "Use a torchvision ResNet with basic blocks and the sizes of config.model.encoder.stage_sizes and .width "
            "(ResNet-18: (2, 2, 2, 2) and 64)."
        )
    return traverse_util.unflatten_dict(flat)
