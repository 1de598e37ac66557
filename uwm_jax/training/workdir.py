"""The workdir of a run besides its checkpoints: `config.json`, whether all hosts share it, room on its disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import UserError, warn
from uwm_jax.files import AnyPath, Place, as_place, write_text
from uwm_jax.parallel import distributed
from uwm_jax.training.checkpoints.checkpoint import UNKNOWN_POSITION, Checkpoints, make_assets, steps_in
from uwm_jax.training.state import TrainState

SHARED_SECONDS = 40.0  # for a file of one host to appear on another: NFS clients refresh every 30 s


def write_config(workdir: AnyPath, config: ConfigDict) -> None:
    """Writes `config.json` atomically."""
    write_text(as_place(workdir) / "config.json", config_lib.to_json(config) + "\n")


def require_shared(workdir: AnyPath, config: ConfigDict) -> None:
    """Checks that all processes see the same workdir; all call it after the main one's `write_config`.

    A shared file system may show a new file late, so a process that does not see it retries for a while.

    Raises:
      UserError: on all processes; names those whose `config.json` differs from the main one's.
    """
    expected = distributed.agree(config_lib.to_json(config) + "\n")
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := _text(as_place(workdir) / "config.json") == expected) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [str(process) for process, sees in enumerate(distributed.gather(seen)) if not sees]
    if blind:
        raise UserError(
            f"--workdir: process {', '.join(blind)} does not see in {str(workdir)!r} what process 0 wrote there "
            "(config.json). It must be a directory that all hosts share, under the same path on each."
        )


def warn_of_room(workdir: AnyPath, state: Any, most: int | None, members: int = 1) -> None:
    """Warns if the disk has less free space than the checkpoints of a run still need.

    Args:
      state: shapes and dtypes of what each of them holds.
      most: how many there will be at one time, with one that is being written (`Retention.at_most`); None: unknown.
      members: how many runs of a sweep save such checkpoints on this disk; `workdir` is that of one of them.
    """
    workdir = as_place(workdir)
    if most is None or not isinstance(workdir, Path):
        return
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if hasattr(x.dtype, "itemsize"))
    missing = max(1, most - len(steps_in(workdir / "checkpoints")))
    try:
        free = shutil.disk_usage(workdir).free
    except OSError:  # a file system that does not report it
        return
    if free < missing * size * members:
        each = f" for each of {members} members" if members > 1 else ""
        warn(
            f"{workdir}: {free / 1e6:,.1f} MB are free, but {missing} more checkpoints of {size / 1e6:,.1f} MB{each} "
            f"are written before old ones are deleted (config.checkpoint.keep and the like keep up to {most - 1}). "
            "Free some space, or keep fewer."
        )


def save_params_only(
    workdir: AnyPath,
    config: ConfigDict,
    spec: DataSpec,
    params: Any,
    frozen_arrays: Any = None,
    step: int = 0,
    extra_assets: Mapping[str, Any] | None = None,
) -> None:
    """Makes an ordinary workdir around parameters; a VAE is written to `frozen/vae` by the caller.

    Args:
      frozen_arrays: arrays of a fitted codec, else None.
    """
    checkpoints = Checkpoints(workdir)
    write_config(workdir, config)
    checkpoints.save_params(step, params, frozen_arrays, make_assets(config, spec, **(extra_assets or {})))
    checkpoints.close()


def save_state(
    workdir: AnyPath,
    config: ConfigDict,
    spec: DataSpec,
    state: TrainState,
    frozen_arrays: Any = None,
    extra_assets: Mapping[str, Any] | None = None,
) -> None:
    """Makes an ordinary workdir around a training state of a run whose data is not known; it continues at the state's
    step in the order of whatever data it is given. Arguments as in `save_params_only`."""
    checkpoints = Checkpoints(workdir)
    write_config(workdir, config)
    checkpoints.save(state, UNKNOWN_POSITION, frozen_arrays, make_assets(config, spec, **(extra_assets or {})))
    checkpoints.wait()
    checkpoints.close()


def _text(path: Place) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
