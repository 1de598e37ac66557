"""The configuration schema: every field, its default and its meaning, checked once at the edge.

A file under `configs/` starts from `base()` and changes fields; the command line changes more
(`--config.batch_size=64`). `validate` is called once by each command and is the only place where a
combination of fields is judged, so that no module below re-checks its inputs.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from uwm_jax.diffusion.modes import MODALITIES
from uwm_jax.errors import UserError


def base() -> ConfigDict:
    """The paper's model on DROID-like data (`configs/droid.py` runs it); other configs edit it."""
    c = ConfigDict()
    c.seed = 0
    c.total_steps = 100_000
    c.batch_size = 36  # global, over all devices and processes
    c.accumulation_steps = 1  # parts that a batch is computed in, one after the other, to save memory
    c.log_every = 50
    c.hang_seconds = 900.0  # a step that takes longer prints the stacks of all threads; 0 = no watchdog
    c.compilation_cache_dir = ""  # keeps compiled programs for the next start; "" = no cache
    c.init_from = ""  # DIR[@step]: finetuning starts from the parameters and normaliser of this workdir
    c.init_from_skip = ()  # patterns of parameters that start fresh, e.g. ("*/action_encoder/*",)

    c.model = ConfigDict()
    c.model.embed_dim = 768
    c.model.depth = 12
    c.model.num_heads = 12
    c.model.mlp_ratio = 4
    c.model.qkv_bias = True
    c.model.num_registers = 8
    c.model.timestep_embed_dim = 512
    c.model.patch = (2, 4, 4)  # latent frames, rows, columns per video token
    c.model.scan_blocks = True  # False unrolls the blocks: same parameters, same outputs
    c.model.remat = "none"  # none, dots, full
    c.model.dtype = "float32"  # float32 (exact products) or bfloat16 (fp32 norms, softmax, modulation, loss)

    c.model.encoder = ConfigDict()
    c.model.encoder.stage_sizes = (2, 2, 2, 2)  # basic blocks per stage: ResNet-18
    c.model.encoder.width = 64  # channels of the first stage, doubled per stage
    c.model.encoder.pool = "average"  # average, or flatten (keeps the map's layout; small images)
    c.model.encoder.use_low_dim = False
    c.model.encoder.use_language = False
    c.model.encoder.imagenet_weights = ""  # torchvision-named safetensors, or hub "owner/name[/file]"

    c.model.codec = ConfigDict()
    c.model.codec.name = "vae"  # vae, pixels, pca
    c.model.codec.vae = "stabilityai/sdxl-vae"  # diffusers folder or hub name
    c.model.codec.microbatch = 72  # frames per pass through the VAE, on each device
    c.model.codec.posterior = "sample"  # sample (official) or mode, in training
    c.model.codec.dtype = "float32"  # bfloat16 keeps GroupNorm in fp32

    c.diffusion = ConfigDict()
    c.diffusion.num_train_steps = 100
    c.diffusion.num_inference_steps = 10
    c.diffusion.beta_schedule = "squaredcos_cap_v2"  # or linear, scaled_linear
    c.diffusion.spacing = "leading"  # leading (official: 90..0, masked at 90) or trailing (99..9, masked at 99)
    c.diffusion.prediction = ConfigDict({m: "epsilon" for m in MODALITIES})  # epsilon, sample, v
    c.diffusion.clip = ConfigDict({m: 1.0 for m in MODALITIES})  # range of predicted x0; 0 = no clipping
    c.diffusion.next_obs_timesteps = "uniform"  # or high_noise: half of the draws from the noisiest quarter

    c.loss = ConfigDict()
    c.loss.weights = ConfigDict({m: 1.0 for m in MODALITIES})
    c.loss.action_free = "kept"  # kept (official: they predict the noise they were given) or dropped

    c.data = ConfigDict()
    c.data.path = "droid"  # under $UWM_DATA_DIR (default data/) unless absolute
    c.data.split = "train"  # the dataset's own split; validation episodes are held out of it
    c.data.sources = ConfigDict()  # {name: source()} of a mixture; empty = path alone
    c.data.cameras = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    c.data.low_dim = ()  # observation keys, e.g. ("gripper_position",)
    c.data.text = ""  # step key of a precomputed text embedding
    c.data.action = (("action", "identity"),)  # (step key, transform), joined in this order
    c.data.window = ConfigDict()
    c.data.window.obs = (0, 1)
    c.data.window.action = tuple(range(1, 17))
    c.data.window.next_obs = (17, 18)
    c.data.window.pad = "none"  # none: windows lie inside the episode; edge: repeat its first and last step
    c.data.val_ratio = 0.05  # share of episodes held out
    c.data.normalize = "minmax"  # minmax, quantile (1 % to 99 %), none
    c.data.num_streams = 1024
    c.data.num_threads = 4
    c.data.prefetch = 4  # batches ready ahead of the device
    c.data.resize = (240, 320)
    c.data.crop = (224, 224)
    c.data.augment = ConfigDict()
    c.data.augment.random_crop = True
    c.data.augment.brightness = 0.2
    c.data.augment.contrast = 0.2
    c.data.augment.saturation = 0.2
    c.data.augment.hue = 0.2
    c.data.augment.draw = "sample"  # one draw per sample and view, or (official) per batch and view

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "constant"  # constant or cosine (to 0 at total_steps)
    c.optimizer.warmup_steps = 0  # linear; capped by total_steps
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 1e-6
    c.optimizer.clip_norm = 0.0  # global L2; 0 = no clipping
    c.optimizer.ema_decay = 0.0  # 0 = no average; else used by evaluation and sampling

    c.mesh = ConfigDict()
    c.mesh.data = -1  # rows of the batch over devices; -1 = whatever devices are left
    c.mesh.fsdp = 1  # rows of the batch, and parameters with all that belongs to them
    c.mesh.tensor = 1  # heads, hidden units and channels of the products
    c.mesh.rules = "uwm"  # the table of configs/meshes/ that says which array lies on which axis, or a FILE.py

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10_000
    c.checkpoint.keep = 3

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between losses on held-out windows; 0 = never
    c.eval.num_windows = 256
    return c


def source(**fields: Any) -> ConfigDict:
    """One source of `config.data.sources`; `fields` change the defaults."""
    s = ConfigDict()
    s.path = ""  # as config.data.path, which "" takes
    s.split = ""  # as config.data.split, which "" takes
    s.weight = 1.0  # share of the samples, relative to the other sources'; may change when a run continues
    s.use_actions = True  # False: robot data or video that only shows; the rows have action_mask False
    s.include = ()  # only episodes whose path holds one of these texts
    s.exclude = ()  # no episode whose path holds one of these texts
    s.path_key = "episode_metadata/file_path"  # the episode's path, for include and exclude
    s.cameras = ()  # this source's keys for config.data.cameras, in that order; () = the same keys
    s.fill_views = (
        "same"  # fewer cameras than the model has: same (copied), none (one random view), random (other clips)
    )
    s.action = ()  # as config.data.action, which () takes
    s.update(fields)
    return s


# Values that a field may take, where its type says too little.
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.remat": ("none", "dots", "full"),
    "model.dtype": ("float32", "bfloat16"),
    "model.encoder.pool": ("average", "flatten"),
    "model.codec.name": ("vae", "pixels", "pca"),
    "model.codec.posterior": ("sample", "mode"),
    "model.codec.dtype": ("float32", "bfloat16"),
    "diffusion.beta_schedule": ("squaredcos_cap_v2", "linear", "scaled_linear"),
    "diffusion.spacing": ("leading", "trailing"),
    "diffusion.prediction.action": ("epsilon", "sample", "v"),
    "diffusion.prediction.next_obs": ("epsilon", "sample", "v"),
    "diffusion.next_obs_timesteps": ("uniform", "high_noise"),
    "loss.action_free": ("kept", "dropped"),
    "data.window.pad": ("none", "edge"),
    "data.normalize": ("minmax", "quantile", "none"),
    "data.augment.draw": ("sample", "batch"),
    "optimizer.schedule": ("constant", "cosine"),
}

# Smallest value of a number; everything named here is otherwise at least 0.
_AT_LEAST_ONE = (
    "total_steps batch_size accumulation_steps log_every mesh.fsdp mesh.tensor "
    "model.embed_dim model.depth model.num_heads model.mlp_ratio "
    "model.timestep_embed_dim model.encoder.width model.codec.microbatch diffusion.num_train_steps "
    "diffusion.num_inference_steps data.num_streams data.prefetch checkpoint.every "
    "checkpoint.keep eval.num_windows"
).split()


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"model.depth": 12, ...}` of every leaf."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Runs `get_config([argument])` of `FILE.py[:argument]`, applies overrides and validates.

    Raises UserError for a missing file, a file without `get_config`, an unknown field or a bad value.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        shipped = sorted(str(p) for p in Path("configs").glob("*.py") if p.stem != "__init__")
        raise UserError(
            f"--config: there is no Python file {path!r}. Shipped configs: {', '.join(shipped) or 'none here'}."
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except Exception as e:  # whatever a user's file does wrong
        raise UserError(
            f"--config: {path} does not load ({type(e).__name__}: {e}). Expected a Python file whose "
            "get_config([argument]) returns an ml_collections ConfigDict made from uwm_jax.config.base()."
        ) from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config of {path} returned {config!r}, expected a ConfigDict.")
    apply_overrides(config, overrides)
    validate(config)
    return config


def apply_overrides(config: ConfigDict, overrides: Iterable[tuple[str, str]]) -> None:
    """Sets `("model.depth", "6")` pairs in place, each parsed to the type of the field's present value."""
    for name, text in overrides:
        flat = flatten(config)
        if name not in flat:
            raise UserError(f"--config.{name}: there is no such field.{_suggest(name, flat)}")
        node = config
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node[parent]
        node[leaf] = _parse(name, text, flat[name])


def _parse(name: str, text: str, like: Any) -> Any:
    try:
        if isinstance(like, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(like, int):
            return int(text.replace("_", ""))
        if isinstance(like, float):
            return float(text)
        if isinstance(like, tuple):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = tuple(part.strip() for part in text.split(",") if part.strip())
            return _tuples(value) if isinstance(value, list | tuple) else (value,)
        return text
    except (KeyError, ValueError) as e:
        raise UserError(f"--config.{name}: expected {_type_name(like)} such as {like!r}, found {text!r}.") from e


def _type_name(value: Any) -> str:
    names = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "tuple": "a list",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:2]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str, where: str) -> ConfigDict:
    """A stored `config.json`; fields that it lacks take their defaults, unknown ones are named."""
    try:
        stored = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e}).") from e
    config = base()
    if isinstance(stored, Mapping) and isinstance(stored.get("data"), Mapping):
        sources = stored["data"].get("sources", {})
        config.data.sources = ConfigDict({name: source() for name in sources if isinstance(sources, Mapping)})
    known = flatten(config)

    def fill(node: ConfigDict, values: Mapping[str, Any], prefix: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: expected fields under {prefix.rstrip('.') or 'the top'!r}, found {values!r}.")
        for key, value in values.items():
            if key not in node:
                raise UserError(f"{where}: unknown field {prefix + key!r}.{_suggest(prefix + key, known)}")
            if isinstance(node[key], ConfigDict):
                fill(node[key], value, f"{prefix}{key}.")
            else:
                node[key] = _tuples(value)

    fill(config, stored, "")
    validate(config)
    return config


def read(workdir: str | os.PathLike[str], overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The config of a workdir, with overrides on top."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir: {str(workdir)!r} holds no config.json; it is not a run's directory.")
    config = from_json(path.read_text(), str(path))
    apply_overrides(config, overrides)
    validate(config)
    return config


def validate(config: ConfigDict) -> None:
    """Raises UserError that names the first field that is missing, unknown, mistyped or inconsistent."""
    defaults = base()
    if isinstance(config.get("data"), ConfigDict) and isinstance(config.data.get("sources"), ConfigDict):
        defaults.data.sources = ConfigDict({name: source() for name in config.data.sources})
    reference, flat = flatten(defaults), flatten(config)
    for name in flat.keys() - reference.keys():
        raise UserError(f"config.{name}: there is no such field.{_suggest(name, reference)}")
    for name, default in reference.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing: start the config from uwm_jax.config.base().")
        value = flat[name]
        whole = isinstance(default, float) and type(value) is int  # 1 for 1.0
        if type(value) is not type(default) and not whole:
            raise UserError(f"config.{name}: expected {_type_name(default)}, found {value!r}.")
        if isinstance(value, int | float) and name != "mesh.data":
            lowest = 1 if name in _AT_LEAST_ONE else 0
            if not value >= lowest or value == float("inf"):
                raise UserError(f"config.{name}: expected a number of at least {lowest}, found {value}.")
    choices_of = dict(_CHOICES) | {
        f"data.sources.{s}.fill_views": ("same", "none", "random") for s in config.data.sources
    }
    for name, choices in choices_of.items():
        if flat[name] not in choices:
            raise UserError(f"config.{name}: expected one of {', '.join(choices)}; found {flat[name]!r}.")
    _validate_combinations(config)


def _validate_combinations(c: ConfigDict) -> None:
    def check(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    m, d, w = c.model, c.data, c.data.window
    check(
        c.batch_size % c.accumulation_steps == 0,
        f"config.accumulation_steps={c.accumulation_steps} does not divide config.batch_size={c.batch_size}.",
    )
    _validate_sources(d, check)
    check(
        m.embed_dim % m.num_heads == 0,
        f"config.model.num_heads={m.num_heads} does not divide config.model.embed_dim={m.embed_dim}.",
    )
    check(
        m.timestep_embed_dim % 2 == 0 and m.timestep_embed_dim >= 4,
        f"config.model.timestep_embed_dim: expected an even number of at least 4, found {m.timestep_embed_dim}.",
    )
    check(
        m.encoder.width > 0 and m.encoder.width % 16 == 0,
        f"config.model.encoder.width: expected a multiple of 16 (GroupNorm's channels per group), found "
        f"{m.encoder.width}.",
    )
    check(c.seed < 2**32, f"config.seed: expected less than 2**32, found {c.seed}.")
    sizes = {"model.patch": (m.patch, 3), "data.resize": (d.resize, 2), "data.crop": (d.crop, 2)}
    for name, (value, length) in sizes.items():
        check(
            len(value) == length and all(type(v) is int and v > 0 for v in value),
            f"config.{name}: expected {length} positive whole numbers, found {value}.",
        )
    check(
        len(m.encoder.stage_sizes) > 0 and all(type(v) is int and v > 0 for v in m.encoder.stage_sizes),
        f"config.model.encoder.stage_sizes: expected positive whole numbers, found {m.encoder.stage_sizes}.",
    )
    check(
        d.crop[0] <= d.resize[0] and d.crop[1] <= d.resize[1],
        f"config.data.crop={d.crop} is larger than config.data.resize={d.resize}.",
    )
    for name in ("obs", "action", "next_obs"):
        check(
            len(w[name]) > 0 and all(type(i) is int for i in w[name]),
            f"config.data.window.{name}: expected frame indices, found {w[name]}.",
        )
        check(
            w.pad == "edge" or min(w[name]) >= 0,
            f"config.data.window.{name}: negative indices need config.data.window.pad='edge'; found {w[name]}.",
        )
    check(
        len(w.obs) == len(w.next_obs),
        f"config.data.window.next_obs has {len(w.next_obs)} frames and config.data.window.obs {len(w.obs)}; both "
        "need the same number, since one augmentation and one latent shape serve both.",
    )
    check(
        len(w.next_obs) % m.patch[0] == 0,
        f"config.model.patch[0]={m.patch[0]} does not divide the {len(w.next_obs)} frames of next_obs.",
    )
    check(len(d.cameras) > 0, "config.data.cameras: expected at least one camera key.")
    for name in ("cameras", "low_dim"):
        check(len(set(d[name])) == len(d[name]), f"config.data.{name}: a key is named twice in {d[name]}.")
    check(
        all(len(a) == 2 and all(isinstance(part, str) for part in a) for a in d.action) and len(d.action) > 0,
        f"config.data.action: expected pairs (step key, transform), found {d.action}.",
    )
    check(0.0 <= d.val_ratio < 1.0, f"config.data.val_ratio: expected 0 <= ratio < 1, found {d.val_ratio}.")
    check(
        not m.encoder.use_low_dim or len(d.low_dim) > 0,
        "config.model.encoder.use_low_dim=True needs keys in config.data.low_dim.",
    )
    check(
        not m.encoder.use_language or bool(d.text),
        "config.model.encoder.use_language=True needs config.data.text, the key of a text embedding.",
    )
    check(
        c.diffusion.num_inference_steps <= c.diffusion.num_train_steps,
        f"config.diffusion.num_inference_steps={c.diffusion.num_inference_steps} exceeds "
        f"num_train_steps={c.diffusion.num_train_steps}.",
    )
    for name in ("b1", "b2", "ema_decay"):
        check(c.optimizer[name] < 1.0, f"config.optimizer.{name}: expected less than 1, found {c.optimizer[name]}.")
    check(d.augment.hue <= 0.5, f"config.data.augment.hue: expected at most 0.5, found {d.augment.hue}.")
    for name in ("brightness", "contrast", "saturation"):
        check(
            d.augment[name] <= 1.0,
            f"config.data.augment.{name}: expected at most 1, found {d.augment[name]}.",
        )
    check(
        c.mesh.data == -1 or c.mesh.data > 0,
        f"config.mesh.data: expected a number of devices or -1 for all, found {c.mesh.data}.",
    )
    check(bool(c.mesh.rules), "config.mesh.rules: expected the name of a table in configs/meshes/, or a FILE.py.")
    check(
        not c.init_from_skip or bool(c.init_from),
        f"config.init_from_skip={c.init_from_skip} means nothing without config.init_from.",
    )


def _validate_sources(d: ConfigDict, check: Callable[[bool, str], None]) -> None:
    check(bool(d.path) or bool(d.sources), "config.data.path: expected a dataset's directory.")
    if not d.sources:
        return
    check(
        not d.path or any(not s.path for s in d.sources.values()),
        f"config.data.path={d.path!r} is used by no source, since each names its own: set it to ''.",
    )
    check(
        any(s.use_actions and s.weight > 0 for s in d.sources.values()),
        "config.data.sources: expected at least one source with use_actions=True and a weight above 0.",
    )
    for name, s in d.sources.items():
        where = f"config.data.sources.{name}"
        check(name.isidentifier(), f"{where}: expected a name of letters, digits and underscores.")
        check(bool(s.path or d.path), f"{where}.path is empty, and so is config.data.path.")
        check(
            len(s.cameras) <= len(d.cameras),
            f"{where}.cameras has {len(s.cameras)} keys, but the model has {len(d.cameras)} cameras {d.cameras}.",
        )
        check(
            not s.use_actions or len(s.cameras) in (0, len(d.cameras)),
            f"{where}.cameras: a source with actions needs one key for each of {d.cameras}, found {s.cameras}.",
        )
