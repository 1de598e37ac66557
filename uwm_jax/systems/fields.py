"""Config fields that several systems have, with their checks: each system takes the groups that it needs.

A group is a function that adds fields to a config, and a `check_...` of their values. Choices and lower bounds of
single fields are in `CHOICES` and `AT_LEAST_ONE`; those of groups that a system has not are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from uwm_jax import codecs
from uwm_jax.codecs.base import Codec, LatentShape
from uwm_jax.errors import UserError
from uwm_jax.models import attention
from uwm_jax.models.adaln import VARIANTS

# Values that a field may take, where its type says too little.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.remat": ("none", "dots", "full"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": attention.KINDS,
    "model.adaln": VARIANTS,
    "model.encoder.pool": ("average", "flatten"),
    "model.codec.posterior": ("sample", "mode"),
    "model.codec.dtype": ("float32", "bfloat16"),
    "diffusion.beta_schedule": ("squaredcos_cap_v2", "linear", "scaled_linear"),
    "diffusion.spacing": ("leading", "trailing"),
    "diffusion.prediction.*": ("epsilon", "sample", "v"),
}

# Numbers of at least 1; the other numbers are at least 0.
AT_LEAST_ONE = (
    *("model.embed_dim", "model.depth", "model.num_heads", "model.mlp_ratio", "model.timestep_embed_dim"),
    "model.adaln_rank",
    *("model.encoder.width", "model.codec.microbatch", "diffusion.num_train_steps", "diffusion.num_inference_steps"),
)

# Fields that change how a trained diffusion model samples, and its precision and compilation.
SAMPLING = (
    *("diffusion.spacing", "diffusion.num_inference_steps", "diffusion.hide_at", "diffusion.clip.*"),
    *("model.dtype", "model.attention", "model.scan_blocks", "model.codec.dtype", "model.codec.microbatch"),
)

# Fields that may be None, and their types where they are not.
OPTIONAL: dict[str, type] = {"model.scan_blocks": bool}


def require(holds: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not holds:
        raise UserError(message)


# --- transformer ---------------------------------------------------------------------------------------


def add_transformer(m: ConfigDict) -> None:
    """A transformer of stacked blocks, and the precision of all products."""
    m.embed_dim = 768  # width of the tokens
    m.depth = 12  # number of blocks
    m.num_heads = 12  # attention heads of a block
    m.mlp_ratio = 4  # hidden units of a block's MLP, in widths of the tokens
    m.qkv_bias = True  # whether queries, keys and values have biases
    # One compiled block in a loop, or (False) one after the other: same parameters, same outputs. None: the loop, which
    # compiles faster, but on a single CPU device, where copies of parameters make it slower (uwm_jax/models/layers.py).
    m.scan_blocks = placeholder(bool)
    # what the backward pass computes again to save memory: none, dots (all but products), full
    m.remat = "none"
    m.dtype = "float32"  # float32 (exact products) or bfloat16 (fp32 norms, softmax, modulation, loss)
    # of all blocks: xla, or cudnn (fused kernels of NVIDIA GPUs, for dtype bfloat16; the same up to rounding)
    m.attention = "xla"


def add_adaln(m: ConfigDict) -> None:
    """How the condition modulates the blocks of a transformer."""
    # AdaLN of the blocks: official (a kernel in each, most of all parameters), shared (one kernel for all and an offset
    # in each, as in PixArt) or low_rank (the product of two narrow kernels in each)
    m.adaln = "official"
    m.adaln_rank = 64  # width between the two kernels of low_rank


ADALN = ("model.adaln", "model.adaln_rank")  # which decide shapes of parameters


def rank_is_idle(flat: Mapping[str, Any]) -> bool:
    """Whether `model.adaln_rank` has no effect in a flat config."""
    return flat["model.adaln"] != "low_rank"


def require_official_adaln(m: ConfigDict) -> None:
    """Raises UserError where the blocks have no AdaLN kernels of their own, as official checkpoints do."""
    require(
        m.adaln == "official",
        f"config.model.adaln={m.adaln!r}: official checkpoints have an AdaLN kernel in every block "
        "(config.model.adaln='official'), so these parameters cannot be written in their layout.",
    )


def check_transformer(m: ConfigDict) -> None:
    require(
        m.embed_dim % m.num_heads == 0,
        f"config.model.num_heads={m.num_heads} does not divide config.model.embed_dim={m.embed_dim}.",
    )
    require(
        m.attention != "cudnn" or m.dtype == "bfloat16",
        f"config.model.attention='cudnn' needs config.model.dtype='bfloat16', found {m.dtype!r}. Exact products need "
        "attention='xla'.",
    )


def check_timestep_width(m: ConfigDict) -> None:
    require(
        m.timestep_embed_dim % 2 == 0 and m.timestep_embed_dim >= 4,
        f"config.model.timestep_embed_dim: expected an even number of at least 4, found {m.timestep_embed_dim}.",
    )


# --- image encoder -------------------------------------------------------------------------------------


def add_resnet_encoder(m: ConfigDict) -> None:
    """An observation encoder: one ResNet for all frames, optionally low-dimensional keys and text."""
    m.encoder = ConfigDict()
    m.encoder.stage_sizes = (2, 2, 2, 2)  # basic blocks per stage of the ResNet; these are ResNet-18's
    m.encoder.width = 64  # channels of the first stage, doubled per stage
    m.encoder.pool = "average"  # of the last feature map: average, or flatten (keeps its layout; for small images)
    m.encoder.use_low_dim = False  # whether the low-dimensional observation conditions the network
    m.encoder.use_language = False  # whether the text embedding conditions the network
    # ImageNet weights to start from: safetensors file, its folder, or hub name[@revision][/file]; "" = none
    m.encoder.imagenet_weights = ""


def check_resnet_encoder(c: ConfigDict) -> None:
    e, d = c.model.encoder, c.data
    require(
        e.width > 0 and e.width % 16 == 0,
        f"config.model.encoder.width: expected a multiple of 16 (GroupNorm's channels per group), found {e.width}.",
    )
    require(
        len(e.stage_sizes) > 0 and min(e.stage_sizes) > 0,
        f"config.model.encoder.stage_sizes: expected positive integers, found {e.stage_sizes}.",
    )
    require(
        not e.use_low_dim or len(d.low_dim) > 0,
        "config.model.encoder.use_low_dim=True needs keys in config.data.low_dim.",
    )
    require(
        not e.use_language or bool(d.text),
        "config.model.encoder.use_language=True needs config.data.text, the key of a text embedding, or of a string "
        "with config.data.text_table.",
    )


# --- codec ---------------------------------------------------------------------------------------------


def add_codec(m: ConfigDict) -> None:
    """The frozen codec between frames and latents."""
    m.codec = codecs.fields()


def latent_shape(c: ConfigDict, codec: Codec, num_views: int, num_frames: int) -> LatentShape:
    """(V, T, h, w, C) of the latents of an observation, which patches of `c.model.patch` cut into tokens.

    Raises:
      UserError: the crop does not suit the codec, or the patch does not divide the latents.
    """
    crop, patch = c.data.crop, c.model.patch
    try:
        shape = codec.latent_shape(num_views, num_frames, *crop)
    except ValueError as e:
        raise UserError(f"config.data.crop={crop} does not suit the codec: {e}.") from e
    require(
        not any(n % p for n, p in zip(shape[1:4], patch, strict=True)),
        f"config.model.patch={patch} does not divide the latents' (frames, rows, columns) "
        f"{shape[1:4]}, which follow from config.data.crop={crop} and the codec.",
    )
    return shape


def check_patch(m: ConfigDict) -> None:
    require(
        len(m.patch) == 3 and min(m.patch) > 0,
        f"config.model.patch: expected 3 positive integers, found {m.patch}.",
    )


# --- diffusion -----------------------------------------------------------------------------------------


def add_ddim(c: ConfigDict, modalities: Iterable[str]) -> None:
    """A DDIM schedule and the predictions of some modalities; `c.model.codec`, where there is one, sets a clip."""
    c.diffusion = ConfigDict()
    c.diffusion.num_train_steps = 100  # diffusion timesteps T
    c.diffusion.num_inference_steps = 10  # network evaluations of a sample
    c.diffusion.beta_schedule = "squaredcos_cap_v2"  # noise schedule: squaredcos_cap_v2, linear, scaled_linear
    c.diffusion.spacing = "leading"  # timesteps of the sampler: leading (official: 90, ..., 0) or trailing (99, ..., 9)
    c.diffusion.prediction = ConfigDict({m: "epsilon" for m in modalities})  # network output: epsilon, sample, v
    c.diffusion.clip = ConfigDict({m: 1.0 for m in modalities})  # range of predicted x0; 0 = no clipping
    if "next_obs" in c.diffusion.clip:
        c.diffusion.clip.next_obs = follows(c.model.codec, "name", _clip_of_codec)


def check_ddim(c: ConfigDict) -> None:
    require(
        c.diffusion.num_inference_steps <= c.diffusion.num_train_steps,
        f"config.diffusion.num_inference_steps={c.diffusion.num_inference_steps} exceeds "
        f"num_train_steps={c.diffusion.num_train_steps}.",
    )


def about_clip(config: ConfigDict) -> list[str]:
    """A line where `diffusion.clip.next_obs` cuts off the codec's latents, which no error tells."""
    codec = codecs.of_config(config)
    if codec is None or not 0 < config.diffusion.clip.next_obs < codec.smallest_clip:
        return []
    return [
        f"config.diffusion.clip.next_obs={config.diffusion.clip.next_obs:g} cuts off latents of the codec "
        f"{codec.name}, whose standard deviation is {codec.latent_rms:g}: sampled frames lose detail. "
        f"--config.diffusion.clip.next_obs={codec.clip:g} does not, also with a trained model."
    ]


# --- windows -------------------------------------------------------------------------------------------


def check_window(c: ConfigDict, groups: Iterable[str], absent: Iterable[str] = ()) -> None:
    """Refuses a window that lacks a group which the system reads, or has one that it does not."""
    w = c.data.window
    for name in groups:
        require(
            len(w[name]) > 0,
            f"config.data.window.{name}: expected at least one step, since config.system={c.system!r} reads {name}.",
        )
    for name in absent:
        require(
            len(w[name]) == 0,
            f"config.data.window.{name}={w[name]}: config.system={c.system!r} reads no {name}; leave it empty: ().",
        )


def check_two_frame_groups(c: ConfigDict) -> None:
    w = c.data.window
    require(
        len(w.obs) == len(w.next_obs),
        f"config.data.window.next_obs has {len(w.next_obs)} frames and config.data.window.obs {len(w.obs)}; both "
        "need the same number, since one augmentation and one latent shape serve both.",
    )


def check_cameras(c: ConfigDict) -> None:
    require(len(c.data.cameras) > 0, "config.data.cameras: expected at least one camera key.")


# --- values that follow others ---------------------------------------------------------------------------


class _Operation(NamedTuple):
    """An operation of `ml_collections` on a reference: `fn(value, *args)`."""

    fn: Callable[..., Any]
    args: list[Any]


def follows(node: ConfigDict, field: str, value_of: Callable[[Any, Any], Any]) -> FieldReference:
    """A value that `value_of(None, node[field])` gives, whenever it is read and until it is set itself."""
    return FieldReference(value_of(None, node[field]), op=_Operation(value_of, [node.get_oneway_ref(field)]))


def _clip_of_codec(_: Any, name: str) -> float:
    return codecs.get(name).clip if name in codecs.names() else 1.0
