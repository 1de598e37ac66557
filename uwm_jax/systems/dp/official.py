"""The official names and layouts of Diffusion Policy's parameters, in the Unified World Models code."""

from __future__ import annotations

import re

from uwm_jax.torch_bridge import layout, names
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape

_TRANSFORMER = {
    **names.TRANSFORMER,
    "action_encoder/fc1": "input_encoder.0",
    "action_encoder/fc2": "input_encoder.2",
    "action_decoder/fc1": "output_decoder.0",
    "action_decoder/fc2": "output_decoder.2",
    "timestep_embedding/fc1": "timestep_encoder.1",  # 0 is the sinusoid, without parameters
    "timestep_embedding/fc2": "timestep_encoder.3",
}
# Of the U-Net, its modules, and their parts.
_LEVELS = (
    (r"down_(\d+)_(\d+)", r"down_modules.\1.\2"),
    (r"halve_(\d+)", r"down_modules.\1.2.conv"),
    (r"mid_(\d+)", r"mid_modules.\1"),
    (r"up_(\d+)_(\d+)", r"up_modules.\1.\2"),
    (r"double_(\d+)", r"up_modules.\1.2.conv"),
    (r"final", r"final_conv.0"),
    (r"output", r"final_conv.1"),
    (r"timestep_embedding", r"diffusion_step_encoder"),
)
_PARTS = {
    "block1": "blocks.0",
    "block2": "blocks.1",
    "conv": "block.0",
    "norm": "block.1",
    "film": "cond_encoder.1",
    "shortcut": "residual_conv",
    "fc1": "1",  # 0 is the sinusoid, or holds the frequencies of the Fourier features
    "fc2": "3",
}


def entry_of(predictor: str) -> EntryOf:
    """The entries of the tree {"obs_encoder", "noise_pred_net"}.

    Args:
      predictor: `config.model.predictor`, transformer or unet.
    """

    def entry(path: Path, layer: int | None, shape: Shape) -> Entry:
        name, module, leaf = _official_name(path, layer, predictor), path[-2], path[-1]
        if leaf != "kernel":
            return (layout.bias if leaf == "bias" else layout.as_it_is)(name, path, layer, shape)
        is_linear = module in ("film", "fc1", "fc2") or predictor != "unet"
        if len(shape) == 4 if path[0] == "obs_encoder" else not is_linear:
            return layout.convolution(name, path, layer, shape)
        return layout.linear(name, path, layer, shape, input_axes=2 if module == "proj" else 1)  # (heads, head size)

    return entry


def _official_name(path: Path, layer: int | None, predictor: str) -> str:
    if path[0] != "noise_pred_net":
        return names.of_obs_encoder(path, "obs_encoder.rgb_encoder")
    if predictor != "unet":
        return names.of_network(path, layer, _TRANSFORMER)
    _, first, *parts, leaf = path
    level = next(re.sub(ours, theirs, first) for ours, theirs in _LEVELS if re.fullmatch(ours, first))
    leaf = {"kernel": "weight", "scale": "weight", "frequency": "0.W"}.get(leaf, leaf)
    return ".".join([path[0], level, *(_PARTS[part] for part in parts), leaf])
