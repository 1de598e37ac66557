"""The training state of an official run, so that `uwm_jax.train` continues it: AdamW's moments, updates and step.

Official configurations tell the schedule, its warm-up, the steps and the clipping of the gradient; the numbers of AdamW
are those that its state was saved with. Our data has keys and places of its own, which flags name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.config_checks import matches
from uwm_jax.errors import UserError, warn
from uwm_jax.torch_bridge import layout
from uwm_jax.torch_bridge.adamw_state import FLAG, AdamWState
from uwm_jax.torch_bridge.layout import EntryOf
from uwm_jax.torch_bridge.official_yaml import OfficialYaml, number, typed
from uwm_jax.training import patterns
from uwm_jax.training import state as state_lib
from uwm_jax.training.state import TrainState

# Fields that neither the tensors nor an official configuration decide: how a run goes on, and on which data.
MAY_SET = (
    *config_lib.MAY_CHANGE,
    *("seed", "batch_size", "loss.*", "data.seed", "data.split", "data.text", "data.text_table", "data.action"),
    *("data.drop_nonfinite", "data.max_action", "data.val_ratio", "data.last_action", "data.num_streams"),
    *("data.augment.*", "data.latents", "data.window.pad", "data.window.reserve"),
    *("optimizer.schedule", "optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.clip_norm"),
    "optimizer.freeze",
)

# The schedules of diffusers' `get_scheduler` that ours has too, by the name that the configuration gives.
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}


def configure(
    c: ConfigDict, official: OfficialYaml | None, adamw: AdamWState, overrides: Iterable[tuple[str, str]]
) -> None:
    """Sets the fields of `c` that decide how training goes on.

    Args:
      official: the saved configuration of the run; None where `c` is a run's of ours.
      overrides: `("data.path", "libero")` pairs on top, of fields in `MAY_SET`.

    Raises:
      UserError: a schedule that ours does not have, an override of another field, or no step left to make.
    """
    if official is not None:
        _read_schedule(official, c)
    c.optimizer.update(learning_rate=adamw.learning_rate, weight_decay=adamw.weight_decay, ema_decay=0.0)
    c.optimizer.update(b1=adamw.b1, b2=adamw.b2, eps=adamw.eps)
    before, overrides = config_lib.flatten(c), list(overrides)
    config_lib.apply_overrides(c, overrides)
    for name, value in config_lib.flatten(c).items():
        if before.get(name) != value and not matches(name, MAY_SET):
            raise UserError(
                f"--config.{name}: the official checkpoint decides this field ({before.get(name)!r}). With {FLAG} only "
                f"{', '.join(MAY_SET)} may be set."
            )
    config_lib.validate(c)
    if adamw.steps >= c.total_steps:
        raise UserError(
            f"config.total_steps={c.total_steps}: the official run has made {adamw.steps} steps, so that none is left. "
            f"Give --config.total_steps, or leave {FLAG} out."
        )
    rate = c.optimizer.learning_rate * float(state_lib.schedule_factor(c, jnp.asarray(adamw.steps)))
    if abs(rate - adamw.rate) > 0.01 * max(rate, adamw.rate):
        warn(
            f"the learning rate goes from {adamw.rate:.3g} (the official run's next step) to {rate:.3g} "
            f"(config.optimizer.schedule={c.optimizer.schedule!r}, warmup_steps={c.optimizer.warmup_steps}, "
            f"total_steps={c.total_steps}). --config.optimizer.schedule and the like set another."
        )


def _read_schedule(official: OfficialYaml, c: ConfigDict) -> None:
    """Schedule, steps and clipping, where the configuration names them."""
    if (steps := official.get("num_steps", None)) is not None:
        c.total_steps = int(number(official, "num_steps", steps))
    if clip := official.get("clip_grad_norm", None):
        c.optimizer.clip_norm = number(official, "clip_grad_norm", clip)
    name = official.get("scheduler.name", None)
    if name is None:
        return
    if name not in _SCHEDULES:
        raise official.error("scheduler.name", f"is {name!r}; only {', '.join(_SCHEDULES)} can be continued")
    c.optimizer.schedule = _SCHEDULES[name]
    warmup = official.get("scheduler.num_warmup_steps", None)
    if name != "constant" and warmup is not None:
        c.optimizer.warmup_steps = typed(official, "scheduler.num_warmup_steps", int)
    total = official.get("scheduler.num_training_steps", None)
    if name == "cosine" and total is not None and total != c.total_steps:
        raise official.error(
            "scheduler.num_training_steps", f"is {total}, but num_steps is {c.total_steps}, where our cosine ends"
        )


def make(config: ConfigDict, params: Any, entry_of: EntryOf, adamw: AdamWState, where: str) -> TrainState:
    """The state after `adamw.steps` steps, its large arrays in numpy.

    Args:
      config: as the run continues with it.
      params: our tree, float32.
      entry_of: as `layout.table` takes it.
      where: names the file in messages.

    Raises:
      UserError: the moments are not those of the parameters that are trained; each is named.
    """
    untrained = systems.tree(config).untrained
    patterns.require_matches("optimizer.freeze", config.optimizer.freeze, patterns.names(params))
    trained, _ = patterns.split(params, (*config.optimizer.freeze, *untrained))
    faults = [
        f"{part}: {fault}"
        for part, moments in (("exp_avg", adamw.first), ("exp_avg_sq", adamw.second))
        for fault in layout.find_faults(moments, trained, entry_of)
    ]
    if faults:
        raise UserError("\n".join([_about_faults(where, faults), *(f"  {fault}" for fault in faults)]))
    mu, nu = (layout.from_official(m, trained, entry_of, where) for m in (adamw.first, adamw.second))
    moments = optax.ScaleByAdamState(count=jnp.asarray(adamw.updates, jnp.int32), mu=mu, nu=nu)
    optimizer = state_lib.make_optimizer(config)
    shapes: Sequence[Any] = jax.eval_shape(optimizer.init, trained)
    opt_state = tuple(moments if isinstance(part, optax.ScaleByAdamState) else part for part in shapes)
    return TrainState(
        step=jnp.asarray(adamw.steps, jnp.int32),
        params=params,
        ema_params=None,
        opt_state=opt_state,
        hparams=state_lib.Hparams.from_config(config),
    )


def _about_faults(where: str, faults: Sequence[str]) -> str:
    return (
        f"{FLAG}: {where}: moments unlike the parameters that are trained ({len(faults)}). What the official run did "
        "not train has none, and is named by --config.optimizer.freeze:"
    )


def notes(adamw: AdamWState) -> list[str]:
    """Lines for people."""
    told = [f"the run goes on after {adamw.steps} steps, with the moments of AdamW after {adamw.updates} updates"]
    if adamw.updates < adamw.steps:
        told.append(f"{adamw.steps - adamw.updates} of its steps made no update, as mixed precision skips some")
    return told


def values(adamw: AdamWState) -> Mapping[str, np.ndarray]:
    """All moments by name, for checks of their values."""
    return {
        f"{part} of {name}": value
        for part, moments in (("exp_avg", adamw.first), ("exp_avg_sq", adamw.second))
        for name, value in moments.items()
    }
