"""The training step and the held-out loss, as pure functions to be jitted by the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uwm_jax.parallel.accumulate import value_and_grad
from uwm_jax.parallel.compiling import compile_lowered
from uwm_jax.parallel.mesh import replicated
from uwm_jax.parallel.sharding import Rules, activations
from uwm_jax.systems.base import System
from uwm_jax.training import average
from uwm_jax.training.metrics import Last, Mean, Metric, Ratio
from uwm_jax.training.patterns import join, split
from uwm_jax.training.state import TrainState, schedule_factor

Metrics = dict[str, Metric]
Sums = tuple[dict[str, jax.Array], Metrics]  # the loss parts and the buckets, summed over rows


def make_train_step(
    config: ConfigDict, system: System, optimizer: Any, mesh: Mesh | None = None
) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`(state, frozen, batch) -> (state, metrics)`.

    Metrics: `loss` (weighted sum), `grad_norm` and `grad_norm/<group>`, each a `Mean`; `learning_rate`, a `Last`;
    `loss/<part>`, a `Ratio` of its mean over rows to 1, or to 0 where no row trained the part; and a system's buckets,
    such as `loss/<part>/t<low>-<high>`, each a `Ratio` of the sum over rows to their number.

    Args:
      mesh: over which the batch is spread; None on one device.
    """

    def train_step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key, data_key = (
            jax.random.fold_in(jax.random.key(seed), state.step)
            for seed in (state.hparams.seed, state.hparams.data_seed)
        )
        shares = system.shares(batch, key)
        trained, still = divide(config, system, state.params)  # no gradients are made for what stays as it is

        def objective(trained: Any, rows: Any) -> tuple[jax.Array, Sums]:
            batch, shares = rows
            encoded, draws = system.encode(frozen, batch, data_key), system.draws(key, batch["row"])
            return weighted_loss(system, join(trained, still), state.hparams.weights, encoded, draws, shares)

        (loss, sums), grads = value_and_grad(
            objective, trained, (dict(batch), shares), mesh=mesh, steps=config.accumulation_steps
        )
        return finish(config, system, optimizer, state, loss, sums, grads, shares)

    return train_step


def divide(config: ConfigDict, system: System, params: Any) -> tuple[Any, Any]:
    """Parameters as (those that are trained, those that stay as they are)."""
    return split(params, (*config.optimizer.freeze, *system.tree.untrained))


def weighted_loss(
    system: System,
    params: Any,
    weights: Mapping[str, jax.Array],
    encoded: Any,
    draws: Any,
    shares: Mapping[str, jax.Array],
) -> tuple[jax.Array, Sums]:
    """(the weighted sum of the loss parts over rows (), the parts and the buckets): sums over rows, all of them.

    Args:
      encoded, draws: of `System.encode` and `System.draws`.
      shares: {part: (B,)} of the rows in each part.
    """
    found = system.losses(params, encoded, draws, train=True)
    parts = {name: (shares[name] * x).sum() for name, x in found.parts.items()}
    total = sum((weights[name] * x for name, x in parts.items()), jnp.zeros(()))
    return total, (parts, {f"loss/{name}": Ratio(*bucket) for name, bucket in found.buckets.items()})


def finish(
    config: ConfigDict,
    system: System,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loss: jax.Array,
    sums: Sums,
    grads: Any,
    shares: Mapping[str, jax.Array],
) -> tuple[TrainState, Metrics]:
    """The state after a step with these gradients, and its metrics.

    Args:
      loss, sums: of `weighted_loss`, over the whole batch.
      grads: of the trained parameters.
    """
    parts, buckets = sums
    trained, still = divide(config, system, state.params)
    # A part that no row trained counts for nothing in the means of the log.
    counts = {name: (share > 0).any().astype(jnp.float32) for name, share in shares.items()}
    losses = {f"loss/{name}": Ratio(x, counts[name]) for name, x in parts.items()}
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    learning_rate = state.hparams.learning_rate * schedule_factor(config, state.step)
    params = join(jax.tree.map(lambda p, u: p - learning_rate * u, trained, updates), still)
    ema_params = state.ema_params
    if config.optimizer.ema_decay:
        rate = average.rate(config, state.step)
        ema_params = jax.tree.map(lambda e, p: e + rate * (p - e), ema_params, params)
    norms = {name: Mean(x) for name, x in gradient_norms(grads, system.tree.gradient_groups).items()}
    metrics = {"loss": Mean(loss), **losses, **buckets, **norms, "learning_rate": Last(learning_rate)}
    return state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state), metrics


def gradient_norms(grads: Any, groups: Sequence[tuple[str, str]]) -> dict[str, jax.Array]:
    """`grad_norm` of all gradients and `grad_norm/<group>` of each group of parameters; () float32.

    Args:
      groups: (part of a parameter's path, group) pairs; the first that fits counts.
    """
    squares: dict[str, jax.Array] = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        group = next(group for pattern, group in groups if pattern in name)
        squares[group] = squares.get(group, jnp.zeros(())) + jnp.sum(jnp.square(grad))
    norms = {f"grad_norm/{group}": jnp.sqrt(square) for group, square in sorted(squares.items())}
    return {"grad_norm": jnp.sqrt(sum(squares.values(), jnp.zeros(()))), **norms}


def make_eval_step(system: System) -> Callable[[Any, Any, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """`(params, frozen, batch) -> {"loss/<part>": (B,)}` with draws that depend on the row alone.

    The draws do not depend on the step or the seed of the run, so two checkpoints compare.
    """

    def eval_step(params: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        key = jax.random.key(0)
        found = system.losses(params, system.encode(frozen, batch), system.draws(key, batch["row"]))
        return {f"loss/{name}": x for name, x in found.parts.items()}

    return eval_step


def compile_for(mesh: Mesh, rules: Rules, function: Callable[..., Any], *inputs: Any, updates_state: bool) -> Any:
    """A function compiled for a mesh; arguments as `lower_for`."""
    return compile_lowered(mesh, lower_for(mesh, rules, function, *inputs, updates_state=updates_state))


def lower_for(
    mesh: Mesh, rules: Rules, function: Callable[..., Any], *inputs: Any, updates_state: bool
) -> jax.stages.Lowered:
    """A function lowered for a mesh, its activations laid out by the rules.

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
    return jax.jit(laid_out, out_shardings=outputs, donate_argnums=0 if updates_state else ()).lower(*inputs)
