"""A workdir's checkpoint as what evaluation and sampling need: the system, its parameters and its codec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.data.records import short_key
from uwm_jax.data.sources import of_episodes
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import UserError, warn
from uwm_jax.files import AnyPath, as_place, place
from uwm_jax.systems.base import System
from uwm_jax.training import average, codec_store, fixed_fields
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint


def define_flags() -> None:
    """Declares `--parameters`, which all commands that use a checkpoint's parameters share."""
    flags.DEFINE_enum(
        "parameters",
        None,
        [average.RAW, average.AVERAGE],
        "the parameters as they were trained last, or their moving average, which is the default where there is one",
    )


def load_for_inference(
    workdir: AnyPath,
    step: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    parameters: str | None = None,
    may_change: Sequence[str] = fixed_fields.SAMPLING,
) -> tuple[System, Any, Any, int]:
    """A workdir as `(system, params, frozen, step)`. A warning tells where an average is still much of its start.

    What runs them often takes `system.held(params)`.

    Args:
      step: which checkpoint; None takes the newest that is not damaged.
      overrides: `("diffusion.spacing", "trailing")` pairs on top of the stored config.
      parameters: "raw" or "average"; None takes the average where the checkpoint has one.
      may_change: patterns of the fields that `overrides` may change, as `fixed_fields` has them.

    Raises:
      UserError: no such workdir, step or average, an override of a field that is fixed, or a damaged checkpoint.
    """
    workdir, overrides = place(workdir, "workdir"), list(overrides)
    config_lib.read(workdir)  # before anything is said of checkpoints: is this a run's directory?
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: {str(workdir)!r} has checkpoints of steps {steps}.")
    while True:
        stored = CheckpointReader(checkpoints.directory, checkpoints.steps()[-1] if step is None else step)
        try:
            config = fixed_fields.for_inference(workdir, stored, overrides, may_change)
            system, params, frozen = _load(config, workdir, stored, parameters)
            used = parameters_used(workdir, stored.step, parameters)
            break
        except CorruptCheckpoint as e:
            if not stored.path.is_dir():  # a run that is training has replaced it meanwhile
                steps = checkpoints.steps()
                if step is not None or not steps:
                    there = f"There are those of steps {steps}."
                    raise UserError(f"{stored.path}: this checkpoint was deleted while it was read. {there}") from e
                warn(f"checkpoint {stored.step} was replaced while it was read; step {steps[-1]} is used instead.")
                continue
            if step is not None:
                raise UserError(f"--step={step}: {e}. There are checkpoints of steps {steps}.") from e
            checkpoints.pass_over(stored.step, e)
    for told in systems.get(config.system).remarks(config):
        warn(told)
    if used["parameters"] == average.AVERAGE and (told := average.warning(config, stored.step, "--parameters=raw")):
        warn(told)
    return system, params, frozen, stored.step


def parameters_used(workdir: AnyPath, step: int, parameters: str | None = None) -> dict[str, Any]:
    """The parameters that `load_for_inference` took, for the files of results: as `average.describe`; `step` is the one
    that it returned.

    The share of the start follows from the checkpoint's config, which no flag changes.
    """
    stored = CheckpointReader(as_place(workdir).absolute() / "checkpoints", step)
    return average.describe(fixed_fields.stored_config(stored), step, parameters or _default_parameters(stored))


def _default_parameters(stored: CheckpointReader) -> str:
    return average.AVERAGE if stored.holds(average.ITEMS[average.AVERAGE]) else average.RAW


def datasets_of(workdir: AnyPath, step: int) -> dict[str, str]:
    """{source: identity} of the episodes that a checkpoint learned from; {} for a converted one, which knows none."""
    stored = CheckpointReader(as_place(workdir).absolute() / "checkpoints", step)
    datasets = stored.data_iter.get("datasets") or {} if "data_iter" in stored.items else {}
    return {name: of_episodes(identity) for name, identity in datasets.items()}


def data_keys(workdir: AnyPath, step: int) -> set[str] | None:
    """Names of all that the data of a run holds per step, as `obs/` keys have them (without `observation/`); None for a
    converted checkpoint, whose data is not known."""
    dataset = CheckpointReader(as_place(workdir).absolute() / "checkpoints", step).assets.get("dataset")
    if not dataset:
        return None
    manifests = [dataset] if "step_features" in dataset else dataset.values()
    return {short_key(key) for manifest in manifests for key in manifest["step_features"]}


def _load(
    config: ConfigDict, workdir: AnyPath, stored: CheckpointReader, parameters: str | None
) -> tuple[System, Any, Any]:
    item = average.ITEMS[parameters or _default_parameters(stored)]
    if not stored.holds(item):
        raise UserError(
            f"--parameters={parameters}: {stored.path} holds no average of the parameters (the run has "
            "config.optimizer.ema_decay=0, or was converted). Leave the flag out."
        )
    spec = DataSpec.from_json(stored.assets["data_spec"])
    codec, frozen = codec_store.open_codec(config, codec_store.in_workdir(config, workdir, stored.codec))
    system = systems.make(config, spec, codec)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(system.init, jax.random.key(0)),
    )
    return system, stored.arrays(item, like), frozen
