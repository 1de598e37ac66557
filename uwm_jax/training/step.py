"""The training step and the held-out loss, as pure functions to be jitted by the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from uwm_jax.system import System
from uwm_jax.training.state import TrainState, schedule_factor

Metrics = dict[str, jax.Array]


def make_train_step(
    config: ConfigDict, system: System, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`(state, frozen, batch) -> (state, metrics)`; metrics are () float32 arrays."""
    ema_decay = config.optimizer.ema_decay

    def train_step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(state.hparams.seed), state.step)

        def objective(params: Any) -> tuple[jax.Array, Metrics]:
            return system.loss(params, frozen, batch, key, state.hparams.weights)

        (loss, parts), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learning_rate = state.hparams.learning_rate * schedule_factor(config, state.step)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        ema_params = state.ema_params
        if ema_decay:
            ema_params = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema_params, params)
        metrics = {
            "loss": loss,
            **parts,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": learning_rate,
        }
        state = state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
        return state, metrics

    return train_step


def make_eval_step(
    system: System,
) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], Metrics]:
    """`(state, frozen, batch) -> {"eval/loss/...": ()}` with noise that depends on the row alone.

    The noise does not depend on the step or the seed of the run, so two checkpoints compare.
    """

    def eval_step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]) -> Metrics:
        params = state.params if state.ema_params is None else state.ema_params
        weights = {m: jnp.ones(()) for m in state.hparams.weights}
        _, parts = system.loss(params, frozen, batch, jax.random.key(0), weights, augment=False)
        return {f"eval/{name}": value for name, value in parts.items()}

    return eval_step
