"""The samplers: one scan over the network, by DDIM for every combination of roles, or by flow matching.

Both can hold promised rows: parts of a sample that are known beforehand, such as the actions that a robot executes
while its next chunk is computed (real-time chunking, Black et al. 2025, arXiv:2506.07339). At every evaluation these
rows are the promised values at the step's noise level, with the noise that the sample starts from, and the sample ends
on the promised values themselves. This is replacement (Song et al. 2021, arXiv:2011.13456, appendix I.2, with one noise
for all levels), an approximation: a sample has one timestep, so the promised rows are as noisy as the others, and the
network learns what they are only as the noise falls.

With `guided`, the estimate x0 of the clean sample is also moved towards promised values p, by pseudoinverse guidance
(Song et al. 2023, "Pseudoinverse-Guided Diffusion Models"): x0 += min(5, 1 / signal) J^T (m (p - x0)), where J = dx0/dx
and m is 1 in promised rows. It costs a vector-Jacobian product an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from uwm_jax.diffusion.flow import Flow
from uwm_jax.diffusion.roles import Role, Roles, generated
from uwm_jax.diffusion.schedule import Schedule

Arrays = Mapping[str, jax.Array]
Rows = tuple[jax.Array, jax.Array]  # promised values (B, n, ...), and (B, n) bool, True where they count

GUIDANCE = 5.0  # bound of the guidance's weight, which is 1 / signal


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
    promised: Mapping[str, Rows] | None = None,
    guided: bool = False,
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
      promised: {modality: rows} of generated modalities; None or {} for plain sampling. A mask that is False everywhere
        gives what plain sampling gives, bit by bit without `guided`.
      guided: whether promised rows also guide all that is generated.
      path: whether to return the states on the way.

    Returns:
      {modality: array} of the generated modalities, whose promised rows are the promised values, not clipped; with
      `path` (S + 1, ...): what each step evaluates, at first the noise, and the sample.

    Raises:
      ValueError: a modality is promised that is not generated.
    """
    promised = dict(promised or {})
    if strange := sorted(promised.keys() - set(generated(roles))):
        raise ValueError(f"promised rows of {strange}: only {list(generated(roles))} is generated")
    steps, previous = jnp.asarray(schedule.timesteps), jnp.asarray(schedule.previous_timesteps)
    levels = {
        Role.GENERATE: steps,
        Role.GIVEN: jnp.zeros_like(steps),
        Role.HIDDEN: jnp.full_like(steps, schedule.sample_hidden_timestep),
    }
    modulations = modulation({m: levels[role] for m, role in roles.items()})
    fixed = {m: (given if role is Role.GIVEN else noise)[m] for m, role in roles.items() if role is not Role.GENERATE}

    def hold(x: dict[str, jax.Array], timestep: jax.Array) -> dict[str, jax.Array]:
        held = {m: schedule.add_noise(promised[m][0], noise[m], timestep) for m in promised}
        return x | {m: _where(promised[m][1], held[m], x[m]) for m in promised}

    def advance(x: dict[str, jax.Array], step: tuple[jax.Array, jax.Array, Any]) -> dict[str, jax.Array]:
        timestep, landing, slice_ = step

        def estimate(x: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            output = predict({**fixed, **x}, slice_)
            both = {m: schedule.clean_and_noise(prediction[m], output[m], x[m], timestep) for m in x}
            return {m: clean for m, (clean, _) in both.items()}, {m: eps for m, (_, eps) in both.items()}

        if guided and promised:
            clean, eps, pull = _guide(estimate, x, promised, schedule.signal_and_noise(timestep, 0)[0])
            clean = {m: clean[m] + pull[m] for m in x}
        else:
            clean, eps = estimate(x)
        return hold({m: schedule.land(clean[m], eps[m], landing, clip[m]) for m in x}, landing)

    start = hold({m: noise[m] for m in generated(roles)}, steps[0])
    return _walk(advance, start, (steps, previous, modulations), path)


def integrate(
    modulation: Callable[[jax.Array], Any],
    predict: Callable[[jax.Array, Any], jax.Array],
    flow: Flow,
    noise: jax.Array,
    *,
    promised: Rows | None = None,
    guided: bool = False,
    path: bool = False,
) -> jax.Array:
    """Samples one modality by flow matching, with Euler's steps between the flow's knots.

    Args:
      modulation, predict: as in `sample`, with arrays in place of dictionaries; `predict` gives the velocity.
      flow: with S inference steps.
      noise: N(0, 1), where it starts.
      promised, guided, path: as in `sample`, of the one modality.

    Returns:
      the sample, not clipped; with `path` (S + 1, ...).
    """
    knots = jnp.asarray(flow.knots)

    def hold(x: jax.Array, time: jax.Array) -> jax.Array:
        return x if promised is None else _where(promised[1], flow.add_noise(promised[0], noise, time), x)

    def advance(x: jax.Array, step: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        time, following, slice_ = step
        if not (guided and promised is not None):
            return hold(flow.euler_step(predict(x, slice_), x, time, following), following)

        def estimate(x: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
            velocity = predict(x["x"], slice_)
            return {"x": x["x"] - time * velocity}, velocity

        _, velocity, pull = _guide(estimate, {"x": x}, {"x": promised}, 1 - time)
        return hold(flow.euler_step(velocity, x, time, following) + (1 - following) * pull["x"], following)

    steps = knots[:-1], knots[1:], modulation(jnp.asarray(flow.timesteps))
    return _walk(advance, hold(noise, knots[0]), steps, path)


def _where(mask: jax.Array, promised: jax.Array, x: jax.Array) -> jax.Array:
    """`promised` in the rows of a mask (B, n), else x (B, n, ...)."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), promised, x)


def _guide(
    estimate: Callable[[dict[str, jax.Array]], tuple[dict[str, jax.Array], Any]],
    x: dict[str, jax.Array],
    promised: Mapping[str, Rows],
    signal: jax.Array,
) -> tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]:
    """Of x -> (clean estimates, something else): both at x, and what guidance adds to the estimates."""
    clean, back, other = jax.vjp(estimate, x, has_aux=True)
    error = {m: jnp.zeros_like(value) for m, value in clean.items()}
    error |= {m: _where(mask, rows - clean[m], error[m]) for m, (rows, mask) in promised.items()}
    (pull,) = back(error)
    weight = jnp.minimum(GUIDANCE, 1 / signal)
    return clean, other, {m: weight * value for m, value in pull.items()}


def _walk(advance: Callable[[Any, Any], Any], start: Any, steps: Any, path: bool) -> Any:
    """`start` after an advance through each slice of `steps`; with `path` all states, on a new leading axis."""

    def body(x: Any, step: Any) -> tuple[Any, Any]:
        x = advance(x, step)
        return x, x if path else None

    end, after = jax.lax.scan(body, start, steps)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, after) if path else end
