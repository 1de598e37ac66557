"""The saved YAML of an official PyTorch run, and its tensors' shapes, as our config.

What a tensor's shape tells (width, depth, tokens, action and condition sizes, the VAE) is read from
the tensors and must agree with the YAML; what it does not tell (head count, crops, cameras, window,
diffusion) is read from the YAML. The YAML may be resolved, or hold Hydra's `${a.b[0]}` references.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.diffusers_vae import infer_config
from uwm_jax.torch_bridge.official_yaml import OfficialYaml, ints, number, typed

NET = "noise_pred_net."
RESNET = "obs_encoder.img_encoder.model."
VAE = "obs_encoder.vae.vae."
TEXT = "obs_encoder.text_encoder."
TEXT_HEAD = TEXT + "head."
CLIP_DIM = 512  # of the official text embedding, where the tensors do not tell

CLASS = "models.uwm.UnifiedWorldModel"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OfficialRun:
    """An official run as the converter needs it in addition to the tensors.

    cameras: raw (height, width) per camera key. low_dim: size of each low-dim key that the model
    reads. low_dim_seen: of each key that the run stored. text_dim: 0 without a text head.
    normalized: {key: whether the run normalised it; None where the YAML does not say}, of `action` and the low-dim keys
    that the model reads.
    conflicts: one line about each field that the tensors contradict; with any, the weights must be refused.
    """

    config: ConfigDict
    cameras: dict[str, tuple[int, int]]
    low_dim: dict[str, int]
    low_dim_seen: dict[str, int]
    action_dim: int
    text_dim: int
    normalized: dict[str, bool | None]
    conflicts: tuple[str, ...] = ()


def read_official(official: OfficialYaml, shapes: Mapping[str, Shape]) -> OfficialRun:
    """Our config and the data's sizes of an official run.

    Args:
      official: its saved configuration.
      shapes: shape of every tensor of its state dict, under official names.

    Raises UserError for what we do not model (by name), for a field that is missing or mistyped, and for
    tensors that are not those of such a run at all. A YAML field that disagrees with the tensors becomes
    one of the `conflicts` (which name both), so that it can be reported together with unfit tensors;
    those are left to `layout.find_faults`.
    """
    _refuse_unsupported(official, shapes)
    c = config_lib.base()
    cameras, low_dim_seen, action_dim = _shape_meta(official)
    c.data.path = str(official.optional("dataset.name", "official"))
    c.data.cameras = tuple(sorted(cameras))
    _read_window(official, c)
    _read_images(official, c, cameras)
    _read_diffusion(official, c)
    _read_optimizer(official, c)
    normalizes = {name: _says(official, f"dataset.normalize_{name}") for name in ("action", "lowdim")}
    c.data.normalize = "minmax" if normalizes["action"] else "none"

    c.model.encoder.use_low_dim = typed(official, "model.obs_encoder.use_low_dim", bool, False)
    c.model.encoder.use_language = typed(official, "model.obs_encoder.use_language", bool, False)
    low_dim = dict(sorted(low_dim_seen.items())) if c.model.encoder.use_low_dim else {}
    c.data.low_dim = tuple(low_dim)
    conflicts: list[str] = []
    text_dim = 0
    if c.model.encoder.use_language:
        c.data.text = "text"
        text_dim = _dim(shapes, TEXT_HEAD + "weight", 1, rank=2) or CLIP_DIM
        if TEXT_HEAD + "weight" not in shapes:
            message = f"is true, but --input holds no {TEXT_HEAD}weight, the projection of a text embedding"
            conflicts.append(str(official.error("model.obs_encoder.use_language", message)))

    c.model.num_heads = typed(official, "model.num_heads", int)
    for field, ours in {
        "embed_dim": "embed_dim",
        "depth": "depth",
        "num_registers": "num_registers",
        "timestep_embed_dim": "timestep_embed_dim",
        "mlp_ratio": "mlp_ratio",
    }.items():
        c.model[ours] = typed(official, f"model.{field}", int)
    c.model.qkv_bias = typed(official, "model.qkv_bias", bool, True)
    c.model.patch = ints(official, "model.latent_patch_shape", 3)
    conflicts += _conflicts(official, shapes, c, low_dim, action_dim)
    try:
        config_lib.validate(c)
    except UserError as e:
        raise UserError(f"--official-config: {official.path}: {e}") from e
    normalized = {"action": normalizes["action"], **dict.fromkeys(low_dim, normalizes["lowdim"])}
    return OfficialRun(c, cameras, low_dim, low_dim_seen, action_dim, text_dim, normalized, tuple(conflicts))


def _says(official: OfficialYaml, field: str) -> bool | None:
    """A switch of the YAML; None where it is absent."""
    return None if official.get(field, None) is None else typed(official, field, bool)


def _refuse_unsupported(official: OfficialYaml, shapes: Mapping[str, Shape]) -> None:
    found = official.get("model._target_", None)
    if found not in (None, CLASS):
        raise official.error("model._target_", f"is {found!r}; only {CLASS!r} can be converted")
    if found is None and (algo := official.optional("algo", "uwm")) != "uwm":
        raise official.error("algo", f"is {algo!r}; only 'uwm' can be converted")
    if (backbone := official.get("model.obs_encoder.vision_backbone", "resnet")) != "resnet":
        raise official.error(
            "model.obs_encoder.vision_backbone", f"is {backbone!r}, which we do not model; only 'resnet' is"
        )
    if typed(official, "model.obs_encoder.imagenet_norm", bool, False):
        raise official.error(
            "model.obs_encoder.imagenet_norm",
            "is true, which we do not model; ImageNet normalisation is part of the ResNet",
        )
    towers = [n for n in shapes if n.startswith(TEXT) and not n.startswith(TEXT_HEAD)]
    if towers:
        raise UserError(
            f"--input: it holds a CLIP tower ({len(towers)} tensors, such as {min(towers)}), which we do not model. "
            f"Text embeddings are inputs here: remove the tower, keep {TEXT_HEAD}weight and {TEXT_HEAD}bias, and "
            "give the model embeddings made by the same CLIP."
        )
    if not any(name.startswith(NET) for name in shapes):
        raise UserError(
            f"--input: expected the names of an official state dict, such as {NET}pos_embed and {RESNET}fc.weight, but "
            f"none of its {len(shapes)} names starts with {NET}; its first are {', '.join(sorted(shapes)[:3])}. "
            "Prefixes of wrappers ('module.', '_orig_mod.', 'model.') were taken off; remove any other first."
        )


def _shape_meta(official: OfficialYaml) -> tuple[dict[str, tuple[int, int]], dict[str, int], int]:
    """Raw camera sizes, low-dim sizes and the action size."""
    field = "model.obs_encoder.shape_meta"
    if official.get(field, None) is None:
        field = "dataset.shape_meta"
    meta = official.get(field)
    cameras: dict[str, tuple[int, int]] = {}
    low_dim: dict[str, int] = {}
    observations = meta.get("obs") if isinstance(meta, dict) else None
    if not isinstance(observations, dict) or not observations:
        raise official.error(f"{field}.obs", "should map observation keys to shapes")
    if odd := [key for key in observations if not isinstance(key, str)]:
        raise official.error(f"{field}.obs", f"should have strings as keys, found {odd[0]!r}")
    for key in sorted(observations):  # not read as a field, because a key may have a dot
        entry = observations[key] if isinstance(observations[key], dict) else {}
        kind: Any = entry.get("type", "low_dim")
        shape: Any = entry.get("shape")
        whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        if kind == "rgb" and whole and len(shape) == 3 and shape[-1] == 3:
            cameras[key] = (shape[0], shape[1])
        elif kind == "low_dim" and whole and len(shape) == 1:
            low_dim[key] = shape[0]
        else:
            raise official.error(
                f"{field}.obs.{key}",
                "should be of type rgb with shape [height, width, 3] or low_dim with shape [size], "
                f"found {kind!r} {shape!r}",
            )
    if not cameras:
        raise official.error(f"{field}.obs", "has no key of type rgb")
    action_dim = typed(official, "model.action_dim", int)
    if (shape := official.get(f"{field}.action.shape", None)) is not None and shape != [action_dim]:
        raise official.error(f"{field}.action.shape", f"is {shape}, but model.action_dim is {action_dim}")
    return cameras, low_dim, action_dim


def _read_window(official: OfficialYaml, c: ConfigDict) -> None:
    """obs 0..To-1, actions To-1..To+Ta-2, next_obs from To+Ta-1 to the end (the paper: 0,1 | 1..16 | 17,18)."""
    frames = typed(official, "num_frames", int)
    obs = typed(official, "obs_num_frames", int)
    actions = typed(official, "model.action_len", int)
    inner = official.get("model.obs_encoder.num_frames", obs)
    if inner != obs:
        raise official.error("model.obs_encoder.num_frames", f"is {inner}, but obs_num_frames is {obs}")
    first_next = obs - 1 + actions
    if frames - first_next != obs:
        raise official.error(
            "num_frames",
            f"is {frames}, which leaves {frames - first_next} frames after obs_num_frames={obs} and "
            f"model.action_len={actions}; the model predicts as many frames as it sees, "
            f"so it should be {first_next + obs}",
        )
    c.data.window.obs = tuple(range(obs))
    c.data.window.action = tuple(range(obs - 1, first_next))
    c.data.window.next_obs = tuple(range(first_next, frames))
    c.data.last_action = "keep"


def _read_images(official: OfficialYaml, c: ConfigDict, cameras: dict[str, tuple[int, int]]) -> None:
    encoder = "model.obs_encoder."
    sizes = set(cameras.values())
    if official.get(encoder + "resize_shape", None) is None:
        if len(sizes) > 1:
            raise official.error(encoder + "resize_shape", f"is absent, but the cameras differ in size: {cameras}")
        c.data.resize = sizes.pop()
    else:
        c.data.resize = ints(official, encoder + "resize_shape", 2)
    has_crop = official.get(encoder + "crop_shape", None) is not None
    c.data.crop = ints(official, encoder + "crop_shape", 2) if has_crop else c.data.resize
    augment = c.data.augment
    augment.draw = "batch"
    augment.random_crop = typed(official, encoder + "random_crop", bool, True)
    jitter = official.get(encoder + "color_jitter", None)
    jitter = {} if jitter is None else jitter
    if not isinstance(jitter, dict):
        raise official.error(
            encoder + "color_jitter",
            f"should map brightness, contrast, saturation and hue to numbers, or be null; found {jitter!r:.60}",
        )
    for name in ("brightness", "contrast", "saturation", "hue"):
        centre = 0.0 if name == "hue" else 1.0
        field, value = f"{encoder}color_jitter.{name}", jitter.get(name, 0.0)
        if isinstance(value, list) and len(value) == 2:
            low, high = (number(official, field, v) - centre for v in value)
            if not math.isclose(-low, high, rel_tol=1e-6, abs_tol=1e-9):
                raise official.error(
                    field, f"is {value}; only a range that is symmetric about {centre:g} can be represented"
                )
            value = high
        augment[name] = number(official, field, value)


def _read_diffusion(official: OfficialYaml, c: ConfigDict) -> None:
    c.diffusion.num_train_steps = typed(official, "model.num_train_steps", int)
    c.diffusion.num_inference_steps = typed(official, "model.num_inference_steps", int)
    c.diffusion.beta_schedule = typed(official, "model.beta_schedule", str)
    clip = 1.0 if typed(official, "model.clip_sample", bool) else 0.0
    for modality in c.diffusion.clip:
        c.diffusion.clip[modality] = clip


def _read_optimizer(official: OfficialYaml, c: ConfigDict) -> None:
    """The optimiser's numbers, where they can be read: they describe how the weights were made."""
    for field, ours in {"lr": "learning_rate", "eps": "eps", "weight_decay": "weight_decay"}.items():
        if (value := official.optional(f"optimizer.{field}", None)) is not None:
            c.optimizer[ours] = number(official, f"optimizer.{field}", value)
    betas = official.optional("optimizer.betas", None)
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != 2:
            raise official.error("optimizer.betas", f"should be a list of two numbers, found {betas!r:.60}")
        c.optimizer.b1, c.optimizer.b2 = (number(official, "optimizer.betas", b) for b in betas)


def _conflicts(
    official: OfficialYaml, shapes: Mapping[str, Shape], c: ConfigDict, low_dim: dict[str, int], action_dim: int
) -> list[str]:
    """One line about each field that the tensors contradict; also reads the ResNet's sizes into `c`."""
    m = c.model
    views, frames = len(c.data.cameras), len(c.data.window.obs)
    found_conflicts: list[str] = []

    def conflict(field: str, message: str) -> None:
        found_conflicts.append(str(official.error(field, message)))

    def agree(field: str, value: Any, tensor: str, found: Any) -> None:
        if found is not None and found != value:
            conflict(field, f"is {value}, but the tensors say {found} ({tensor} is {shapes.get(tensor)})")

    blocks = [int(match[1]) for n in shapes if (match := re.match(r"noise_pred_net\.blocks\.(\d+)\.", n))]
    if blocks and max(blocks) + 1 != m.depth:
        conflict(
            "model.depth",
            f"is {m.depth}, but the tensors say {max(blocks) + 1} ({NET}blocks.{max(blocks)} is the last block)",
        )
    pos, qkv = NET + "pos_embed", NET + "blocks.0.attn.qkv."
    agree("model.embed_dim", m.embed_dim, pos, _dim(shapes, pos, 2, rank=3))
    agree("model.num_registers", m.num_registers, NET + "registers", _dim(shapes, NET + "registers", 1, rank=3))
    agree(
        "model.action_dim",
        action_dim,
        NET + "action_encoder.0.weight",
        _dim(shapes, NET + "action_encoder.0.weight", 1),
    )
    fc1 = NET + "blocks.0.mlp.fc1.weight"
    agree("model.mlp_ratio * model.embed_dim", m.mlp_ratio * m.embed_dim, fc1, _dim(shapes, fc1, 0))
    if qkv + "weight" in shapes:
        agree("model.qkv_bias", m.qkv_bias, qkv + "bias", qkv + "bias" in shapes)
    time = NET + "timestep_embedding.proj.2.weight"
    agree("model.timestep_embed_dim", m.timestep_embed_dim, time, _dim(shapes, time, 0))
    fc = RESNET + "fc.weight"
    m.encoder.stage_sizes, m.encoder.width = resnet_sizes(shapes, m.encoder.stage_sizes, m.encoder.width)
    agree(
        "model.obs_encoder.embed_dim",
        typed(official, "model.obs_encoder.embed_dim", int, m.embed_dim),
        fc,
        _dim(shapes, fc, 0),
    )
    # Our observation encoder and the network share one width, as in every official run.
    agree("model.embed_dim (of the observation encoder as well)", m.embed_dim, fc, _dim(shapes, fc, 0))

    patch = NET + "obs_patchifier.patch_encoder.weight"
    if len(shapes.get(patch, ())) == 5:
        agree("model.latent_patch_shape", m.patch, patch, shapes[patch][2:])
    channels, factor = vae_geometry(shapes)
    if len(shapes.get(patch, ())) == 5 and channels is not None and shapes[patch][1] != channels:
        found_conflicts.append(
            f"--input: {patch} reads {shapes[patch][1]} latent channels, but the VAE has {channels}."
        )
    if factor is not None:
        for size, part, axis in zip(c.data.crop, m.patch[1:], ("height", "width"), strict=True):
            if size % (factor * part):
                conflict(
                    "model.obs_encoder.crop_shape",
                    f"has {axis} {size}, which the VAE's factor {factor} times the patch's {part} does not divide",
                )
        rows, columns = (s // (factor * p) for s, p in zip(c.data.crop, m.patch[1:], strict=True))
        video = views * (frames // m.patch[0]) * rows * columns
        tokens = len(c.data.window.action) + video + m.num_registers
        agree(
            f"model.action_len + video tokens ({video}) + model.num_registers",
            tokens,
            pos,
            _dim(shapes, pos, 1, rank=3),
        )
    low_dims = frames * sum(low_dim.values())
    features = views * frames * m.embed_dim + low_dims + (m.embed_dim if m.encoder.use_language else 0)
    head = NET + "head.adaLN_modulation.1.weight"
    agree(
        f"the condition ({views} cameras x {frames} frames x {m.embed_dim}, low-dim {low_dims}, "
        f"text {m.encoder.use_language}, time {m.timestep_embed_dim})",
        features + m.timestep_embed_dim,
        head,
        _dim(shapes, head, 1),
    )
    return found_conflicts


def resnet_sizes(shapes: Mapping[str, Shape], stage_sizes: tuple[int, ...], width: int) -> tuple[tuple[int, ...], int]:
    """Blocks per stage and first width of the ResNet; the given values where the tensors do not tell."""
    blocks: dict[int, int] = {}
    for name in shapes:
        if match := re.match(re.escape(RESNET) + r"layer(\d+)\.(\d+)\.(?:conv|bn)[12]\.(?:weight|bias)$", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    if sorted(blocks) == list(range(1, len(blocks) + 1)) and blocks:
        stage_sizes = tuple(blocks[s] for s in sorted(blocks))
    # What most of the tensors that show it say, so that one of a wrong shape is named rather than believed.
    known = [shapes.get(f"{RESNET}{name}", ()) for name in ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")]
    counted = Counter(shape[0] for shape in known if shape and shape[0] > 0 and shape[0] % 16 == 0).most_common(1)
    return stage_sizes, counted[0][0] if counted else width


def vae_geometry(shapes: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """Latent channels and pixels per latent of the VAE's tensors; None without any."""
    vae = {name.removeprefix(VAE): shape for name, shape in shapes.items() if name.startswith(VAE)}
    if not vae:
        return None, None
    config = infer_config(vae)
    return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)


def _dim(shapes: Mapping[str, Shape], name: str, axis: int, rank: int = 2) -> int | None:
    """One axis of a tensor; None when the tensor is absent or of another rank (reported elsewhere)."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == rank else None
