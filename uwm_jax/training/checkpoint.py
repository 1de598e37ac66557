"""Checkpoints: what a run leaves behind, written atomically, readable piece by piece.

`<workdir>/checkpoints/<step>/` holds separately loadable items:

  params        trainable parameters
  ema_params    their moving average, when `config.optimizer.ema_decay` is set
  train_state   optimizer state, hyper-parameters, step
  data_iter     where the data order stands (JSON, knows no topology)
  codec         arrays of a codec fitted on data (`pca`); a VAE lies in `<workdir>/frozen/vae` instead
  assets        config, data facts with the normaliser, dataset manifest, code version (JSON)

A checkpoint with only `params` and `assets` (a converted one) serves inference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import uwm_jax
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.files import write_text
from uwm_jax.system import DataFacts, System
from uwm_jax.training import frozen as frozen_lib
from uwm_jax.training.state import TrainState


def write_config(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
    """Writes `config.json` atomically."""
    path = Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, config_lib.to_json(config) + "\n")


def make_assets(config: ConfigDict, facts: DataFacts, **extra: Any) -> dict[str, Any]:
    """The JSON item that makes a checkpoint describe itself."""
    return {
        "config": config.to_dict(),
        "data_facts": facts.to_json(),
        "code_version": uwm_jax.__version__,
        **extra,
    }


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's directory.
      keep: how many of the newest to keep; None keeps all.
      read_only: changes nothing on disk, not even what looks left over: a run may be saving just now.

    Raises:
      UserError: `read_only`, and there are no checkpoints.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int | None = None, read_only: bool = False):
        self.directory = Path(workdir).absolute() / "checkpoints"
        if read_only and latest_step(workdir) is None:
            raise UserError(f"--workdir: {str(workdir)!r} holds no checkpoint yet.")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                enable_async_checkpointing=not read_only,
            ),
            # A manager that has saved nothing itself reads an item's metadata only if told what kind it is.
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in ("params", "ema_params", "train_state", "codec")},
                **{name: ocp.JsonCheckpointHandler() for name in ("data_iter", "assets")},
            },
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, data_iter: Mapping[str, Any], frozen_arrays: Any, assets: Mapping[str, Any]
    ) -> None:
        """Starts an asynchronous save of a training state; a failed earlier one raises here."""
        step = int(state.step)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "train_state": ocp.args.StandardSave(_train_state_item(state)),
            "data_iter": ocp.args.JsonSave(dict(data_iter)),
            "assets": ocp.args.JsonSave(dict(assets)),
        }
        if state.ema_params is not None:
            items["ema_params"] = ocp.args.StandardSave(state.ema_params)
        if frozen_arrays:
            items["codec"] = ocp.args.StandardSave(frozen_arrays)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def save_params(self, step: int, params: Any, frozen_arrays: Any, assets: Mapping[str, Any]) -> None:
        """Saves parameters and assets alone, and waits until they are durable."""
        items = {"params": ocp.args.StandardSave(params), "assets": ocp.args.JsonSave(dict(assets))}
        if frozen_arrays:
            items["codec"] = ocp.args.StandardSave(frozen_arrays)
        self._manager.save(step, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def restore_state(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The training state and the data position of a step.

        Args:
          like: the state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves).
        """
        if "train_state" not in self.items(step):
            raise UserError(
                f"{self.directory / str(step)}: holds parameters without a training state (a converted "
                "checkpoint); it can be sampled from, but not continued. Train in a new --workdir."
            )
        self._check_shapes(step, "params", like.params)
        items = {
            "params": ocp.args.StandardRestore(like.params),
            "train_state": ocp.args.StandardRestore(_train_state_item(like)),
            "data_iter": ocp.args.JsonRestore(),
        }
        if like.ema_params is not None:
            items["ema_params"] = ocp.args.StandardRestore(like.ema_params)
        restored = self._restore(step, items)
        inner = restored["train_state"]
        state = like.replace(
            step=inner["step"],
            opt_state=inner["opt_state"],
            hparams=inner["hparams"],
            params=restored["params"],
            ema_params=restored["ema_params"] if like.ema_params is not None else None,
        )
        return state, restored["data_iter"]

    def restore_params(self, step: int, like: Any, item: str = "params") -> Any:
        """One parameter item alone; `like` as in `restore_state`."""
        self._check_shapes(step, item, like)
        return self._restore(step, {item: ocp.args.StandardRestore(like)})[item]

    def restore_arrays(self, step: int, item: str) -> Any:
        """An item of arrays whose structure is taken from the checkpoint, on the default device."""
        metadata = self._manager.item_metadata(step)[item]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata.tree)
        return self._restore(step, {item: ocp.args.StandardRestore(like)})[item]

    def assets(self, step: int) -> dict[str, Any]:
        return self._restore(step, {"assets": ocp.args.JsonRestore()})["assets"]

    def items(self, step: int) -> set[str]:
        """The names of the items that a step holds."""
        return {p.name for p in (self.directory / str(step)).iterdir() if p.is_dir()}

    def wait(self) -> None:
        """Blocks until the last save is durable; raises if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _check_shapes(self, step: int, item: str, like: Any) -> None:
        """Raises UserError that names the first array whose presence or shape differs from `like`."""
        stored, wanted = (
            {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}
            for leaves in map(jax.tree_util.tree_leaves_with_path, (self._manager.item_metadata(step)[item].tree, like))
        )
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"{self.directory / str(step)}: {item}/{name} is {stored.get(name, 'absent')} in the checkpoint, "
                    f"but {wanted.get(name, 'absent')} in the model of this config. Undo the override or choose "
                    "another checkpoint."
                )

    def _restore(self, step: int, items: Mapping[str, Any]) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError, OSError) as e:
            raise UserError(
                f"{self.directory / str(step)}: cannot be read as {', '.join(items)} of this config "
                f"({str(e).splitlines()[0] if str(e) else type(e).__name__})."
            ) from e


def _train_state_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "hparams": state.hparams}


def save_params_only(
    workdir: str | os.PathLike[str],
    config: ConfigDict,
    facts: DataFacts,
    params: Any,
    frozen_arrays: Any = None,
    step: int = 0,
    extra_assets: Mapping[str, Any] | None = None,
) -> None:
    """Makes an ordinary workdir around parameters; a VAE is written to `frozen/vae` by the caller.

    Args:
      frozen_arrays: arrays of a fitted codec, else None.
    """
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_params(step, params, frozen_arrays, make_assets(config, facts, **(extra_assets or {})))
    checkpoints.close()


def load_for_inference(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
) -> tuple[System, Any, Any, int]:
    """A workdir as `(system, params, frozen, step)`; the averaged parameters where the run keeps them.

    Args:
      step: which checkpoint; None takes the newest.
      overrides: `("diffusion.spacing", "trailing")` pairs on top of the stored config.

    Raises:
      UserError: no such workdir or step, or a checkpoint that does not fit its config.
    """
    config = config_lib.read(workdir, overrides)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        steps = checkpoints.steps()
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: {str(workdir)!r} has checkpoints of steps {steps}.")
        step = steps[-1] if step is None else step
        facts = DataFacts.from_json(checkpoints.assets(step)["data_facts"])
        _check_keys(config, facts)
        items = checkpoints.items(step)
        arrays = checkpoints.restore_arrays(step, "codec") if "codec" in items else None
        codec, frozen = frozen_lib.from_workdir(config, workdir, arrays)
        system = System(config, facts, codec)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            jax.eval_shape(system.init, jax.random.key(0)),
        )
        params = checkpoints.restore_params(step, like, "ema_params" if "ema_params" in items else "params")
        return system, params, frozen, step
    finally:
        checkpoints.close()


def _check_keys(config: ConfigDict, facts: DataFacts) -> None:
    """Inputs are those that the run was trained with; an override cannot change them."""
    for field, trained in (("cameras", facts.cameras), ("low_dim", facts.low_dim)):
        if set(config.data[field]) != set(trained):
            raise UserError(
                f"config.data.{field} is {tuple(config.data[field])}, but the run was trained with "
                f"{tuple(sorted(trained))}."
            )


def latest_step(workdir: str | os.PathLike[str]) -> int | None:
    """The newest finished checkpoint of a workdir, None without one; touches nothing."""
    directory = Path(workdir) / "checkpoints"
    steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()] if directory.is_dir() else []
    return max(steps, default=None)
