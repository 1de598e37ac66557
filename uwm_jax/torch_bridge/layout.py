"""The official state dict's names and layouts, and our parameter tree, exact in both directions.

Every official tensor is one parameter of ours, or one slice of a stacked one, with its axes split,
permuted and joined again; no value is touched, so going there and back is bit-equal. The same map
carries gradients. Torch kernels are (outputs, inputs...), ours (inputs..., outputs...); a flattened
patch is (channel, frame, row, column) there and (frame, row, column, channel) here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uwm_jax.errors import UserError

Path = tuple[str, ...]
Shape = tuple[int, ...]

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


@dataclass(frozen=True)
class Entry:
    """One official tensor: parameter `path` (slice `layer` of it when stacked) has axes `split`, which
    `order` permutes into torch's, joined to `torch_shape`."""

    name: str
    path: Path
    layer: int | None
    split: Shape
    order: Shape
    torch_shape: Shape

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(value.reshape(self.split).transpose(self.order)).reshape(self.torch_shape)

    def from_torch(self, value: np.ndarray, shape: Shape) -> np.ndarray:
        permuted = value.reshape(tuple(self.split[axis] for axis in self.order))
        return np.ascontiguousarray(permuted.transpose(np.argsort(self.order))).reshape(shape)


def table(params: Any, patch: Sequence[int]) -> list[Entry]:
    """The entries of a parameter tree {"obs_encoder", "noise_pred_net"}, sorted by official name.

    Args:
      params: the tree, of arrays or of anything with a `shape`.
      patch: latent (frames, rows, columns) of a video token.
    """
    entries = []
    for path, leaf in _flatten(params).items():
        shape = tuple(int(n) for n in leaf.shape)
        if path[:2] == ("noise_pred_net", "blocks"):
            entries += [_entry(path, layer, shape[1:], patch) for layer in range(shape[0])]
        else:
            entries.append(_entry(path, None, shape, patch))
    return sorted(entries, key=lambda e: e.name)


def to_official(params: Any, patch: Sequence[int]) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under official names, in torch's layouts, dtypes kept."""
    flat = {path: np.asarray(leaf) for path, leaf in _flatten(params).items()}
    return {
        e.name: e.to_torch(flat[e.path] if e.layer is None else flat[e.path][e.layer]) for e in table(params, patch)
    }


def from_official(tensors: Mapping[str, np.ndarray], like: Any, patch: Sequence[int], source: str) -> dict[str, Any]:
    """Official tensors of the trainable parts as our parameter tree, float32.

    Args:
      tensors: by official name; other floating dtypes are converted.
      like: the expected tree (anything with `shape`).
      patch: as in `table`.
      source: what to call the tensors in messages.

    Raises:
      UserError: naming every tensor that is missing, extra, misshaped or not of a floating dtype.
    """
    entries = table(like, patch)
    if complaints := find_faults(tensors, like, patch):
        raise UserError(refusal(source, complaints))
    shapes = {path: tuple(leaf.shape) for path, leaf in _flatten(like).items()}
    flat: dict[Path, np.ndarray] = {}
    for e in entries:
        value = np.asarray(tensors[e.name]).astype(np.float32)
        if e.layer is None:
            flat[e.path] = e.from_torch(value, shapes[e.path])
        else:
            stacked = flat.setdefault(e.path, np.empty(shapes[e.path], np.float32))
            stacked[e.layer] = e.from_torch(value, shapes[e.path][1:])
    return _unflatten(flat)


def find_faults(tensors: Mapping[str, np.ndarray], like: Any, patch: Sequence[int]) -> list[str]:
    """One line about each tensor that is not one of `like`'s; arguments as in `from_official`."""
    entries, faults = table(like, patch), []
    for e in entries:
        if e.name not in tensors:
            faults.append(f"missing tensor {e.name} {e.torch_shape}")
        elif tensors[e.name].shape != e.torch_shape:
            faults.append(f"tensor {e.name} has shape {tensors[e.name].shape}, expected {e.torch_shape}")
        elif not is_float(tensors[e.name].dtype):
            faults.append(f"tensor {e.name} is {tensors[e.name].dtype}, expected a floating dtype")
    return faults + [f"extra tensor {name}" for name in sorted(set(tensors) - {e.name for e in entries})]


def refusal(source: str, faults: Sequence[str], conflicts: Sequence[str] = ()) -> str:
    """The message about tensors that do not fit.

    Args:
      faults: one line about each tensor.
      conflicts: one line about each field of the configuration that the tensors contradict.
    """
    lines = [f"{source}:"]
    if faults:
        lines += [f"tensors unlike those that the configuration describes ({len(faults)}):"]
        lines += [f"  {fault}" for fault in faults]
    if conflicts:
        lines += [f"fields of the configuration that the tensors contradict ({len(conflicts)}):"]
        lines += [f"  {conflict}" for conflict in conflicts]
    return "\n".join([*lines, "Use the weights and the configuration of one and the same official run."])


def is_float(dtype: np.dtype) -> bool:
    """float16, float32, float64 or ml_dtypes' bfloat16."""
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _entry(path: Path, layer: int | None, shape: Shape, patch: Sequence[int]) -> Entry:
    name = _official_name(path, layer)
    module, leaf = path[-2], path[-1]
    patch = tuple(patch)
    if module == "patch_encoder" and leaf == "kernel":  # torch: a convolution (D, C, pt, ph, pw)
        channels = shape[0] // math.prod(patch)
        return Entry(name, path, layer, (*patch, channels, shape[1]), (4, 3, 0, 1, 2), (shape[1], channels, *patch))
    if module == "patch_decoder":
        split = (*patch, shape[-1] // math.prod(patch))
        if leaf == "bias":
            return Entry(name, path, layer, split, (3, 0, 1, 2), shape)
        return Entry(name, path, layer, (shape[0], *split), (4, 1, 2, 3, 0), shape[::-1])
    if leaf != "kernel":  # biases lose inner axes; scales and tables are as they are
        return Entry(
            name, path, layer, shape, tuple(range(len(shape))), (math.prod(shape),) if leaf == "bias" else shape
        )
    if path[:2] == ("obs_encoder", "img_encoder") and len(shape) == 4:  # (rows, columns, in, out)
        order = (3, 2, 0, 1)
        return Entry(name, path, layer, shape, order, tuple(shape[axis] for axis in order))
    inputs = math.prod(shape[:2] if module == "proj" else shape[:1])  # proj reads (heads, head size)
    outputs = math.prod(shape) // inputs
    return Entry(name, path, layer, (inputs, outputs), (1, 0), (outputs, inputs))


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


def _flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return flat


def _unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, leaf), value in flat.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
