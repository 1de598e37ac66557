"""The state that a run carries from step to step, and the optimizer that changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from uwm_jax.config import data_seed, flatten
from uwm_jax.errors import UserError
from uwm_jax.training.patterns import matches, names, require_matches, share, split

Params = Any

# Fields that decide the learning rate at a step as a share of its peak.
SCHEDULE = ("total_steps", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.decay_steps")


class Hparams(flax.struct.PyTreeNode):
    """Scalars that a sweep varies: arrays, so that one compiled step serves every value.

    Attributes:
      seed: () uint32, root of the draws of noise and timesteps.
      data_seed: () uint32, root of the draws of augmentation and of the codec's posterior.
      learning_rate: () float32, the peak; the schedule's shape is static.
      weights: {loss part: () float32}.
    """

    seed: jax.Array
    data_seed: jax.Array
    learning_rate: jax.Array
    weights: dict[str, jax.Array]

    @classmethod
    def from_config(cls, config: ConfigDict) -> Hparams:
        return cls(
            seed=jnp.asarray(config.seed, jnp.uint32),
            data_seed=jnp.asarray(data_seed(config), jnp.uint32),
            learning_rate=jnp.asarray(config.optimizer.learning_rate, jnp.float32),
            weights={name: jnp.asarray(weight, jnp.float32) for name, weight in config.loss.weights.items()},
        )


class TrainState(flax.struct.PyTreeNode):
    """Everything the jitted step reads and writes.

    `step` () int32 counts finished steps; `ema_params` is None without averaging.
    """

    step: jax.Array
    params: Params
    ema_params: Params | None
    opt_state: Any
    hparams: Hparams

    @property
    def eval_params(self) -> Params:
        """The parameters for evaluation and sampling: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW without its learning rate, which the step applies (decay included, as torch does).

    Weight decay acts on every trained parameter, norms and biases too. What `optimizer.freeze` matches is not given to
    it: it has no moments, no decay, and no part in the norm that is clipped.
    """
    o = config.optimizer
    parts = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    parts += [optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps), optax.add_decayed_weights(o.weight_decay)]
    return optax.chain(*parts)


def schedule_factor(config: ConfigDict, step: jax.Array) -> jax.Array:
    """The learning rate at `step` (counted from 0) as a share of its peak.

    Linear warm-up, then one of:

    - `constant`;
    - `cosine`: half a cosine to 0 at `total_steps`;
    - `wsd` (warm-up, stable, decay): constant, and 1 - sqrt(progress) to 0 over the last `decay_steps` (Haegele et al.
      2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", section 3, who find this shape
      ahead of a straight line; the schedule is MiniCPM's, Hu et al. 2024).

    The warm-up is capped by `total_steps`, the decay by what the warm-up leaves, so short runs of long configs work.
    """
    total = config.total_steps
    warmup = min(config.optimizer.warmup_steps, total)
    step = jnp.asarray(step, jnp.float32)
    factor = jnp.ones(())
    if config.optimizer.schedule == "cosine":
        progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    elif (start := decay_start(config)) is not None:
        progress = jnp.clip((step - start) / max(total - start, 1), 0.0, 1.0)
        factor = 1.0 - jnp.sqrt(progress)
    return jnp.where(step < warmup, step / max(warmup, 1), factor)


def decay_start(config: ConfigDict) -> int | None:
    """Finished steps after which the decay of schedule `wsd` begins; None with other schedules.

    All runs that differ in `total_steps` alone agree up to the earliest of their starts.
    """
    o, total = config.optimizer, config.total_steps
    return max(total - o.decay_steps, min(o.warmup_steps, total)) if o.schedule == "wsd" else None


def change_of_rate(config: ConfigDict, before: ConfigDict, step: int) -> str:
    """An addition to "continuing from step ..." where other `SCHEDULE` fields change the learning rate; else "".

    Args:
      before: the config of the start before.
      step: finished steps.
    """
    peak = config.optimizer.learning_rate
    last = peak * float(schedule_factor(before, jnp.asarray(max(step - 1, 0))))
    following = peak * float(schedule_factor(config, jnp.asarray(step)))
    now, then = flatten(config), flatten(before)
    changed = [f"config.{name} is {now[name]}, was {then[name]}" for name in SCHEDULE if now[name] != then[name]]
    if not changed or abs(following - last) <= 0.05 * max(following, last):
        return ""
    return (
        f"; {', '.join(changed)}, so that the learning rate goes from {last:.2g} (the last step's) to {following:.2g} "
        f"(config.optimizer.schedule={config.optimizer.schedule})"
    )


def create(
    config: ConfigDict, params: Params, optimizer: optax.GradientTransformation, untrained: Sequence[str] = ()
) -> TrainState:
    """A fresh state around parameters; `untrained` as `TreeInfo` has it.

    Raises:
      UserError: a pattern of `optimizer.freeze` matches nothing, or all together everything.
    """
    freeze = config.optimizer.freeze
    require_matches("optimizer.freeze", freeze, names(params))
    trained, _ = split(params, (*freeze, *untrained))
    if not trained:
        raise UserError(f"config.optimizer.freeze={freeze} matches all parameters: there is nothing to train.")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None,
        opt_state=optimizer.init(trained),
        hparams=Hparams.from_config(config),
    )


def about_frozen(config: ConfigDict, params: Params) -> str:
    """A line, with its end, about what `optimizer.freeze` keeps as it is; "" without it."""
    sizes = {name: int(x.size) for name, x in traverse_util.flatten_dict(params, sep="/").items()}
    still = [name for name in sizes if matches(name, config.optimizer.freeze)]
    if not still:
        return ""
    text = f"frozen by config.optimizer.freeze: {len(still)} arrays ({share(still, sizes)}); trained: "
    return text + f"{sum(size for name, size in sizes.items() if name not in still) / 1e6:.4g} M parameters\n"


def with_params(state: TrainState, params: Params) -> TrainState:
    """A fresh state around other parameters, from which the average starts as well."""
    ema_params = jax.tree.map(jnp.copy, params) if state.ema_params is not None else None
    return state.replace(params=params, ema_params=ema_params)
