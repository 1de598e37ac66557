"""Checks of the values of config fields, individually and in combination.

`uwm_jax.config` knows the fields and their types; it calls `check` on a config in which all of them are there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import codecs, systems
from uwm_jax.data import transforms
from uwm_jax.data.windows import GROUPS
from uwm_jax.errors import UserError
from uwm_jax.reading import AGAIN_SECONDS
from uwm_jax.systems import fields

# Valid values of fields whose type alone is too permissive.
_CHOICES: dict[str, tuple[str, ...]] = {
    "data.window.pad": ("none", "edge"),
    "data.last_action": ("drop", "keep"),
    "data.normalize": ("minmax", "quantile", "none"),
    "data.augment.draw": ("sample", "batch"),
    "optimizer.schedule": ("constant", "cosine", "wsd"),
    "optimizer.ema_warmup": ("ramp", "none"),
    "checkpoint.keep_best_mode": ("min", "max"),
    "init_from_normalizer": ("origin", "fresh"),
    "init_from_parameters": ("auto", "average", "raw"),
    "data.sources.*.fill_views": ("same", "none", "random"),
}

# Numbers of at least 1; other numbers are at least 0.
_AT_LEAST_ONE = (
    *("total_steps", "batch_size", "accumulation_steps", "log_every", "mesh.fsdp", "mesh.tensor", "mesh.slices"),
    *("data.num_streams", "data.prefetch", "checkpoint.every", "checkpoint.keep", "eval.num_windows"),
    *("eval.closed_loop.episodes", "eval.closed_loop.execute"),
)


# Lists of strings; the other lists are of integers, except for those below.
_TEXTS = (
    *("trackers", "init_from_skip", "optimizer.freeze", "data.cameras", "data.low_dim", "data.sources.*.cameras"),
    *("data.choices.*", "data.sources.*.choices.*"),
)
_CONDITIONS = ("data.sources.*.include", "data.sources.*.exclude")  # strings, or pairs (key, string)
_PAIRS = ("data.action", "data.sources.*.action")  # of (step key, transform)
_BOUNDS = ("data.max_action", "data.sources.*.max_action")  # pairs of (step key, number)
_MAY_BE_MINUS_ONE = ("mesh.data", "sweep.devices", "data.seed", "eval.*.every")  # which stands for another value
_PLANE = "eval.action_plane"  # a camera and four numbers


def cadence(config: ConfigDict, evaluator: str) -> int:
    """Steps between measurements of an evaluator in training; 0 is never, as where it needs an environment and has
    none."""
    every = config.eval[evaluator].every
    if lacks_env(config, evaluator):
        return 0
    return config.eval.every if every == -1 else every


def lacks_env(config: ConfigDict, evaluator: str) -> bool:
    """Whether an evaluator in training needs an environment and has none."""
    return config.eval[evaluator].get("env") == ""


def is_action(name: str) -> bool:
    """Whether a field lists the parts of an action, so that `bridge` on the command line is the preset of this name."""
    return matches(name, _PAIRS)


def is_list_of_texts(name: str) -> bool:
    """Whether the elements of a list field are strings, so that `2` on the command line means "2"."""
    return matches(name, _TEXTS + _CONDITIONS)


def check(config: ConfigDict, flat: Mapping[str, Any]) -> None:
    """Raises UserError that names the first value that is out of range or inconsistent with another.

    Args:
      config: with all fields, each of its type.
      flat: the same as `{"model.depth": 12, ...}`.
    """
    kind = systems.get(config.system)
    at_least_one = {*_AT_LEAST_ONE, *fields.AT_LEAST_ONE, *kind.at_least_one}
    for name, value in flat.items():
        if isinstance(value, int | float) and not matches(name, _MAY_BE_MINUS_ONE):
            lowest = 1 if name in at_least_one else 0
            if not value >= lowest or value == float("inf"):
                raise UserError(f"config.{name}: expected a number of at least {lowest}, found {value}.")
        if type(value) is int and abs(value) >= 2**63:
            raise UserError(f"config.{name}: expected an integer of at most 63 bits, found {value}.")
        elif isinstance(value, tuple):
            _check_elements(name, value)
    choices_of = {**_CHOICES, **fields.CHOICES, **kind.choices, "model.codec.name": codecs.names()}
    for pattern, choices in choices_of.items():
        for name in fnmatch.filter(flat, pattern):
            if flat[name] not in choices:
                raise UserError(f"config.{name}: expected one of {', '.join(choices)}; found {flat[name]!r}.")
    _check_combinations(config)
    _check_latents(config)
    kind.check(config)


def _check_elements(name: str, value: tuple[Any, ...]) -> None:
    if matches(name, _TEXTS):
        if not all(isinstance(v, str) for v in value):
            raise UserError(f"config.{name}: expected a list of strings such as ('one', 'two'), found {value!r}.")
    elif matches(name, _CONDITIONS):
        if not all(isinstance(v, str) or _is_pair(v) for v in value):
            raise UserError(
                f"config.{name}: expected a list of strings or of pairs (key, text) such as "
                f"('success', ('recording_folderpath', 'LAB')), found {value!r}."
            )
    elif matches(name, _PAIRS):
        if not all(_is_pair(v) for v in value):
            raise UserError(
                f"config.{name}: expected pairs (step key, transform) such as (('action', 'identity'),), "
                f"or the name of a preset, {', '.join(transforms.PRESETS)}; found {value!r}."
            )
        transforms.parse(value, f"config.{name}")
    elif matches(name, _BOUNDS):
        if not all(isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) and _is_bound(v[1]) for v in value):
            raise UserError(
                f"config.{name}: expected pairs (step key, number above 0) such as (('action', 1.5),), found {value!r}."
            )
    elif name == _PLANE:
        numbers = value[1:]
        fits = len(numbers) == 4 and all(type(v) in (int, float) and abs(v) < float("inf") for v in numbers)
        if value and not (isinstance(value[0], str) and fits and numbers[0] != numbers[1] and numbers[2] != numbers[3]):
            raise UserError(
                f"config.{name}: expected () or (camera, x_low, x_high, y_low, y_high) such as "
                f"('image', 0.0, 512.0, 0.0, 512.0), found {value!r}."
            )
    elif not all(type(v) is int and abs(v) < 2**63 for v in value):
        raise UserError(f"config.{name}: expected a list of integers such as (1, 2), found {value!r}.")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _is_bound(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_combinations(c: ConfigDict) -> None:
    def check(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    d = c.data
    check(
        c.batch_size % c.accumulation_steps == 0,
        f"config.accumulation_steps={c.accumulation_steps} does not divide config.batch_size={c.batch_size}.",
    )
    _check_sources(d, check)
    check(c.seed < 2**32, f"config.seed: expected less than 2**32, found {c.seed}.")
    check(
        -1 <= d.seed < 2**32,
        f"config.data.seed: expected -1 (as config.seed), or 0 to 2**32 - 1; found {d.seed}.",
    )
    tried = len((0.0, *AGAIN_SECONDS)) * d.read_timeout_seconds + sum(AGAIN_SECONDS)
    check(
        not (d.read_timeout_seconds and c.hang_seconds) or tried < c.hang_seconds,
        f"config.data.read_timeout_seconds={d.read_timeout_seconds:g}: a read is tried {len(AGAIN_SECONDS) + 1} times "
        f"within {tried:g} s before its record counts as bad, but config.hang_seconds={c.hang_seconds:g} ends the run "
        "before. Make one shorter or the other longer.",
    )
    for name in ("resize", "crop"):
        check(
            len(d[name]) == 2 and min(d[name]) > 0,
            f"config.data.{name}: expected 2 positive integers, found {d[name]}.",
        )
    check(
        d.crop[0] <= d.resize[0] and d.crop[1] <= d.resize[1],
        f"config.data.crop={d.crop} is larger than config.data.resize={d.resize}.",
    )
    _check_window(d, check)
    _check_choices(d, check)
    check(
        len(set(d.cameras)) == len(d.cameras),
        f"config.data.cameras: a key is named twice in {d.cameras}. Each view of the model needs its own name. One "
        "camera is shown in two views by a source: config.data.cameras=('first', 'second') with "
        "config.data.sources.NAME = source(cameras=('image', 'image')).",
    )
    check(
        not d.text_table or bool(d.text),
        f"config.data.text_table={d.text_table!r} requires config.data.text, the key of a string.",
    )
    check(len(set(d.low_dim)) == len(d.low_dim), f"config.data.low_dim: a key is named twice in {d.low_dim}.")
    check(0.0 <= d.val_ratio < 1.0, f"config.data.val_ratio: expected 0 <= ratio < 1, found {d.val_ratio}.")
    for name in ("b1", "b2", "ema_decay"):
        check(c.optimizer[name] < 1.0, f"config.optimizer.{name}: expected less than 1, found {c.optimizer[name]}.")
    check(
        c.optimizer.schedule != "wsd" or c.optimizer.decay_steps > 0,
        "config.optimizer.decay_steps: expected the number of steps, at least 1, over which config.optimizer.schedule="
        "'wsd' ends, such as a fifth of config.total_steps; found 0.",
    )
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
    check(
        c.sweep.devices == -1 or c.sweep.devices > 0,
        f"config.sweep.devices: expected a number of devices or -1 for as many as fit, found {c.sweep.devices}.",
    )
    for name, fields_of in c.eval.items():
        if isinstance(fields_of, ConfigDict):
            check(
                fields_of.every >= -1,
                f"config.eval.{name}.every: expected -1 (as config.eval.every), 0 (never) or steps, found "
                f"{fields_of.every}.",
            )
    loop = c.eval.closed_loop
    check(
        bool(loop.env) or loop.every <= 0,
        f"config.eval.closed_loop.every={loop.every} requires a simulator: set config.eval.closed_loop.env, e.g. to "
        "'pusht', or every to 0.",
    )
    check(
        not loop.env or bool(systems.get(c.system).acting),
        f"config.eval.closed_loop.env={loop.env!r}: config.system={c.system!r} has no use that acts. Set it to ''.",
    )
    every, kept = c.checkpoint.every, c.checkpoint.keep_every
    check(
        kept % every == 0,
        f"config.checkpoint.keep_every={kept} is not a multiple of config.checkpoint.every={every}: only steps at "
        "which a checkpoint is saved can be kept.",
    )
    plane = c.eval.action_plane
    actions = [s.action or d.action for s in d.sources.values() if s.use_actions] or [d.action]
    relative = [action for action in actions if action and transforms.parse(action)[0][1].state]
    check(
        not plane or not relative,
        "config.eval.action_plane draws positions, but the first numbers of the action "
        f"{next(iter(relative), ())} are relative to the present step. Set it to ().",
    )
    if plane and plane[0] not in d.cameras:
        raise UserError(
            f"config.eval.action_plane names the camera {plane[0]!r}, which is not one of "
            f"config.data.cameras={d.cameras}."
        )
    for name, default in (("parameters", "auto"), ("normalizer", "origin"), ("skip", ())):
        value = c[f"init_from_{name}"]
        check(
            value == default or bool(c.init_from),
            f"config.init_from_{name}={value!r} requires config.init_from.",
        )


def _check_latents(c: ConfigDict) -> None:
    """Refuses cached latents of another codec, for a system that reads none, and with a draw for a whole batch."""
    name, kind = c.data.latents, systems.get(c.system)
    if not name:
        return
    if not kind.latents:
        raise UserError(f"config.data.latents={name!r}: config.system={c.system!r} reads no latents. Set it to ''.")
    if name != c.model.codec.name:
        raise UserError(
            f"config.data.latents={name!r} names another codec than config.model.codec.name={c.model.codec.name!r}."
        )
    if c.data.augment.draw == "batch":
        raise UserError(
            f"config.data.latents={name!r} requires config.data.augment.draw='sample', found 'batch': a cached frame "
            "has the draw of its episode and camera, which cannot be one for a batch."
        )


def _check_window(d: ConfigDict, check: Callable[[bool, str], None]) -> None:
    w = d.window
    check(
        any(len(w[name]) > 0 for name in GROUPS),
        f"config.data.window: expected at least one index in one of {', '.join(GROUPS)}.",
    )
    for name in GROUPS:
        check(
            w.pad == "edge" or min(w[name], default=0) >= 0,
            f"config.data.window.{name}: negative indices need config.data.window.pad='edge'; found {w[name]}.",
        )
    check(
        len(w.reserve) == 0 or (len(w.reserve) == 2 and w.reserve[0] <= w.reserve[1]),
        f"config.data.window.reserve: expected () or (first, last) such as (0, 18), found {w.reserve}.",
    )
    every = [*d.action, *(pair for source in d.sources.values() for pair in source.action)]
    relative = [transform.name for _, transform in transforms.parse(every) if transform.state]
    check(
        not relative or len(w.obs) > 0,
        f"config.data.action: {', '.join(relative)} refers to the present step, the last of config.data.window.obs, "
        "which is ().",
    )
    check(
        len(d.action) > 0 or not w.action,
        f"config.data.action: expected at least one pair (step key, transform) for config.data.window.action="
        f"{w.action}. Without actions both are ().",
    )


def _check_choices(d: ConfigDict, check: Callable[[bool, str], None]) -> None:
    named = {f"config.data.sources.{name}": s for name, s in d.sources.items()}
    shown = {f"{where}.cameras": s.cameras for where, s in named.items() if s.cameras}
    places = [("config.data", d.choices, {"config.data.cameras": d.cameras, **shown})]
    for where, s in named.items():  # which shows its own cameras, where it has some
        field = f"{where}.cameras"
        places.append((where, s.choices, {field: s.cameras} if s.cameras else {"config.data.cameras": d.cameras}))
    for place, choices, cameras in places:
        where = f"{place}.choices"
        read = {**cameras, "config.data.text": d.text}
        used = {d.text, *(key for keys in cameras.values() for key in keys)}
        for name, keys in choices.items():
            check(name.isidentifier(), f"{where}.{name}: expected a name of letters, digits and underscores.")
            check(
                len(keys) > 0 and len(set(keys)) == len(keys),
                f"{where}.{name}: expected at least one key, each once, such as ('exterior_image_1_left', "
                f"'exterior_image_2_left'); found {keys}.",
            )
            check(
                name in used,
                f"{where}.{name} is used by none of {', '.join(f'{field}={value!r}' for field, value in read.items())}:"
                " name it there in place of its keys.",
            )


def _check_sources(d: ConfigDict, check: Callable[[bool, str], None]) -> None:
    check(bool(d.path) or bool(d.sources), "config.data.path: expected a dataset's directory.")
    if not d.sources:
        return
    check(
        not d.path or any(not s.path for s in d.sources.values()),
        f"config.data.path={d.path!r} is unused, since every source has its own path: set it to ''.",
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
