"""Branches: runs that go on from a checkpoint of another run, the trunk, under another schedule (`config.branch_from`).

A decay of the learning rate cannot be undone, and a run that is to last longer goes on from before it. The branch takes
parameters, their average, the optimizer's moments, the step and the data's position, so that with the trunk's own
schedule it makes the trunk's steps, bit for bit; nothing that decides a step but the schedule may differ.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.files import Place
from uwm_jax.hub.names import parse_origin
from uwm_jax.training import finetune, fixed_fields
from uwm_jax.training import state as state_lib
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint
from uwm_jax.training.state import TrainState

MAY_DIFFER = (*state_lib.SCHEDULE[1:], *config_lib.MAY_CHANGE)  # of a branch and its trunk


def open_trunk(config: ConfigDict) -> CheckpointReader:
    """The checkpoint that `config.branch_from` names, all but its arrays read and verified.

    Raises:
      UserError: no such workdir or step, one that cannot be read, a field outside of `MAY_DIFFER` that differs, or no
        step left to make.
    """
    spec = config.branch_from
    named = f"config.branch_from={spec!r}"
    stored, steps = finetune.locate(spec, "branch_from")
    if parse_origin(spec, "branch_from")[1] is None:
        raise UserError(
            f"{named}: expected DIR@STEP, with one of the steps {steps} of the checkpoints there (or, on the hub, "
            "owner/name@revision@STEP)."
        )
    try:
        stored.verify_small()
    except CorruptCheckpoint as e:
        raise UserError(f"{named}: {e}. Name another step of {steps}.") from e
    trunk = config_lib.with_origins(fixed_fields.stored_config(stored), branch_from=spec)
    when = "in a branch: leave it as it was there, or start from its parameters alone (config.init_from)"
    config_lib.refuse_changed(config, trunk, MAY_DIFFER, f"the run of {named}", when)
    if stored.step >= config.total_steps:
        raise UserError(f"{named}: expected a step below config.total_steps={config.total_steps}.")
    return stored


def restore(stored: CheckpointReader, like: TrainState) -> TrainState:
    """The training state of the checkpoint that `open_trunk` gave.

    Args:
      like: its shapes, dtypes and shardings.

    Raises:
      UserError: it is damaged, or does not fit `like`.
    """
    checkpoints = Checkpoints(stored.workdir, read_only=True)
    try:
        return checkpoints.restore_state(stored.step, like)[0]
    except CorruptCheckpoint as e:
        raise UserError(f"config.branch_from: {e}. Name another step of {checkpoints.steps()}.") from e


def refuse_longer(workdir: Place, config: ConfigDict, before: ConfigDict, newest: int) -> None:
    """Refuses more steps for a run whose learning rate has begun to decay to 0.

    Args:
      before: the config of the start before.
      newest: the step of its newest checkpoint.

    Raises:
      UserError: names the step to branch from.
    """
    start = state_lib.decay_start(before)
    if start is None or newest <= start or config.total_steps <= before.total_steps:
        return
    steps = Checkpoints(workdir, read_only=True).steps()
    kept = max((step for step in steps if step <= start), default=None)
    todo = (
        f"Go on from before it, in a new --workdir: --config.branch_from={workdir}@{kept}"
        if kept is not None
        else "No checkpoint from before it is left: start anew in a new --workdir"
    )
    raise UserError(
        f"config.total_steps is {config.total_steps}, was {before.total_steps}, but the newest checkpoint of this run, "
        f"{newest}, lies in the decay of the learning rate, which began after step {start} "
        f"(config.optimizer.schedule='wsd'). {todo}."
    )
