"""The configuration schema: the common fields with their defaults and meanings; a system adds its own.

A file under `configs/` starts from `base()` and changes fields; the command line changes more
(`--config.batch_size=64`). Each command calls `validate` once, which checks values and their combinations (by
`uwm_jax.config_checks`), so that no module below re-checks its inputs. `--help` shows the comment at the end of a
field's line, or directly above it, as its meaning (`uwm_jax.config_help`).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import config_checks, systems
from uwm_jax.data.fields import data_fields
from uwm_jax.data.fields import source as source
from uwm_jax.data.transforms import PRESETS
from uwm_jax.data.transforms import preset as preset
from uwm_jax.errors import UserError, suggest
from uwm_jax.files import AnyPath, as_place, local_path
from uwm_jax.hub.names import may_be_one, parse_origin
from uwm_jax.reading import parse_json, read_json, run_python

# Fields that may change when a run continues; the others determine the meaning of its numbers.
MAY_CHANGE = (
    *("total_steps", "log_every", "trackers", "hang_seconds", "eval.*", "checkpoint.*", "mesh.*", "sweep.*"),
    *("data.num_threads", "data.read_ahead", "data.prefetch", "data.max_bad_records", "data.read_timeout_seconds"),
    # Compilation: the results are the same up to rounding.
    *("accumulation_steps", "compilation_cache_dir", "model.scan_blocks", "model.remat", "model.attention"),
    "model.codec.microbatch",
    # Places of datasets, whose fingerprints show that they are the same.
    *("data.path", "data.sources.*.path", "data.sources.*.weight"),
    # Names of ranges, whose content is a part of the data's identity.
    *("data.ranges", "data.sources.*.ranges"),
)

ORIGINS = ("init_from", "branch_from")  # fields that name a checkpoint of another run

# Fields that have no effect in some configs, which `flatten` gave; a system names those of its own.
_IDLE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "optimizer.ema_warmup": lambda flat: not flat["optimizer.ema_decay"],
    "optimizer.decay_steps": lambda flat: flat["optimizer.schedule"] != "wsd",
}


def base(system: str = "uwm") -> ConfigDict:
    """The official model of a system on DROID-like data (`configs/droid.py` runs UWM's); other configs edit it.

    The fields of `model`, `diffusion` and `loss` are the system's own: `uwm_jax/systems/<system>/config.py`.
    """
    kind = systems.get(system)
    c = ConfigDict()
    # model that is trained: uwm, dp, pad, gr1; its fields come with it, so a config file chooses it
    c.system = system
    c.seed = 0  # of initial parameters, noise and timesteps
    c.total_steps = 100_000  # optimizer steps of the run
    c.batch_size = 36  # rows of a step, over all devices and processes
    c.accumulation_steps = 1  # parts that a batch is computed in, one after the other, to save memory
    c.log_every = 50  # steps between lines of metrics.jsonl
    # that get these lines too: tensorboard, wandb, package.module:Class of your own; () = none
    c.trackers = ("tensorboard",)
    # a step that takes longer prints all threads' stacks, a longer wait for data ends the run; 0 = off
    c.hang_seconds = 900.0
    c.compilation_cache_dir = ""  # directory that keeps compiled programs for the next start; "" = no cache
    # finetuning: DIR[@STEP] of the run whose parameters and normaliser this one starts from, or, on the hub,
    # owner/name[@revision[@STEP]]; "" = none
    c.init_from = ""
    c.init_from_parameters = "auto"  # of init_from: auto (average where the origin keeps one), average, raw
    # of init_from: origin, or fresh (fitted to this run's data, for data in other units)
    c.init_from_normalizer = "origin"
    c.init_from_skip = ()  # of init_from: patterns of parameters that start fresh, e.g. ("*/action_encoder/*",)
    # DIR@STEP, or owner/name@revision@STEP, of another run, from whose whole state this one goes on under its own
    # schedule and total_steps; "" = none
    c.branch_from = ""

    c.data = data_fields()

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-4  # of AdamW, after the warm-up
    # constant, cosine (to 0 at total_steps), or wsd (constant, then a decay to 0 over the last decay_steps)
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0  # steps in which the learning rate rises linearly from 0; capped by total_steps
    c.optimizer.decay_steps = 0  # of wsd: steps of its decay, which ends at total_steps; capped by those after warm-up
    c.optimizer.b1 = 0.9  # decay of AdamW's first moment
    c.optimizer.b2 = 0.999  # decay of AdamW's second moment
    c.optimizer.eps = 1e-8  # added to the root of AdamW's second moment
    c.optimizer.weight_decay = 1e-6  # decoupled, times the learning rate
    c.optimizer.clip_norm = 0.0  # largest global L2 norm of the gradient; 0 = no clipping
    c.optimizer.freeze = ()  # patterns of parameters that are not trained, e.g. ("obs_encoder/img_encoder/*",)
    c.optimizer.ema_decay = 0.0  # of the moving average of the parameters, for evaluation and sampling; 0 = no average
    c.optimizer.ema_warmup = "ramp"  # ramp: decay min(ema_decay, (1 + t) / (10 + t)); none: ema_decay from the start

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices along the axis data, which cuts the batch; -1 = those that the other axes leave
    c.mesh.fsdp = 1  # devices along the axis fsdp, which cuts the batch, parameters and optimizer state
    c.mesh.tensor = 1  # devices along the axis tensor, which cuts heads, hidden units and channels of the products
    c.mesh.slices = 1  # of accelerators, connected by a data-centre network alone, that share the axis data
    c.mesh.rules = ""  # which array lies on which axis: "" = the table of the system, or a FILE.py with one

    c.sweep = ConfigDict()  # of launch.sweep; a run by itself does not read it
    c.sweep.members_at_once = 1  # members of a device that are computed side by side, the others in turn; 0 = all
    # devices along the axis sweep, which cuts the members; -1 = as many as divide members and devices
    c.sweep.devices = -1

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10_000  # steps between checkpoints; the last step is saved too
    # minutes since the last checkpoint after which one is saved as well; 0 = by steps alone
    c.checkpoint.every_minutes = 30.0
    c.checkpoint.keep = 3  # how many of the newest checkpoints stay on disk
    c.checkpoint.keep_every = 0  # checkpoints of steps that are multiples of it stay too; 0 = none
    # metric of evaluations in training, such as "eval/policy/action_mse", whose best checkpoint stays too; "" = none
    c.checkpoint.keep_best = ""
    c.checkpoint.keep_best_mode = "min"  # whether min or max of keep_best is best

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations in training; 0 = never
    c.eval.losses = ConfigDict()
    c.eval.losses.every = -1  # steps between measurements of the losses on held-out windows; -1 = eval.every, 0 = never
    c.eval.samples = ConfigDict()
    c.eval.samples.every = -1  # steps between samples of all uses on held-out windows; -1 = eval.every, 0 = never
    c.eval.closed_loop = ConfigDict()
    # steps between closed loops of the policy, where env names a simulator; -1 = eval.every, 0 = never
    c.eval.closed_loop.every = -1
    c.eval.closed_loop.env = ""  # simulator that the policy acts in during training, such as pusht; "" = none
    c.eval.closed_loop.episodes = 50  # episodes of each closed loop, always from the same seeds, 100000 and on
    c.eval.closed_loop.execute = 8  # steps of each chunk of actions that are taken before the next chunk is sampled
    c.eval.num_windows = 256  # held-out windows of an evaluation
    # (camera, x_low, x_high, y_low, y_high) where the first two numbers of a raw action are a position in the rectangle
    # that this camera shows: pictures draw them there; () = not
    c.eval.action_plane = ()

    kind.add_fields(c)
    return c


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """`{"model.depth": 12, ...}` of every leaf."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def data_seed(config: ConfigDict) -> int:
    """The seed of a run's data: `config.data.seed`, or `config.seed` where that is -1."""
    return config.seed if config.data.seed == -1 else config.data.seed


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Runs `get_config([argument])` of `FILE.py[:argument]`, applies overrides and validates.

    Raises UserError for a missing file, a file without `get_config`, an unknown field or a bad value.
    """
    path, argument = _file_of(spec)
    expected = (
        "a Python file whose get_config([argument]) returns an ml_collections ConfigDict made from "
        "uwm_jax.config.base()"
    )
    arguments = [argument] if argument else []
    config = run_python(path, f"--config: {path}", expected, lambda module: module.get_config(*arguments))
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config of {path} returned {config!r}, expected a ConfigDict.")
    _lists_to_tuples(config)  # as they come back from a stored config
    apply_overrides(config, overrides)
    validate(config)
    return config


def data_sizes(spec: str) -> dict[str, Any]:
    """`data_sizes()` of `FILE.py[:argument]`, the sizes of its data ({key: (height, width), or a width}); {} for a file
    without it.

    Raises UserError as `load`.
    """
    path, _ = _file_of(spec)
    expected = "data_sizes() to return {key: (height, width) of a camera, or the width of a vector}"
    return run_python(path, f"--config: {path}", expected, lambda m: dict(getattr(m, "data_sizes", dict)()))


def has_members(spec: str) -> bool:
    """Whether `FILE.py[:argument]` is the config file of a sweep.

    Raises UserError as `load`.
    """
    path, _ = _file_of(spec)
    return run_python(path, f"--config: {path}", "a config file", lambda module: hasattr(module, "get_members"))


def _file_of(spec: str) -> tuple[str, str]:
    """The path and the argument of `FILE.py[:argument]`."""
    path, _, argument = spec.partition(":")
    path = str(local_path(spec if argument.startswith("//") else path, "--config"))
    if not Path(path).is_file() or not path.endswith(".py"):
        raise UserError(f"--config: there is no Python file {path!r}.{_shipped()}")
    return path, argument


def _shipped() -> str:
    """A sentence about the configs of the clone that this file lies in; "" where the package is installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return ""
    folder = root / "configs"
    place = Path("configs") if Path("configs").resolve() == folder else folder
    shipped = [str(place / p.relative_to(folder)) for p in sorted(folder.rglob("*.py")) if p.stem != "__init__"]
    return f" Shipped configs: {', '.join(shipped)}."


def apply_overrides(config: ConfigDict, overrides: Iterable[tuple[str, str]]) -> None:
    """Sets `("model.depth", "6")` pairs in place, each parsed to the type of the field's present value."""
    for name, text in overrides:
        flat = flatten(config)
        if _names_choice(config, name):
            flat.setdefault(name, ())
        if name not in flat:
            raise UserError(f"--config.{name}: {_no_such_field(name, config.system, flat)}")
        node, leaf = _holder(config, name)
        optional = systems.get(config.system).optional.get(name)
        if name == "system" and text != config.system:
            raise UserError(
                f"--config.system={text}: the fields of a config belong to its system, {config.system}. Choose another "
                "with the config file, which starts from uwm_jax.config.base(SYSTEM)."
            )
        if optional and text == "None":
            node[leaf] = None
        else:
            node[leaf] = _parse(config, name, text, optional() if optional else flat[name])


def _holder(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    """The node that holds a field, and its name in it."""
    *parents, last = name.split(".")
    for parent in parents:
        config = config[parent]
    return config, last


def _names_choice(config: ConfigDict, name: str) -> bool:
    """Whether a field is an entry of `data.choices` or of those of a source, whose names a config chooses."""
    parents = name.split(".")[:-1]
    of_source = parents[:2] == ["data", "sources"] and parents[3:] == ["choices"] and parents[2] in config.data.sources
    return parents == ["data", "choices"] or of_source


def _no_such_field(name: str, system: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown field: the systems that have it, else the known field that it resembles."""
    having = [other for other in systems.names() if name in flatten(base(other))]
    if having:
        return f"the system {system!r} has no such field; it belongs to {', '.join(having)}."
    return f"there is no such field.{suggest(name, known)}"


def _parse(config: ConfigDict, name: str, text: str, like: Any) -> Any:
    try:
        if isinstance(like, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(like, int):
            return int(text.replace("_", ""))
        if isinstance(like, float):
            return float(text)
        if isinstance(like, tuple):
            if config_checks.is_action(name) and text in PRESETS:
                return preset(text)
            parts = tuple(part.strip() for part in text.split(",") if part.strip())
            if config_checks.is_list_of_texts(name) and not text.lstrip().startswith(("(", "[", "'", '"')):
                return parts
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                return parts
            return _tuples(value) if isinstance(value, list | tuple) else (value,)
        return text
    except (KeyError, ValueError) as e:
        raise UserError(
            f"--config.{name}: expected {_expected(config, name, like)} such as {like!r}, found {text!r}."
        ) from e


def _expected(config: ConfigDict, name: str, like: Any) -> str:
    """The values that a field takes, for a message; `like` is its default."""
    optional = systems.get(config.system).optional.get(name)
    return f"{_type_name(optional())}, or None" if optional else _type_name(like)


def _type_name(value: Any) -> str:
    names = {
        "bool": "true or false",
        "int": "an integer",
        "float": "a number",
        "str": "a string",
        "tuple": "a list",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _lists_to_tuples(config: ConfigDict) -> None:
    for key, value in list(config.items()):
        if isinstance(value, ConfigDict):
            _lists_to_tuples(value)
        elif isinstance(value, list | tuple):
            with config.unlocked():
                if isinstance(value, list):  # which an assignment would keep
                    del config[key]
                config[key] = _tuples(value)


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str, where: str) -> ConfigDict:
    """The config of a stored `config.json`.

    Raises:
      UserError: it has no system, or a field that its system does not have.
    """
    return from_dict(parse_json(text, where), where)


def from_dict(stored: Mapping[str, Any], where: str) -> ConfigDict:
    """The config of the object in a `config.json`, as `from_json`."""
    config = base(_system_of(stored, where))
    if isinstance(stored.get("data"), Mapping):
        sources = stored["data"].get("sources")
        config.data.sources = ConfigDict()
        for name in sources if isinstance(sources, Mapping) else ():
            if name.isidentifier():
                config.data.sources[name] = source()
    _name_choices(config, stored)
    known = flatten(config)

    def fill(node: ConfigDict, values: Mapping[str, Any], prefix: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: expected fields under {prefix.rstrip('.') or 'the top'!r}, found {values!r}.")
        for key, value in values.items():
            if key not in node:
                raise UserError(f"{where}: unknown field {prefix + key!r}.{suggest(prefix + key, known)}")
            if isinstance(node[key], ConfigDict):
                fill(node[key], value, f"{prefix}{key}.")
                continue
            try:
                node[key] = _tuples(value)
            except (TypeError, ValueError) as e:
                expected = _expected(config, prefix + key, node[key])
                raise UserError(f"{where}: {prefix + key}: expected {expected}, found {value!r}.") from e

    fill(config, stored, "")
    try:
        validate(config)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return config


def _name_choices(defaults: ConfigDict, given: ConfigDict | Mapping[str, Any]) -> None:
    """Gives `defaults` an empty entry for each choice that another config has."""
    for name in flatten(given):
        if _names_choice(defaults, name):
            node, last = _holder(defaults, name)
            node[last] = ()


def _system_of(stored: Any, where: str) -> str:
    """The name of a stored config's system."""
    if not isinstance(stored, Mapping):
        raise UserError(f"{where}: expected a JSON object, found {stored!r}.")
    if (name := stored.get("system")) not in systems.names():
        found = repr(name) if "system" in stored else "none"
        raise UserError(f"{where}: system: expected one of {', '.join(systems.names())}, found {found}.")
    return name


def read(workdir: AnyPath, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The config of a workdir, with overrides on top."""
    refuse_sweep(workdir)
    path = as_place(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir: {str(workdir)!r} holds no config.json; it is not a run's directory.")
    config = from_dict(read_json(path), str(path))
    apply_overrides(config, overrides)
    validate(config)
    return config


def refuse_sweep(workdir: AnyPath) -> None:
    """Raises UserError, with names of its members, for the directory of a sweep where that of a run is expected."""
    directory = as_place(workdir)
    if (directory / "sweep.json").is_file():
        names = sorted(place.name for place in (directory / "members").glob("*/"))
        found = f" It has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else ""
        raise UserError(
            f"--workdir: {str(workdir)!r} holds a sweep, not a run. Its members are runs: "
            f"--workdir={workdir}/members/NAME.{found}"
        )


def with_origins(config: ConfigDict, **origins: str) -> ConfigDict:
    """A copy with these values of `ORIGINS`: what a run keeps is a place with its step, however it was spelled."""
    config = config.copy_and_resolve_references()
    config.update(origins)
    return config


def refuse_changed(
    config: ConfigDict,
    stored: ConfigDict,
    may_change: Iterable[str] = MAY_CHANGE,
    where: str = "this workdir",
    when: str = "when a run continues: leave it as it was, or use a new --workdir",
) -> None:
    """Refuses another value of a field than that of the config which a checkpoint was saved with.

    Args:
      may_change: patterns of the fields that may differ.
      where, when: what was saved, and what goes on from it, for the message.

    Raises:
      UserError: names the field, both values and those that may differ.
    """
    now, before = flatten(config), flatten(stored)
    if now["system"] != before["system"]:
        raise UserError(
            f"config.system is {now['system']!r}, but {where} is a {before['system']} run: use a new --workdir."
        )
    idle = {**_IDLE, **systems.get(config.system).fields.idle}
    for name in ORIGINS:
        if now[name] and before[name]:  # which spellings of one place name one origin
            (here, step), (there, stored_step) = parse_origin(now[name], name), parse_origin(before[name], name)
            if may_be_one(here, there) and (step == stored_step or None in (step, stored_step)):
                now[name] = before[name]
    may_change = tuple(may_change)
    for name in sorted(now.keys() | before.keys()):
        if now.get(name) == before.get(name) or config_checks.matches(name, may_change):
            continue
        if name in idle and idle[name](now) and idle[name](before):
            continue
        is_now, was = (repr(fields[name]) if name in fields else "absent" for fields in (now, before))
        raise UserError(
            f"config.{name} is {is_now}, but {where} was started with {was}. Only {', '.join(may_change)} may change "
            f"{when}."
        )


def validate(config: ConfigDict) -> None:
    """Raises UserError that names the first field that is missing, unknown, mistyped or inconsistent."""
    if not isinstance(config.get("system"), str):
        raise UserError("config.system is missing: start the config from uwm_jax.config.base(SYSTEM).")
    defaults = base(config.system)
    optionals = systems.get(config.system).optional
    if isinstance(config.get("data"), ConfigDict) and isinstance(config.data.get("sources"), ConfigDict):
        for name, value in config.data.sources.items():
            if not isinstance(value, ConfigDict):
                raise UserError(
                    f"config.data.sources.{name}: expected what uwm_jax.config.source(...) gives, found {value!r}."
                )
        defaults.data.sources = ConfigDict({name: source() for name in config.data.sources})
    _name_choices(defaults, config)
    reference, flat = flatten(defaults), flatten(config)
    for name in flat.keys() - reference.keys():
        raise UserError(f"config.{name}: {_no_such_field(name, config.system, reference)}")
    for name, default in reference.items():
        if name not in flat:
            if name.startswith("data.sources."):
                raise UserError(f"config.{name} is missing: make every source with uwm_jax.config.source(...).")
            raise UserError(f"config.{name} is missing: start the config from uwm_jax.config.base().")
        value = flat[name]
        whole = isinstance(default, float) and type(value) is int  # 1 for 1.0
        optional = value is None or type(value) is optionals[name] if name in optionals else False
        if type(value) is not type(default) and not whole and not optional:
            raise UserError(f"config.{name}: expected {_expected(config, name, default)}, found {value!r}.")
    config_checks.check(config, flat)
