"""Diffusion Policy's checkpoints of the Unified World Models code: names and layouts of the parameters, and the saved
configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from uwm_jax.systems import fields
from uwm_jax.torch_bridge import layout, names, official_config
from uwm_jax.torch_bridge.layout import Entry, EntryOf, Path, Shape
from uwm_jax.torch_bridge.official_config import NET, Conflicts, Official, OfficialRun, Shapes, dim
from uwm_jax.torch_bridge.official_yaml import OfficialYaml, number, typed

if TYPE_CHECKING:
    from uwm_jax.systems.dp.system import DP

RESNET = "obs_encoder.rgb_encoder"
DIFFUSION, FLOW = "models.dp.ImageDiffusionPolicy", "models.dp.ImageFlowPolicy"  # values of model._target_
TRANSFORMER, UNET = "models.dp.TransformerNoisePredictionNet", "models.dp.UnetNoisePredictionNet"
_FIELDS = "model.noise_pred_net."

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
        return names.of_obs_encoder(path, RESNET)
    if predictor != "unet":
        return names.of_network(path, layer, _TRANSFORMER)
    _, first, *parts, leaf = path
    level = next(re.sub(ours, theirs, first) for ours, theirs in _LEVELS if re.fullmatch(ours, first))
    leaf = {"kernel": "weight", "scale": "weight", "frequency": "0.W"}.get(leaf, leaf)
    return ".".join([path[0], level, *(_PARTS[part] for part in parts), leaf])


def read(official: OfficialYaml, shapes: Shapes, c: ConfigDict) -> OfficialRun:
    """An official run; arguments, errors and result as `Official.read` says."""
    official_config.refuse_backbone(official)
    if not typed(official, "model.obs_encoder.imagenet_norm", bool, True):
        raise official.error(
            "model.obs_encoder.imagenet_norm",
            "is false, which we do not model; ImageNet normalisation is part of the ResNet",
        )
    official_config.refuse_towers(shapes)
    examples = (f"{NET}input_encoder.0.weight", f"{RESNET}.fc.weight")
    official_config.require_names(shapes, NET, examples)
    conflicts = Conflicts(official, shapes)
    data = official_config.read_data(official, c)
    official_config.read_window(official, c, predicts_frames=False)
    low_dim, text_dim = official_config.read_conditions(official, c, data, conflicts)
    _read_diffusion(official, c)
    c.model.embed_dim = typed(official, "model.obs_encoder.embed_dim", int, 768)
    kind = official.get(_FIELDS + "_target_")
    if kind not in (TRANSFORMER, UNET):
        raise official.error(_FIELDS + "_target_", f"is {kind!r}; only {TRANSFORMER!r} and {UNET!r} can be converted")
    (_read_transformer if kind == TRANSFORMER else _read_unet)(official, c, low_dim, data.action_dim, conflicts)
    conflicts.agree_with_resnet(c.model, RESNET + ".", fields="model.obs_encoder.")
    sizes = data.cameras, low_dim, data.low_dim_seen, data.action_dim, text_dim
    return OfficialRun(c, *sizes, official_config.normalized(data, low_dim), tuple(conflicts.lines))


def _read_diffusion(official: OfficialYaml, c: ConfigDict) -> None:
    """The official class has no fields for the schedule and clipping: they are those of UWM's runs, our defaults."""
    d = c.diffusion
    d.num_train_steps = typed(official, "model.num_train_steps", int)
    d.num_inference_steps = typed(official, "model.num_inference_steps", int)
    d.num_train_noise_samples = typed(official, "model.num_train_noise_samples", int, 1)
    if official.get("model._target_", DIFFUSION) == FLOW:
        d.kind = "flow"
        d.timeshift = number(official, "model.timeshift", official.get("model.timeshift", 1.0))


def _read_transformer(
    official: OfficialYaml, c: ConfigDict, low_dim: dict[str, int], action_dim: int, conflicts: Conflicts
) -> None:
    m = c.model
    width = typed(official, _FIELDS + "embed_dim", int)
    if width != m.embed_dim:
        raise official.error(
            _FIELDS + "embed_dim",
            f"is {width}, and model.obs_encoder.embed_dim is {m.embed_dim}; we model networks of one width, as all "
            "shipped configurations have it",
        )
    for field in ("num_heads", "depth", "timestep_embed_dim", "mlp_ratio"):
        m[field] = typed(official, _FIELDS + field, int)
    m.qkv_bias = typed(official, _FIELDS + "qkv_bias", bool, True)
    conflicts.agree_with_blocks(m, _FIELDS)
    conflicts.agree_with_axis("model.action_len", len(c.data.window.action), NET + "pos_embed", 1, rank=3)
    conflicts.agree_with_axis("model.action_dim", action_dim, NET + "input_encoder.0.weight", 1)
    time = NET + "timestep_encoder.3.weight"
    conflicts.agree_with_axis(_FIELDS + "timestep_embed_dim", m.timestep_embed_dim, time, 0)
    conflicts.agree_with_condition(c, low_dim, NET + "head.adaLN_modulation.1.weight")


def _read_unet(
    official: OfficialYaml, c: ConfigDict, low_dim: dict[str, int], action_dim: int, conflicts: Conflicts
) -> None:
    m, u = c.model, c.model.unet
    m.predictor = "unet"
    if official.get(_FIELDS + "local_cond_dim", None) is not None:
        raise official.error(_FIELDS + "local_cond_dim", "is set, but we do not model conditions of single steps")
    levels = official.get(_FIELDS + "down_dims", list(u.down_dims))
    if not isinstance(levels, list) or not levels or not all(type(n) is int and n > 0 for n in levels):
        raise official.error(_FIELDS + "down_dims", f"should be a list of positive integers, found {levels!r:.60}")
    u.down_dims = tuple(levels)
    u.kernel_size = typed(official, _FIELDS + "kernel_size", int, u.kernel_size)
    u.groups = typed(official, _FIELDS + "n_groups", int, u.groups)
    u.fourier = typed(official, _FIELDS + "continuous_diffusion_step", bool, False)
    m.timestep_embed_dim = typed(official, _FIELDS + "diffusion_step_embed_dim", int, m.timestep_embed_dim)
    first = NET + "down_modules.{}.0.blocks.0.block.0.weight"
    found = [dim(conflicts.shapes, first.format(i), 0, rank=3) for i in range(len(levels) + 1)]
    known = tuple(n for n in found if n is not None)
    conflicts.agree(_FIELDS + "down_dims", u.down_dims, first.format("*"), known or None)
    conflicts.agree_with_axis(_FIELDS + "kernel_size", u.kernel_size, first.format(0), 2, rank=3)
    conflicts.agree_with_axis("model.action_dim", action_dim, NET + "final_conv.1.weight", 0, rank=3)
    time = NET + "diffusion_step_encoder."
    conflicts.agree_with_axis(_FIELDS + "diffusion_step_embed_dim", m.timestep_embed_dim, time + "3.weight", 0)
    if time + "1.weight" in conflicts.shapes:
        has = time + "0.W" in conflicts.shapes
        conflicts.agree(_FIELDS + "continuous_diffusion_step", u.fourier, time + "0.W", has)
    conflicts.agree_with_condition(c, low_dim, NET + "mid_modules.0.cond_encoder.1.weight")


def describe(system: DP) -> dict[str, Any]:
    """Meaning of the tensors, besides what all systems say: enough to sample without our code."""
    c, schedule, flow = system.config, system.schedule, system.flow
    of_sampler: dict[str, Any] = {"timesteps": (flow or schedule).timesteps.tolist()}
    if flow:
        of_sampler["knots"] = [float(knot) for knot in flow.knots]
    else:
        of_sampler["previous_timesteps"] = schedule.previous_timesteps.tolist()
        of_sampler["alphas_cumprod"] = [float(a) for a in schedule.alphas_cumprod]
    return {"diffusion": {**c.diffusion.to_dict(), **of_sampler}}


def _entry_of(config: ConfigDict) -> EntryOf:
    """`entry_of` for a config; raises UserError for AdaLN that official checkpoints do not have."""
    if config.model.predictor == "transformer":
        fields.require_official_adaln(config.model)
    return entry_of(config.model.predictor)


OFFICIAL = Official(
    classes=(DIFFUSION, FLOW),
    algo="dp",
    read=read,
    entry_of=_entry_of,
    describe=describe,
    runs=True,
)
