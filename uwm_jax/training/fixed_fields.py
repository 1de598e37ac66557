"""The fields of a config that a checkpoint fixes: what its parameters mean does not follow from flags or from files
next to it.

A run that continues may change `config.MAY_CHANGE`. A command that only uses the parameters may change how it samples
(`SAMPLING`), which held-out windows it takes (`WINDOWS`), or both and how they are shown (`EVALUATION`); everything
else is fixed, or has no effect there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.config import MAY_CHANGE
from uwm_jax.config_checks import matches
from uwm_jax.errors import UserError, warn
from uwm_jax.files import AnyPath, as_place
from uwm_jax.parallel import distributed
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint

SAMPLING = ("*sampling*",)  # stands for the fields that the system names (`Fields.sampling`)
# Which held-out windows, of which data, which the commands compare with the run's own.
WINDOWS = (
    "eval.num_windows",
    *("data.path", "data.split", "data.val_ratio", "data.drop_nonfinite", "data.ranges", "data.sources.*"),
    *("data.max_bad_records", "data.read_timeout_seconds"),
)
EVALUATION = (*SAMPLING, *WINDOWS, "eval.action_plane", "batch_size", "mesh.rules", "data.latents")


def stored_config(stored: CheckpointReader) -> ConfigDict:
    """The config that a checkpoint was saved with."""
    return config_lib.from_dict(stored.assets["config"], f"{stored.path / 'assets'}: config")


def for_inference(
    workdir: AnyPath,
    stored: CheckpointReader,
    overrides: Iterable[tuple[str, str]] = (),
    may_change: Sequence[str] = SAMPLING,
) -> ConfigDict:
    """The config to use a checkpoint with: the workdir's `config.json`, but the checkpoint's in the fields it fixes.

    One line on stderr names the fixed fields in which the file differs.

    Args:
      overrides: `("diffusion.spacing", "trailing")` pairs on top.
      may_change: patterns of the fields that they may change; one that keeps a field's value is no change.

    Raises:
      UserError: there is no `config.json`, or an override changes another field.
    """
    config, told = config_of_run(workdir, stored)
    if told:
        warn(told)
    before = config_lib.flatten(config)
    of_system = systems.get(config.system).fields.sampling
    patterns = [p for name in may_change for p in (of_system if name in SAMPLING else (name,))]
    patterns = [p for p in patterns if any(matches(name, (p,)) for name in before)]
    config_lib.apply_overrides(config, overrides)
    for name, value in config_lib.flatten(config).items():
        if value != before[name] and not matches(name, patterns):
            raise UserError(
                f"--config.{name}={value!r}: the checkpoint fixes this field ({before[name]!r}), or the command does "
                f"not use it. With these parameters only {', '.join(patterns)} may change."
            )
    config_lib.validate(config)
    return config


def started_with(workdir: AnyPath, step: int) -> ConfigDict:
    """The config that a run which continues was started with: `config_of_run` of its checkpoint `step`, so that a
    `config.json` that another start has overwritten refuses no run; `config.json` alone where that checkpoint is
    damaged.

    Raises:
      UserError: there is no `config.json`.
    """
    try:
        config, told = config_of_run(workdir, CheckpointReader(as_place(workdir).absolute() / "checkpoints", step))
    except CorruptCheckpoint:  # which is told of where it is passed over
        return config_lib.read(workdir)
    if told and distributed.is_main():
        warn(told)
    return config


def config_of_run(workdir: AnyPath, stored: CheckpointReader) -> tuple[ConfigDict, str]:
    """The workdir's `config.json`, but the checkpoint's own in the fields that it fixes; and a line that names the
    fixed fields in which the file differs, "" where there are none.

    Raises:
      UserError: there is no `config.json`.
    """
    config, own = config_lib.read(workdir), stored_config(stored)
    flat, fixed = config_lib.flatten(config), config_lib.flatten(own)
    differ = {name: value for name, value in fixed.items() if flat.get(name) != value and not matches(name, MAY_CHANGE)}
    if not differ and flat.keys() == fixed.keys():
        return config, ""
    for name in flat.keys() & fixed.keys():
        if matches(name, MAY_CHANGE):
            *parents, leaf = name.split(".")
            functools.reduce(getattr, parents, own)[leaf] = flat[name]
    fields = ", ".join(f"{name} ({flat.get(name, 'absent')!r}, there {value!r})" for name, value in differ.items())
    return own, f"{workdir}/config.json differs from {stored.path}, whose own fields are used: {fields or 'sources'}."
