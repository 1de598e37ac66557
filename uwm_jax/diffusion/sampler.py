"""The samplers: one scan over the network, by DDIM for every combination of roles, or by flow matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from uwm_jax.diffusion.flow import Flow
from uwm_jax.diffusion.roles import Role, Roles, generated
from uwm_jax.diffusion.schedule import Schedule

Arrays = Mapping[str, jax.Array]


def sample(
    modulation: Callable[[dict[str, jax.Array]], Any],
    predict: Callable[[dict[str, jax.Array], Any], dict[str, jax.Array]],
    schedule: Schedule,
    roles: Roles,
    *,
    noise: Arrays,
    given: Arrays,
    prediction: Mapping[str, str],
    clip: Mapping[str, float],
    path: bool = False,
) -> dict[str, jax.Array]:
    """Samples the modalities whose role is to be generated, by deterministic DDIM.

    Args:
      modulation: {modality: (S,) timesteps} -> a tree with leading axis S, what the network needs to know
        of the timesteps; called once, so that nothing that depends on timesteps alone is in the scan.
      predict: ({modality: array}, one slice of that tree) -> {modality: network output}.
      schedule: noise schedule with S inference steps.
      roles: of all modalities.
      noise: {modality: array}, N(0, 1): where generation starts, or what stands in for a hidden modality.
      given: {modality: clean array} for the modalities that are given.
      prediction, clip: per modality, as in `Schedule.ddim_step`.
      path: whether to return the states on the way.

    Returns:
      {modality: array} of the generated modalities; with `path` (S + 1, ...): the noise, and what each step made of it.
    """
    steps, previous = jnp.asarray(schedule.timesteps), jnp.asarray(schedule.previous_timesteps)
    levels = {
        Role.GENERATE: steps,
        Role.GIVEN: jnp.zeros_like(steps),
        Role.HIDDEN: jnp.full_like(steps, schedule.sample_hidden_timestep),
    }
    modulations = modulation({m: levels[role] for m, role in roles.items()})
    fixed = {m: (given if role is Role.GIVEN else noise)[m] for m, role in roles.items() if role is not Role.GENERATE}

    def advance(x: dict[str, jax.Array], step: tuple[jax.Array, jax.Array, Any]) -> dict[str, jax.Array]:
        timestep, landing, slice_ = step
        output = predict({**fixed, **x}, slice_)
        return {m: schedule.ddim_step(prediction[m], output[m], x[m], timestep, landing, clip[m]) for m in x}

    return _walk(advance, {m: noise[m] for m in generated(roles)}, (steps, previous, modulations), path)


def integrate(
    modulation: Callable[[jax.Array], Any],
    predict: Callable[[jax.Array, Any], jax.Array],
    flow: Flow,
    noise: jax.Array,
    *,
    path: bool = False,
) -> jax.Array:
    """Samples one modality by flow matching, with Euler's steps between the flow's knots.

    Args:
      modulation, predict: as in `sample`, with arrays in place of dictionaries; `predict` gives the velocity.
      flow: with S inference steps.
      noise: N(0, 1), where it starts.
      path: as in `sample`.

    Returns:
      the sample, not clipped; with `path` (S + 1, ...).
    """
    knots = jnp.asarray(flow.knots)

    def advance(x: jax.Array, step: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        time, following, slice_ = step
        return flow.euler_step(predict(x, slice_), x, time, following)

    return _walk(advance, noise, (knots[:-1], knots[1:], modulation(jnp.asarray(flow.timesteps))), path)


def _walk(advance: Callable[[Any, Any], Any], start: Any, steps: Any, path: bool) -> Any:
    """`start` after an advance through each slice of `steps`; with `path` all states, on a new leading axis."""

    def body(x: Any, step: Any) -> tuple[Any, Any]:
        x = advance(x, step)
        return x, x if path else None

    end, after = jax.lax.scan(body, start, steps)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, after) if path else end
