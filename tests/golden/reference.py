"""Reference numbers of the official PyTorch code, and the formula that makes their weights.

`<name>.npz` holds what the official classes computed on a CPU in float32, in eval mode, with the VAE's
posterior at its mode; `<name>.config.yaml` is the configuration and `<name>.manifest.json` lists the
tensors. The weights follow a formula, so they need no file: the k-th name in sorted order holds
scale * u_k in C order, u_k[i] = frac(43758.5453 sin(12.9898 (i + 1) + 78.233 (k + 1))) - 1/2, plus 1
for the scales of normalisation layers. The recipe's `factors` multiply the scale of the tensors whose
names contain a text; constant tables of the official classes are in the `.npz`, under `const/<name>`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
NAMES = ("uwm_droid_small", "uwm_libero_small")  # UWM's
DP_NAMES = ("dp_transformer_small", "dp_unet_small", "dp_unet_fourier", "dp_flow_small")
GR1_NAMES = ("gr1_tiny", "gr1_small")


def filler(count: int, k: int) -> np.ndarray:
    """(count,) float64 in [-1/2, 1/2)."""
    position = np.arange(1, count + 1, dtype=np.float64)
    value = np.sin(position * 12.9898 + (k + 1) * 78.233) * 43758.5453
    return np.mod(value, 1.0) - 0.5


def weights(name: str) -> dict[str, np.ndarray]:
    """The state dict behind a golden file, official names and layouts, float32."""
    manifest = json.loads((FOLDER / f"{name}.manifest.json").read_text())
    recipe, constants, state = manifest["recipe"], {}, {}
    factors = [*recipe.get("factors", ()), (".vae.quant_conv.", recipe.get("quant_conv_factor", 1.0))]
    if any(kind == "const" for *_, kind in manifest["tensors"]):
        constants = {key.removeprefix("const/"): value for key, value in numbers(name).items()}
    for k, (tensor, shape, kind) in enumerate(manifest["tensors"]):
        if kind == "keep":  # the latents' constants
            state[tensor] = np.full(shape, 3 if tensor.endswith(".scale") else 0, np.float32)
        elif kind == "const":
            state[tensor] = constants[tensor]
        else:
            scale = math.prod((f for text, f in factors if text in tensor), start=recipe["scale"])
            drawn = scale * filler(math.prod(shape), k)
            state[tensor] = drawn.astype(np.float32).reshape(shape) + np.float32(kind == "norm")
    return state


def numbers(name: str) -> dict[str, np.ndarray]:
    """The golden arrays, in PyTorch's layouts: images (B, V, C, T, h, w), latents (B, V, C, T, h, w)."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file}


def official_yaml(name: str) -> Path:
    """The configuration of the run, as the official code saves it."""
    return FOLDER / f"{name}.config.yaml"


def channels_last(array: np.ndarray) -> np.ndarray:
    """(B, V, C, T, h, w) -> (B, V, T, h, w, C)."""
    return np.ascontiguousarray(np.moveaxis(array, 2, -1))
