"""Promised rows of a sample: both samplers against plain loops, and the seam that is left with an exact denoiser."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.diffusion import sampler
from uwm_jax.diffusion.flow import Flow
from uwm_jax.diffusion.roles import Role
from uwm_jax.diffusion.schedule import Schedule
from uwm_jax.systems.uwm.modes import MODES

SHAPES = {"action": (2, 4, 3), "next_obs": (2, 5)}
PREDICTION, CLIP = {"action": "epsilon", "next_obs": "sample"}, {"action": 1.0, "next_obs": 2.0}
MASK = np.array([[True, True, False, False], [True, False, False, False]])


def toy(noisy, timestep):
    """A network in which every output depends on both inputs of its row, and on both timesteps."""
    mixed = jnp.tanh(noisy["action"].mean(axis=(1, 2)) + noisy["next_obs"].mean(axis=1))
    level = 0.01 * timestep["action"] - 0.02 * timestep["next_obs"]
    return {m: jnp.sin(2 * x + level) * mixed.reshape(-1, *[1] * (x.ndim - 1)) for m, x in noisy.items()}


def drawn(seed=0):
    """Noise and known values of both modalities; some of the promised actions lie outside of the clip."""
    rng = np.random.default_rng(seed)
    noise, known = ({m: jnp.asarray(rng.normal(size=s), jnp.float32) for m, s in SHAPES.items()} for _ in range(2))
    return noise, known


SCHEDULE = Schedule(num_inference_steps=4)


@functools.partial(jax.jit, static_argnames=("mode", "guided", "path"))
def sample(mode, noise, known, promised=None, guided=False, path=False):
    options = {"prediction": PREDICTION, "clip": CLIP, "promised": promised, "guided": guided, "path": path}
    return sampler.sample(lambda timestep: timestep, toy, SCHEDULE, MODES[mode], noise=noise, given=known, **options)


def replaced(value, noise, x, signal, sigma):
    """x with the promised rows of `MASK` at a noise level."""
    out = np.array(x)
    out[MASK] = (signal * np.asarray(value) + sigma * np.asarray(noise))[MASK]
    return jnp.asarray(out)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("mode", ["policy", "inverse", "joint"])
def test_ddim_against_a_loop(mode, guided):
    schedule, (noise, known) = SCHEDULE, drawn()
    promised = {"action": (known["action"], jnp.asarray(MASK))}
    path = sample(mode, noise, known, promised, guided, path=True)
    found = {m: states[-1] for m, states in path.items()}

    made = [m for m, role in MODES[mode].items() if role is Role.GENERATE]
    x = {m: known[m] if MODES[mode][m] is Role.GIVEN else noise[m] for m in SHAPES}
    states = []
    for t in (75, 50, 25, 0):
        abar = float(schedule.alphas_cumprod[t])
        x["action"] = replaced(known["action"], noise["action"], x["action"], abar**0.5, (1 - abar) ** 0.5)
        states.append(dict(x))
        levels = {Role.GENERATE: t, Role.GIVEN: 0, Role.HIDDEN: 75}
        timestep = {m: levels[role] for m, role in MODES[mode].items()}

        def both(generated, x=x, timestep=timestep, t=t):
            noisy = x | generated
            out = toy(noisy, timestep)
            return {m: schedule.clean_and_noise(PREDICTION[m], out[m], noisy[m], jnp.asarray(t)) for m in made}

        generated = {m: x[m] for m in made}
        clean, eps = ({m: pair[i] for m, pair in both(generated).items()} for i in range(2))
        if guided:
            jacobian = jax.jacfwd(lambda z, both=both: both(z)["action"][0])(generated)
            error = jnp.where(MASK[..., None], known["action"] - clean["action"], 0)
            weight = min(5, abar**-0.5)
            clean = {m: clean[m] + weight * jnp.tensordot(error, jacobian[m], axes=3) for m in made}
        after = float(schedule.alphas_cumprod[t - 25]) if t else 1.0
        for m in made:
            x[m] = after**0.5 * jnp.clip(clean[m], -CLIP[m], CLIP[m]) + (1 - after) ** 0.5 * eps[m]
    x["action"] = replaced(known["action"], noise["action"], x["action"], 1, 0)
    states.append(x)

    for m in made:
        np.testing.assert_allclose(path[m], jnp.stack([state[m] for state in states]), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["action"][MASK], known["action"][MASK])
    assert jnp.abs(found["action"][MASK]).max() > CLIP["action"], "promised rows are not clipped"


@pytest.mark.parametrize("guided", [False, True])
def test_flow_against_a_loop(guided):
    flow, (noise, known) = Flow(100, 5, timeshift=2.0), drawn()
    noise, known = noise["action"], known["action"]

    def velocity(x, time):
        return jnp.sin(2 * x + time) * jnp.tanh(x.mean(axis=(1, 2), keepdims=True))

    promised = known, jnp.asarray(MASK)
    found = sampler.integrate(lambda t: jnp.asarray(flow.knots[:-1]), velocity, flow, noise, promised=promised,
                              guided=guided)  # fmt: skip
    x = noise
    for now, after in zip(flow.knots[:-1], flow.knots[1:], strict=True):
        x = replaced(known, noise, x, 1 - now, now)
        v = velocity(x, now)
        clean, eps = x - now * v, x + (1 - now) * v
        if guided:
            jacobian = jax.jacfwd(lambda z, now=now: z - now * velocity(z, now))(x)
            weight = 5 if now == 1 else min(5, 1 / (1 - now))
            clean += weight * jnp.tensordot(jnp.where(MASK[..., None], known - clean, 0), jacobian, axes=3)
        x = (1 - after) * clean + after * eps
    x = replaced(known, noise, x, 1, 0)
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[MASK], known[MASK])


def test_what_is_not_promised_does_not_matter():
    """Neither values in rows that do not count, NaN among them, nor a mask that is False everywhere."""
    noise, known = drawn()
    action, none = known["action"], jnp.zeros(MASK.shape, bool)
    plain = sample("joint", noise, known)
    empty = sample("joint", noise, known, {"action": (action * jnp.nan, none)})
    for m, x in plain.items():
        np.testing.assert_array_equal(x, empty[m])
    for guided in (False, True):
        whole, holes = (
            sample("joint", noise, known, promised={"action": (rows, jnp.asarray(MASK))}, guided=guided)
            for rows in (action, jnp.where(MASK[..., None], action, jnp.nan))
        )
        for m, x in whole.items():
            np.testing.assert_array_equal(x, holes[m])


def test_rows_of_a_batch_do_not_see_each_other():
    noise, known = drawn()
    both = sample("policy", noise, known, promised={"action": (known["action"], jnp.asarray(MASK))}, guided=True)
    for i in range(2):
        one = [{m: x[i : i + 1] for m, x in some.items()} for some in (noise, known)]
        promised = {"action": (one[1]["action"], jnp.asarray(MASK[i : i + 1]))}
        alone = sample("policy", *one, promised=promised, guided=True)
        np.testing.assert_allclose(alone["action"][0], both["action"][i], rtol=0, atol=1e-6)


def test_what_is_not_sampled_cannot_be_promised():
    noise, known = drawn()
    with pytest.raises(ValueError, match=r"promised rows of \['action'\]: only \['next_obs'\] is generated"):
        sample("forward", noise, known, promised={"action": (known["action"], jnp.asarray(MASK))})


# --- The seam ---------------------------------------------------------------------------------------

LENGTH, EXECUTE, DELAY, COLUMNS, ROWS = 16, 8, 4, 3, 400
STD = 0.37


def covariance(kernel):
    """(T, T) of a chunk's rows: smooth motions of about `length` steps, or a random walk that forgets."""
    lag = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
    return STD**2 * (np.exp(-((lag / 3) ** 2) / 2) if kernel == "smooth" else np.exp(-lag / 8))


def exact(kernel, kind):
    """noise (B, T, D) -> chunks, by E[x0 | x_t] of N(0, covariance) in closed form."""
    cov = jnp.asarray(covariance(kernel), jnp.float32)

    def posterior_mean(x, signal, sigma):
        gain = jnp.linalg.solve(signal**2 * cov + sigma**2 * jnp.eye(LENGTH), signal * cov)
        return jnp.einsum("bkd,kl->bld", x, gain, precision="highest")

    if kind == "flow":
        flow = Flow()
        return lambda noise, promised=None, **options: sampler.integrate(
            lambda timestep: jnp.asarray(flow.knots[:-1]),
            lambda x, time: (x - posterior_mean(x, 1 - time, time)) / time,
            flow, noise, promised=promised, **options,
        )  # fmt: skip
    schedule = Schedule(spacing=kind)

    def predict(noisy, timestep):
        signal, sigma = schedule.signal_and_noise(timestep, 0)
        return {"x": (noisy["x"] - signal * posterior_mean(noisy["x"], signal, sigma)) / sigma}

    return lambda noise, promised=None, **options: sampler.sample(
        lambda timestep: timestep["x"], predict, schedule, {"x": Role.GENERATE}, noise={"x": noise}, given={},
        prediction={"x": "epsilon"}, clip={"x": 0.0}, promised=promised and {"x": promised}, **options,
    )["x"]  # fmt: skip


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize("kind", ["leading", "trailing", "flow"])
@pytest.mark.parametrize("kernel", ["smooth", "rough"])
def test_seam_with_an_exact_denoiser(kernel, kind):
    """The step from the last promised action of the old chunk to the first free one of the next, which was asked for
    `EXECUTE` steps later and is used from `DELAY` steps after that: at most 0.7 of that between independent chunks."""
    chunks = jax.jit(exact(kernel, kind), static_argnames="guided")
    first, second = (jax.random.normal(jax.random.key(i), (ROWS, LENGTH, COLUMNS)) for i in range(2))
    old = chunks(first)
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < DELAY, (ROWS, LENGTH))
    promised = jnp.roll(old, -EXECUTE, axis=1), mask
    last = old[:, EXECUTE + DELAY - 1]
    naive = rms(chunks(second)[:, DELAY] - last)
    replacement, guided = (rms(chunks(second, promised, guided=g)[:, DELAY] - last) for g in (False, True))
    assert replacement <= 0.7 * naive and guided < 0.8 * replacement
    assert naive > 0.9 * np.sqrt(2) * rms(old), "chunks of different noise have nothing to do with each other"
