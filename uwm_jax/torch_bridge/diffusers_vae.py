"""Reading and writing image autoencoders as diffusers-format folders: `config.json` and one safetensors file.

Tensors are kept as they were found (names and bits) next to the parameters made of them, so that what was read
can be written back bit for bit. Neither torch nor diffusers is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from uwm_jax.codecs.autoencoder_kl import AutoencoderKL
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, as_place, new_folder, write_bytes, write_text
from uwm_jax.reading import again, read_json
from uwm_jax.torch_bridge.hub import fetch
from uwm_jax.torch_bridge.layout import is_float
from uwm_jax.torch_bridge.tensor_file import read_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SUMS_FILE = "SHA256SUMS"

# What tensors cannot tell about a VAE in an official UWM checkpoint (which always holds SDXL's)
NORM_NUM_GROUPS = 32
SCALING_FACTOR = 0.13025
_SDXL_CHANNELS = (128, 256, 512, 512)

# Tensors whose first axis is the width of their block
_BLOCK = re.compile(
    r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(?:conv1|norm2|conv2)\.(?:weight|bias)$"
)

# Attention of checkpoints from before diffusers 0.18: 1x1 convolutions or linear layers under these names
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")

# Fields of the module that a configuration may state; the values are diffusers' defaults, used for what it omits
_FIELDS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (64,), "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 32, "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
    "scaling_factor": 0.18215, "shift_factor": None,
}  # fmt: skip


def module_from_config(config: Mapping[str, Any], dtype: Any = jnp.float32, source: str = CONFIG_FILE) -> AutoencoderKL:
    """The module that a diffusers configuration describes; refuses by name what it does not model."""
    required: dict[str, tuple[Any, ...]] = {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    for key, allowed in required.items():
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{source}: {key} is {config[key]!r}, but only {wanted} is supported; use another VAE")
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        others = sorted(set(config.get(key, ())) - {kind})
        if others:
            raise UserError(f"{source}: {key} has {', '.join(others)}, but only {kind} is supported; use another VAE")
    fields = {key: config.get(key, default) for key, default in _FIELDS.items()}
    fields["block_out_channels"] = tuple(fields["block_out_channels"])
    fields["shift_factor"] = fields["shift_factor"] or 0.0
    return AutoencoderKL(**fields, dtype=jnp.dtype(dtype))


def infer_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The diffusers configuration of an `AutoencoderKL` state dict {name without prefix: shape}.

    Channels and layers are what most of the tensors that show them say, so that one that is missing, extra or
    misshaped does not hide what the others are; where none tells, they are those of SDXL's VAE. Colours (3),
    GroupNorm groups (32) and the scaling factor (0.13025) are constants.
    """
    channels: dict[int, list[int]] = {}
    layers: dict[tuple[str, int], int] = {}  # the decoder has one more per block than the encoder
    for name, shape in shapes.items():
        if match := _BLOCK.match(name):
            part, block, layer = match[1], int(match[2]), int(match[3])
            layers[part, block] = max(layers.get((part, block), 0), layer + (part == "encoder"))
            if part == "encoder" and shape and shape[0] % NORM_NUM_GROUPS == 0:
                channels.setdefault(block, []).append(shape[0])
    blocks = [block for block, votes in channels.items() if len(votes) > 2]  # fewer are strays
    block_out_channels = list(_SDXL_CHANNELS)
    if blocks:
        block_out_channels = []
        for block in range(max(blocks) + 1):
            before = block_out_channels[-1] if block_out_channels else _SDXL_CHANNELS[0]
            block_out_channels.append(_most_common(channels.get(block, ()), before))
    latent = [("decoder.conv_in.weight", 1), ("post_quant_conv.bias", 0)]
    latent += [("post_quant_conv.weight", axis) for axis in (0, 1)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(block_out_channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(block_out_channels),
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": _most_common((shapes[n][i] for n, i in latent if len(shapes.get(n, ())) > i), 4),
        "layers_per_block": _most_common((n for n in layers.values() if n), 2),
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in shapes),
        "norm_num_groups": NORM_NUM_GROUPS,
        "scaling_factor": SCALING_FACTOR,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def params_from_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str = "the VAE", prefix: str = ""
) -> dict[str, Any]:
    """Parameters (float32 numpy, the tree below flax's "params") of a diffusers state dict.

    Args:
        config: diffusers configuration, see `module_from_config`.
        tensors: every tensor of the state dict by its diffusers name, old or new attention names.
        source: what to call the tensors in messages, which put `prefix` before names.
    Raises:
        UserError: naming every tensor that is missing, extra, misshaped or not of a floating dtype.
    """
    params, complaints = match_tensors(config, tensors, source, prefix)
    if complaints:
        raise UserError(
            f"{source}: the weights do not fit the configuration, {len(complaints)} times:\n  "
            + "\n  ".join(complaints)
            + f"\nUse the {CONFIG_FILE} and {WEIGHTS_FILE} of one and the same VAE."
        )
    return params


def match_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str = "the VAE", prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """As `params_from_tensors`, but returns one line about each unfit tensor, which the parameters then lack."""
    model = module_from_config(config, source=source)
    size = model.downsampling
    image = jax.ShapeDtypeStruct((1, size, size, model.in_channels), jnp.float32)
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image)["params"])

    given = {_current_name(name): name for name in sorted(tensors, key=_current_name)}
    complaints = [f"extra tensor {prefix}{name}" for name in sorted(set(tensors) - set(given.values()))]
    flat = {}
    for path, leaf in shapes.items():
        name = _torch_name(path)
        expected = _torch_shape(leaf.shape)
        if name not in given:
            complaints.append(f"missing tensor {prefix}{name} {expected}")
            continue
        value = np.asarray(tensors[given.pop(name)])
        if path[-2].startswith("to_") and value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # attention stored as 1x1 convolutions
        if value.shape != expected:
            complaints.append(f"tensor {prefix}{name} has shape {value.shape}, expected {expected}")
            continue
        if not is_float(value.dtype):
            complaints.append(f"tensor {prefix}{name} is {value.dtype}, expected a floating dtype")
            continue
        flat[path] = np.ascontiguousarray(value.astype(np.float32).transpose(_TO_FLAX[value.ndim]))
    complaints += [f"extra tensor {prefix}{name}" for name in sorted(given.values())]
    return traverse_util.unflatten_dict(flat), complaints


def load_vae(path_or_hub_name: AnyPath, dtype: Any = jnp.float32) -> tuple[AutoencoderKL, dict, dict]:
    """Reads a VAE from a diffusers-format folder or the Hugging Face hub.

    Args:
        path_or_hub_name: a folder with `config.json` and `diffusion_pytorch_model.safetensors`, or a hub name
            "owner/name[@revision][/subfolder]" (a `Path` is always local).
        dtype: compute dtype of the module (parameters are float32).
    Returns:
        the module, its parameters (float32 numpy), and the source as found: {"config": dict, "tensors": {name:
        array}, "origin": str}, which `write_folder` takes.
    Raises:
        UserError: a missing or unreadable file, a configuration that is not modelled, tensors that do not fit, or a
            folder whose contents differ from its SHA256SUMS.
    """
    config_path, weights_path = fetch(path_or_hub_name, (CONFIG_FILE, WEIGHTS_FILE), what="VAE")
    _check_sums(config_path.parent)
    config = read_json(config_path)
    tensors = read_safetensors(weights_path, f"the VAE: {weights_path}")
    params = params_from_tensors(config, tensors, source=str(path_or_hub_name))
    source = {"config": config, "tensors": tensors, "origin": str(path_or_hub_name)}
    return module_from_config(config, dtype, str(config_path)), params, source


def copy_folder(path_or_hub_name: AnyPath, folder: AnyPath) -> dict[str, str]:
    """Checks a VAE as `load_vae` does and writes it to `folder`; returns and raises what `write_folder` does."""
    _, _, source = load_vae(path_or_hub_name)
    return write_folder(folder, source["config"], source["tensors"])


def write_folder(folder: AnyPath, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Writes a diffusers-format folder with SHA256SUMS, all of it or nothing; in a bucket, SHA256SUMS last.

    A folder with the same contents is left alone; one without SHA256SUMS in a bucket is unfinished, and written again.

    Returns:
        {file name: sha256 in hexadecimal}.
    Raises:
        UserError: the folder exists with other contents.
    """
    from safetensors.numpy import save  # here, so that programs which keep none do without

    folder = as_place(folder)
    content = {
        CONFIG_FILE: (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS_FILE: save({name: np.ascontiguousarray(value) for name, value in tensors.items()}),
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    if not isinstance(folder, Path):
        if (folder / SUMS_FILE).is_file():
            if (folder / SUMS_FILE).read_text() != listed:
                raise UserError(f"{folder} already holds another VAE; remove the folder or choose another workdir")
            return sums
        for name, data in content.items():
            write_bytes(folder / name, data)
        write_text(folder / SUMS_FILE, listed)
        return sums
    if folder.exists():
        found = {name: _sha256(folder / name) for name in sums if (folder / name).is_file()}
        if found != sums:
            raise UserError(f"{folder} already holds another VAE; remove the folder or choose another workdir")
        return sums
    with new_folder(folder) as staging:
        for name, data in content.items():
            write_bytes(staging / name, data)
        write_text(staging / SUMS_FILE, listed)
    return sums


# torch (out, in, ...) <-> flax (..., in, out); the permutation of 4 axes is not its own inverse
_TO_FLAX: dict[int, tuple[int, ...]] = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[i] for i in np.argsort(_TO_FLAX[len(shape)]))


def _torch_name(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join([re.sub(r"_(\d+)$", r".\1", module) for module in modules] + [leaf])


def _current_name(name: str) -> str:
    return _OLD_NAME.sub(lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.{m[3]}", name)


def _sha256(path: Path) -> str:
    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return again(read, path)


def _check_sums(folder: Path) -> None:
    sums = folder / SUMS_FILE
    if not sums.is_file():
        return  # a plain diffusers folder
    try:
        lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{sums}: cannot be read ({error}); restore the file") from None
    for line in lines:
        if len(line) != 2 or not re.fullmatch(r"[0-9a-fA-F]{64}", line[0]):
            raise UserError(
                f"{sums}: expected lines of a sha256 and a file name, found {' '.join(line)!r:.100}; restore the file"
            )
    listed = {name.removeprefix("*").removeprefix("./"): digest.lower() for digest, name in lines}
    if unlisted := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in listed]:
        raise UserError(f"{sums}: does not list {' and '.join(unlisted)}; restore the file")
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is listed in {SUMS_FILE}, but there is no such file; restore it")
        if _sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name}: its sha256 is not the one in {SUMS_FILE}, so it changed after it was written; "
                "restore the file (latents and predictions depend on it)"
            )


def _most_common(values: Iterable[int], default: int) -> int:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default
