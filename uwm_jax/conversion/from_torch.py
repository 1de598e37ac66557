"""Weights under official names become a workdir."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from uwm_jax import config as config_lib
from uwm_jax import files, systems
from uwm_jax.conversion import training_state
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError, warn
from uwm_jax.files import AnyPath
from uwm_jax.torch_bridge import description, layout, npz_file, official_codecs, state_dict, weights
from uwm_jax.torch_bridge.description import Described
from uwm_jax.torch_bridge.official_config import OfficialRun, Shapes
from uwm_jax.torch_bridge.official_yaml import OfficialYaml
from uwm_jax.training import average, codec_store, lineage
from uwm_jax.training import workdir as workdir_lib
from uwm_jax.training.checkpoints import steps


def from_torch(
    input_path: AnyPath,
    official_config: AnyPath,
    workdir: AnyPath,
    normalizer: AnyPath | None = None,
    *,
    no_normalizer: bool = False,
    which: str = state_dict.MODEL,
    system: str = "",
    optimizer: bool = False,
    overrides: Iterable[tuple[str, str]] = (),
) -> None:
    """Makes an ordinary workdir, in float32, of weights under official names; all of it or nothing.

    Args:
      input_path: `.safetensors`, or an official `.pt` (which brings its normalisers).
      official_config: the run's saved YAML, or the `.json` that `to_torch` wrote (which brings its normalisers).
      workdir: a directory that does not exist yet, or is empty.
      normalizer: `.npz`; takes the place of what the other files hold for the same key.
      no_normalizer: whether a key that the run normalised may go without a normaliser.
      which: `model`, or `ema` for the averaged weights of a file that holds both.
      system: whose weights they are; "" where the official configuration tells.
      optimizer: whether the optimizer's state comes along, so that training continues; only a `.pt` has it.
      overrides: `("data.path", "libero")` pairs on top of the configuration, of `training_state.MAY_SET`; only with
        `optimizer`.
    """
    workdir = files.place(workdir, "--workdir")
    files.check_output(workdir, "--workdir")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(
            f"--workdir: {str(workdir)!r} is not empty; a converted checkpoint needs a directory of its own."
        )
    found = weights.read_weights(input_path, which, optimizer=optimizer)
    tensors, stored, adamw = found.tensors, found.normalizers, found.optimizer
    if notes := [*found.notes, *(training_state.notes(adamw) if adamw else ())]:
        print(f"note: {'; '.join(notes)}.", file=sys.stderr)
    given = npz_file.read_normalizers(normalizer) if normalizer else {}
    run: OfficialRun | Described
    official: OfficialYaml | None = None
    conflicts: tuple[str, ...] = ()
    if description.is_description(official_config):
        run = description.read(official_config, "--official-config")
        description.require_codec(run, f"--official-config: {official_config}")
        step, parameters, spec = run.step, run.parameters, run.spec
        pairs = {**spec.normalizer.entries, **stored, **given}
        spec = dataclasses.replace(spec, normalizer=_fitting(pairs, given, spec.action_dim, spec.low_dim))
    else:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        official = OfficialYaml(official_config)
        run = read_official(official, shapes, system)
        step, parameters, conflicts = 0, average.RAW if which == state_dict.MODEL else average.AVERAGE, run.conflicts
        normalisers = _fitting({**stored, **given}, given, run.action_dim, run.low_dim_seen)
        window = WindowSpec.from_config(run.config.data.window)
        spec = DataSpec(window, run.cameras, run.low_dim, run.action_dim, run.text_dim, normalisers)

    config, source = run.config, f"--input: {input_path}"
    if adamw and not conflicts:
        training_state.configure(config, official, adamw, overrides)
    codec_tensors, network, faults = official_codecs.split(config, tensors)
    try:
        codec = official_codecs.make(config, codec_tensors)
        like = jax.eval_shape(systems.make(config, spec, codec).init, jax.random.key(0))
    except (UserError, ValueError) as e:  # such fields describe no model, so nothing tells which tensors to expect
        if not conflicts:
            raise
        raise UserError(layout.refusal(source, faults, conflicts)) from e
    entry_of = systems.official(config.system).entry_of(config)
    faults = layout.find_faults(network, like, entry_of) + faults
    if faults or conflicts:
        raise UserError(layout.refusal(source, faults, conflicts))
    if isinstance(run, OfficialRun):
        _check_normalized(run, spec.normalizer, no_normalizer)
    params = layout.from_official(network, like, entry_of, source)
    state = training_state.make(config, params, entry_of, adamw, str(input_path)) if adamw else None
    _warn_of_infinities({**tensors, **(training_state.values(adamw) if adamw else {})})

    came_from = {"weights": files.as_place(input_path).name, "config": files.as_place(official_config).name}
    with files.new_folder(workdir, last="config.json") as staging:
        arrays = official_codecs.keep(codec, codec_tensors, codec_store.folder(staging, config))
        assets: dict[str, Any] = {"converted_from": came_from | {"parameters": parameters}}
        if isinstance(run, Described) and run.learned_from is not None:
            assets |= {"learned_from": run.learned_from, "leak": None}
        if state is None:
            workdir_lib.save_params_only(staging, config, spec, params, arrays, step=step, extra_assets=assets)
        else:
            workdir_lib.save_state(staging, config, spec, state, arrays, extra_assets=assets | lineage.unknown())
        (staging / steps.LOCK).unlink()  # of this process
    steps.mark(workdir)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"wrote {workdir}: {count / 1e6:.2f} M trainable parameters, cameras {', '.join(sorted(spec.cameras))}")


def read_official(official: OfficialYaml, shapes: Shapes, system: str = "") -> OfficialRun:
    """The config and the data's sizes of an official run.

    Args:
      official: its saved configuration.
      shapes: shape of every tensor of its state dict, under official names.
      system: whose run it is; "" where the configuration tells, by `model._target_` or `algo`.

    Raises:
      UserError: as `Official.read` does, or the configuration is of none of our systems.
    """
    name = system or _system_of(official)
    run = systems.official(name).read(official, shapes, config_lib.base(name))
    try:
        config_lib.validate(run.config)
    except UserError as e:
        raise UserError(f"--official-config: {official.path}: {e}") from e
    return run


def _system_of(official: OfficialYaml) -> str:
    kinds = {name: kind for name in systems.names() if (kind := systems.get(name).official)}
    found = official.get("model._target_", None)
    if found is None:
        algo = official.optional("algo", "uwm")
        if name := next((name for name, kind in kinds.items() if kind.algo == algo), ""):
            return name
        expected = ", ".join(repr(kind.algo) for kind in kinds.values())
        raise official.error("algo", f"is {algo!r}; only {expected} can be converted")
    if name := next((name for name, kind in kinds.items() if found in kind.classes), ""):
        return name
    expected = ", ".join(repr(one) for kind in kinds.values() for one in kind.classes)
    raise official.error("model._target_", f"is {found!r}; only {expected} can be converted")


def _check_normalized(run: OfficialRun, normalizer: Normalizer, no_normalizer: bool) -> None:
    """Warns of keys that the model reads or makes without a normaliser, where the run may have had one.

    Raises:
      UserError: the run did have one, and `no_normalizer` does not allow to go without.
    """
    absent = [key for key in ("action", *run.low_dim) if key not in normalizer.entries]
    lost = [key for key in absent if run.normalized[key]]
    if lost and not no_normalizer:
        raise UserError(
            f"--official-config says that the run normalised {', '.join(lost)}, but no file says how, so that raw "
            "values would be taken for normalised ones. Give the .pt checkpoint, which holds its normalisers, or "
            "--normalizer=FILE.npz with <key>/scale and <key>/offset; --no_normalizer converts the weights without."
        )
    if unsaid := [key for key in absent if run.normalized[key] is not False]:
        warn(f"no normaliser for {', '.join(unsaid)}; raw and normalised values are equal.")


def _fitting(
    pairs: npz_file.Normalizers, given: npz_file.Normalizers, action_dim: int, low_dim: Mapping[str, int]
) -> Normalizer:
    """`pairs` as a normaliser, if they fit the run's keys; warns of `given` ones that belong to no key."""
    sizes = {"action": action_dim, **low_dim}
    for key, (scale, _) in pairs.items():
        if key in sizes and scale.shape != (sizes[key],):
            raise UserError(f"--normalizer: {key}/scale has shape {scale.shape}, expected ({sizes[key]},).")
        if key in sizes and not scale.all():
            raise UserError(f"--normalizer: {key}/scale has zeros, so {key} cannot be normalised; put 1 there.")
    if unknown := [key for key in given if key not in sizes]:
        warn(f"--normalizer has {', '.join(unknown)}, but the run's keys are {', '.join(sizes)}.")
    return Normalizer(pairs)


def _warn_of_infinities(tensors: Mapping[str, np.ndarray]) -> None:
    bad = [name for name in sorted(tensors) if not np.isfinite(tensors[name]).all()]
    if bad:
        warn(f"{len(bad)} tensors hold values that are not finite, first {bad[0]}.")
