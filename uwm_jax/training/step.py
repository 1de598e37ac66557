"""The training step and the held-out loss, as pure functions to be jitted by the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uwm_jax import host_memory
from uwm_jax.diffusion.loss import by_timestep, row_weights
from uwm_jax.parallel.accumulate import value_and_grad
from uwm_jax.parallel.mesh import replicated
from uwm_jax.parallel.sharding import Rules, activations
from uwm_jax.systems.uwm.system import System
from uwm_jax.training import average
from uwm_jax.training.patterns import join, split
from uwm_jax.training.state import TrainState, schedule_factor

Metrics = dict[str, jax.Array]

# Gradient norms are logged by group: the first pattern that a parameter's path holds names its group.
GRADIENT_GROUPS = (
    ("obs_encoder/", "obs_encoder"),
    ("/adaln/", "adaln"),
    ("/qkv/", "attention"),
    ("/proj/", "attention"),
    ("/blocks/fc", "mlp"),
    ("", "tokens"),  # embeddings of actions, patches, positions, timesteps and registers, and the way back
)


def make_train_step(
    config: ConfigDict, system: System, optimizer: Any, mesh: Mesh | None = None
) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`(state, frozen, batch) -> (state, metrics)`.

    Metrics are float32: `loss` (weighted sum), `loss/<modality>`, `grad_norm`, `grad_norm/<group>`, `learning_rate`
    as () arrays, and `loss/<modality>/t<low>-<high>` as (2,) arrays [sum over rows, number of rows].

    Args:
      mesh: over which the batch is spread; None on one device.
    """
    averages, action_free = bool(config.optimizer.ema_decay), config.loss.action_free

    def train_step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(state.hparams.seed), state.step)
        shares = row_weights(batch["action_mask"], action_free)
        trained, still = split(state.params, config.optimizer.freeze)  # no gradients are made for what stays as it is

        def objective(trained: Any, rows: Any) -> tuple[jax.Array, Metrics]:
            batch, shares = rows
            errors, timestep = system.row_losses(join(trained, still), frozen, batch, key)
            parts = {m: (shares[m] * errors[m]).sum() for m in errors}
            total = sum((state.hparams.weights[m] * parts[m] for m in parts), jnp.zeros(()))
            named = parts | by_timestep(jax.lax.stop_gradient(errors), timestep, batch["action_mask"], system.schedule)
            return total, {f"loss/{name}": value for name, value in named.items()}

        (loss, parts), grads = value_and_grad(
            objective, trained, (dict(batch), shares), mesh=mesh, steps=config.accumulation_steps
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        learning_rate = state.hparams.learning_rate * schedule_factor(config, state.step)
        params = join(jax.tree.map(lambda p, u: p - learning_rate * u, trained, updates), still)
        ema_params = state.ema_params
        if averages:
            rate = average.rate(config, state.step)
            ema_params = jax.tree.map(lambda e, p: e + rate * (p - e), ema_params, params)
        metrics = {"loss": loss, **parts, **gradient_norms(grads), "learning_rate": learning_rate}
        state = state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
        return state, metrics

    return train_step


def gradient_norms(grads: Any) -> Metrics:
    """`grad_norm` of all gradients and `grad_norm/<group>` of each group of parameters; () float32."""
    squares: Metrics = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        group = next(group for pattern, group in GRADIENT_GROUPS if pattern in name)
        squares[group] = squares.get(group, jnp.zeros(())) + jnp.sum(jnp.square(grad))
    groups = {f"grad_norm/{group}": jnp.sqrt(square) for group, square in sorted(squares.items())}
    return {"grad_norm": jnp.sqrt(sum(squares.values(), jnp.zeros(()))), **groups}


def make_eval_step(system: System) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], Metrics]:
    """`(state, frozen, batch) -> {"eval/loss/<modality>": (B,)}` with noise that depends on the row alone.

    The noise does not depend on the step or the seed of the run, so two checkpoints compare.
    """

    def eval_step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]) -> Metrics:
        errors, _ = system.row_losses(state.eval_params, frozen, batch, jax.random.key(0), augment=False)
        return {f"eval/loss/{m}": errors[m] for m in errors}

    return eval_step


def compile_for(mesh: Mesh, rules: Rules, function: Callable[..., Any], *inputs: Any, updates_state: bool) -> Any:
    """A function compiled for a mesh, its activations laid out by the rules.

    Args:
      function: `(state, ...) -> (state, metrics)` if `updates_state`, which then reuses the buffers of the state it is
        given; else any, whose results are whole on every device.
      inputs: its arguments: arrays, or shapes with shardings.
    """

    def laid_out(*args: Any) -> Any:
        with activations(mesh, rules):
            return function(*args)

    whole = replicated(mesh)
    outputs = (jax.tree.map(lambda x: x.sharding, inputs[0]), whole) if updates_state else whole
    program = jax.jit(laid_out, out_shardings=outputs, donate_argnums=0 if updates_state else ())
    compiled = program.lower(*inputs).compile()
    host_memory.give_back()
    return compiled
