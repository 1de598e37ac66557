"""Reading the saved YAML of an official PyTorch run, with its tensors' shapes: what systems share of it.

What a tensor's shape tells (width, depth, tokens, action and condition sizes, the VAE) is read from
the tensors and must agree with the YAML; what it does not tell (head count, crops, cameras, window,
diffusion) is read from the YAML. The YAML may be resolved, or hold Hydra's `${a.b[0]}` references.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.diffusers_vae import infer_config
from uwm_jax.torch_bridge.layout import EntryOf
from uwm_jax.torch_bridge.official_yaml import OfficialYaml, ints, number, typed

NET = "noise_pred_net."
VAE = "obs_encoder.vae.vae."
TEXT = "obs_encoder.text_encoder."
TEXT_HEAD = TEXT + "head."
CLIP_DIM = 512  # of the official text embedding, where the tensors do not tell

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


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


@dataclass(frozen=True)
class Official:
    """A system's official checkpoints.

    Attributes:
      classes: the values of `model._target_` in their configurations.
      algo: that of `algo`, where a configuration names no class.
      read: (the configuration, shape of every tensor by official name, a config of the system to fill in) -> the run.
        Raises UserError for what we do not model (by name), for a field that is missing or mistyped, and for tensors
        that are not those of such a run at all. A field that disagrees with the tensors becomes one of the run's
        `conflicts`, so that it can be reported together with unfit tensors, which are left to `layout.find_faults`.
      entry_of: (config) -> the entries of the parameters.
      describe: (system) -> what the description of converted tensors has besides that of all systems (JSON values).
      runs: whether `uwm_torch.py` runs such a model; an export of another is weights and description only.
    """

    classes: tuple[str, ...]
    algo: str
    read: Callable[[OfficialYaml, Shapes, ConfigDict], OfficialRun]
    entry_of: Callable[[ConfigDict], EntryOf]
    describe: Callable[[Any], dict[str, Any]] = lambda system: {}
    runs: bool = False


class Conflicts:
    """Collects one line about each field that the tensors contradict, in `lines`."""

    def __init__(self, official: OfficialYaml, shapes: Shapes):
        self.official, self.shapes = official, shapes
        self.lines: list[str] = []

    def add(self, field: str, message: str) -> None:
        self.lines.append(str(self.official.error(field, message)))

    def agree(self, field: str, value: Any, tensor: str, found: Any) -> None:
        """Compares a field's value with what `tensor` tells; None is nothing."""
        if found is not None and found != value:
            self.add(field, f"is {value}, but the tensors say {found} ({tensor} is {self.shapes.get(tensor)})")

    def agree_with_axis(self, field: str, value: int, tensor: str, axis: int, rank: int = 2) -> None:
        """Compares a field's value with an axis of a tensor of that rank."""
        self.agree(field, value, tensor, dim(self.shapes, tensor, axis, rank))

    def agree_with_layers(self, field: str, depth: int, prefix: str) -> None:
        """Compares a number of layers with the tensors called `<prefix><number>.`."""
        numbers = [int(match[1]) for n in self.shapes if (match := re.match(re.escape(prefix) + r"(\d+)\.", n))]
        if numbers and max(numbers) + 1 != depth:
            found = f"the tensors say {max(numbers) + 1} ({prefix}{max(numbers)} is the last block)"
            self.add(field, f"is {depth}, but {found}")

    def agree_with_blocks(self, m: ConfigDict, fields: str = "model.") -> None:
        """Compares depth, width, MLP and biases of the network's transformer with its tensors; `fields` precedes their
        names in the configuration."""
        self.agree_with_layers(f"{fields}depth", m.depth, NET + "blocks.")
        self.agree_with_axis(f"{fields}embed_dim", m.embed_dim, NET + "pos_embed", 2, rank=3)
        hidden = f"{fields}mlp_ratio * {fields}embed_dim"
        self.agree_with_axis(hidden, m.mlp_ratio * m.embed_dim, NET + "blocks.0.mlp.fc1.weight", 0)
        qkv = NET + "blocks.0.attn.qkv."
        if qkv + "weight" in self.shapes:
            self.agree(f"{fields}qkv_bias", m.qkv_bias, qkv + "bias", qkv + "bias" in self.shapes)

    def agree_with_resnet(self, m: ConfigDict, resnet: str, *, fields: str = "model.") -> None:
        """Reads the sizes of the ResNet into the config, and compares its outputs with the width of the network, which
        is the observation encoder's as well."""
        fc = resnet + "fc.weight"
        m.encoder.stage_sizes, m.encoder.width = resnet_sizes(
            self.shapes, resnet, m.encoder.stage_sizes, m.encoder.width
        )
        width = typed(self.official, "model.obs_encoder.embed_dim", int, m.embed_dim)
        self.agree_with_axis("model.obs_encoder.embed_dim", width, fc, 0)
        # Our observation encoder and the network share one width, as in every official run.
        self.agree_with_axis(f"{fields}embed_dim (of the observation encoder as well)", m.embed_dim, fc, 0)

    def agree_with_condition(self, c: ConfigDict, low_dim: Mapping[str, int], tensor: str) -> None:
        """Compares the width of observation features and time embedding with the inputs that a tensor takes."""
        m, views, frames = c.model, len(c.data.cameras), len(c.data.window.obs)
        low_dims = frames * sum(low_dim.values())
        features = views * frames * m.embed_dim + low_dims + (m.embed_dim if m.encoder.use_language else 0)
        self.agree_with_axis(
            f"the condition ({views} cameras x {frames} frames x {m.embed_dim}, low-dim {low_dims}, "
            f"text {m.encoder.use_language}, time {m.timestep_embed_dim})",
            features + m.timestep_embed_dim,
            tensor,
            1,
        )

    def agree_with_vae(self, c: ConfigDict, sets: int = 1) -> int | None:
        """Compares patches, crop and channels with the patch encoder, which reads `sets` latents at a place, and the
        VAE; returns the number of video tokens, None without a VAE."""
        m, patch = c.model, NET + "obs_patchifier.patch_encoder.weight"
        shape, (channels, factor) = self.shapes.get(patch, ()), vae_geometry(self.shapes)
        if len(shape) == 5:
            self.agree("model.latent_patch_shape", m.patch, patch, shape[2:])
        if len(shape) == 5 and channels is not None and shape[1] != sets * channels:
            times = "" if sets == 1 else f"{sets} x "
            self.lines.append(f"--input: {patch} reads {shape[1]} latent channels, but the VAE has {times}{channels}.")
        if factor is None:
            return None
        for size, part, axis in zip(c.data.crop, m.patch[1:], ("height", "width"), strict=True):
            if size % (factor * part):
                self.add(
                    "model.obs_encoder.crop_shape",
                    f"has {axis} {size}, which the VAE's factor {factor} times the patch's {part} does not divide",
                )
        rows, columns = (s // (factor * p) for s, p in zip(c.data.crop, m.patch[1:], strict=True))
        return len(c.data.cameras) * (len(c.data.window.next_obs) // m.patch[0]) * rows * columns


def refuse_backbone(official: OfficialYaml) -> None:
    """Raises UserError for an image encoder other than the ResNet."""
    if (backbone := official.get("model.obs_encoder.vision_backbone", "resnet")) != "resnet":
        raise official.error(
            "model.obs_encoder.vision_backbone", f"is {backbone!r}, which we do not model; only 'resnet' is"
        )


def refuse_towers(shapes: Shapes) -> None:
    """Raises UserError for the tensors of a CLIP model."""
    towers = [n for n in shapes if n.startswith(TEXT) and not n.startswith(TEXT_HEAD)]
    if towers:
        raise UserError(
            f"--input: it holds a CLIP tower ({len(towers)} tensors, such as {min(towers)}), which we do not model. "
            f"Text embeddings are inputs here: remove the tower, keep {TEXT_HEAD}weight and {TEXT_HEAD}bias, and "
            "give the model embeddings made by the same CLIP."
        )


def require_names(shapes: Shapes, prefix: str, examples: tuple[str, ...]) -> None:
    """Raises UserError unless some tensor's name begins with `prefix`; `examples` are names that are expected."""
    if not any(name.startswith(prefix) for name in shapes):
        raise UserError(
            f"--input: expected the names of an official state dict, such as {' and '.join(examples)}, but "
            f"none of its {len(shapes)} names starts with {prefix}; its first are {', '.join(sorted(shapes)[:3])}. "
            "Prefixes of wrappers ('module.', '_orig_mod.', 'model.') were taken off; remove any other first."
        )


@dataclass(frozen=True)
class Data:
    """The data that a configuration describes; fields as in `OfficialRun`. normalizes: {`action`, `lowdim`: switch}."""

    cameras: dict[str, tuple[int, int]]
    low_dim_seen: dict[str, int]
    action_dim: int
    normalizes: dict[str, bool | None]


def read_data(official: OfficialYaml, c: ConfigDict) -> Data:
    """Name, cameras, images and normalisation of the data, and the optimiser, into the config; the rest is returned."""
    cameras, low_dim_seen, action_dim = shape_meta(official)
    c.data.path = str(official.optional("dataset.name", "official"))
    c.data.cameras = tuple(sorted(cameras))
    c.data.last_action = "keep"
    read_images(official, c, cameras)
    read_optimizer(official, c)
    normalizes = {name: _says(official, f"dataset.normalize_{name}") for name in ("action", "lowdim")}
    c.data.normalize = "minmax" if normalizes["action"] else "none"
    return Data(cameras, low_dim_seen, action_dim, normalizes)


def read_conditions(
    official: OfficialYaml, c: ConfigDict, data: Data, conflicts: Conflicts
) -> tuple[dict[str, int], int]:
    """Switches of the observation encoder's low-dim keys and text into the config; sizes of the keys, and text_dim."""
    c.model.encoder.use_low_dim = typed(official, "model.obs_encoder.use_low_dim", bool, False)
    c.model.encoder.use_language = typed(official, "model.obs_encoder.use_language", bool, False)
    low_dim = dict(sorted(data.low_dim_seen.items())) if c.model.encoder.use_low_dim else {}
    c.data.low_dim = tuple(low_dim)
    if not c.model.encoder.use_language:
        return low_dim, 0
    c.data.text = "text"
    if TEXT_HEAD + "weight" not in conflicts.shapes:
        message = f"is true, but --input holds no {TEXT_HEAD}weight, the projection of a text embedding"
        conflicts.add("model.obs_encoder.use_language", message)
    return low_dim, dim(conflicts.shapes, TEXT_HEAD + "weight", 1, rank=2) or CLIP_DIM


def normalized(data: Data, low_dim: Mapping[str, int]) -> dict[str, bool | None]:
    """`OfficialRun.normalized` of a run that reads the keys `low_dim`."""
    return {"action": data.normalizes["action"], **dict.fromkeys(low_dim, data.normalizes["lowdim"])}


def _says(official: OfficialYaml, field: str) -> bool | None:
    """A switch of the YAML; None where it is absent."""
    return None if official.get(field, None) is None else typed(official, field, bool)


def shape_meta(official: OfficialYaml) -> tuple[dict[str, tuple[int, int]], dict[str, int], int]:
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


def read_window(official: OfficialYaml, c: ConfigDict, *, predicts_frames: bool = True) -> None:
    """obs 0..To-1, actions To-1..To+Ta-2, and where frames are predicted, next_obs from To+Ta-1 to the end (the paper:
    0,1 | 1..16 | 17,18)."""
    frames = typed(official, "num_frames", int)
    obs = typed(official, "obs_num_frames", int)
    actions = typed(official, "model.action_len", int)
    inner = official.get("model.obs_encoder.num_frames", obs)
    if inner != obs:
        raise official.error("model.obs_encoder.num_frames", f"is {inner}, but obs_num_frames is {obs}")
    first_next = obs - 1 + actions
    expected = first_next + obs if predicts_frames else first_next
    if frames != expected:
        purpose = "predicts as many frames as it sees" if predicts_frames else "reads no frame after its actions"
        raise official.error(
            "num_frames",
            f"is {frames}, which leaves {frames - first_next} frames after obs_num_frames={obs} and "
            f"model.action_len={actions}; the model {purpose}, so it should be {expected}",
        )
    c.data.window.obs = tuple(range(obs))
    c.data.window.action = tuple(range(obs - 1, first_next))
    c.data.window.next_obs = tuple(range(first_next, frames))


def read_images(official: OfficialYaml, c: ConfigDict, cameras: dict[str, tuple[int, int]]) -> None:
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


def read_diffusion(official: OfficialYaml, c: ConfigDict) -> None:
    c.diffusion.num_train_steps = typed(official, "model.num_train_steps", int)
    c.diffusion.num_inference_steps = typed(official, "model.num_inference_steps", int)
    c.diffusion.beta_schedule = typed(official, "model.beta_schedule", str)
    clip = 1.0 if typed(official, "model.clip_sample", bool) else 0.0
    for modality in c.diffusion.clip:
        c.diffusion.clip[modality] = clip


def read_optimizer(official: OfficialYaml, c: ConfigDict) -> None:
    """The optimiser's numbers, where they can be read: they describe how the weights were made."""
    for field, ours in {"lr": "learning_rate", "eps": "eps", "weight_decay": "weight_decay"}.items():
        if (value := official.optional(f"optimizer.{field}", None)) is not None:
            c.optimizer[ours] = number(official, f"optimizer.{field}", value)
    betas = official.optional("optimizer.betas", None)
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != 2:
            raise official.error("optimizer.betas", f"should be a list of two numbers, found {betas!r:.60}")
        c.optimizer.b1, c.optimizer.b2 = (number(official, "optimizer.betas", b) for b in betas)


def resnet_sizes(shapes: Shapes, resnet: str, stage_sizes: tuple[int, ...], width: int) -> tuple[tuple[int, ...], int]:
    """Blocks per stage and first width of the ResNet whose tensors' names begin with `resnet`; the given values where
    the tensors do not tell."""
    blocks: dict[int, int] = {}
    for name in shapes:
        if match := re.match(re.escape(resnet) + r"layer(\d+)\.(\d+)\.(?:conv|bn)[12]\.(?:weight|bias)$", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    if sorted(blocks) == list(range(1, len(blocks) + 1)) and blocks:
        stage_sizes = tuple(blocks[s] for s in sorted(blocks))
    # What most of the tensors that show it say, so that one of a wrong shape is named rather than believed.
    known = [shapes.get(f"{resnet}{name}", ()) for name in ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")]
    counted = Counter(shape[0] for shape in known if shape and shape[0] > 0 and shape[0] % 16 == 0).most_common(1)
    return stage_sizes, counted[0][0] if counted else width


def vae_geometry(shapes: Shapes) -> tuple[int | None, int | None]:
    """Latent channels and pixels per latent of the VAE's tensors; None without any."""
    vae = {name.removeprefix(VAE): shape for name, shape in shapes.items() if name.startswith(VAE)}
    if not vae:
        return None, None
    config = infer_config(vae)
    return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)


def dim(shapes: Shapes, name: str, axis: int, rank: int = 2) -> int | None:
    """One axis of a tensor; None when the tensor is absent or of another rank (reported elsewhere)."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == rank else None
