"""Errors of a window's actions and frames, and their means over windows with intervals.

Errors of each window are computed on the devices (`errors`); means, intervals and comparisons are taken on the
host (`summarize`), where all windows are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.errors import RunError
from uwm_jax.systems.base import Use

Stored = dict[str, Any]  # mean, lo and hi of its interval (None below FEWEST episodes), over n windows of `episodes`
Metrics = dict[str, Stored]
Pairs = Mapping[str, tuple[str, str]]  # {name of a pair: (the one that should be better, the other)}

FEWEST = 6  # episodes: that five all point one way happens by chance once in 16 times, which is more than 5 %
TOO_FEW = "too few"  # in place of an interval

CHANGED = 0.05  # how far a value must be from the last current frame's, in [0, 1], to count as changed

UNBOUNDED = (-math.inf, math.inf)
_Z = 1.959964  # 97.5 % of the normal distribution lies below
_LAST_GROUPS = ("loss", "baseline", "control", "paired")  # of metrics, in this order, after those of the uses
_LEAST_PIXEL_MSE = 1e-10  # for psnr, which is 100 dB there

# Smallest and largest possible value by the last part of a metric's name; frames lie in [0, 1].
BOUNDS = {
    "action_mse": (0.0, math.inf),
    "latent_mse": (0.0, math.inf),
    "pixel_mse": (0.0, 1.0),
    "changed_mse": (0.0, 1.0),
    "psnr": (0.0, -10 * math.log10(_LEAST_PIXEL_MSE)),
}

_PAIRED_METRICS = ("action_mse", "latent_mse", "pixel_mse", "changed_mse")

# Windows without the one are left out of the metrics that hold the other in their name.
_NEEDED = {
    "has_changed": ("changed_mse",),
    "has_last_action": ("last_action", "linear_interpolation"),
}


def pairs_of(uses: Mapping[str, Use], acting: str) -> Pairs:
    """Comparisons window by window.

    A use that makes actions, and acts or is told something, is set against actions that need no model; one that makes
    frames from known actions against another window's actions and against frames that need no model. A use that is told
    all that another is, and more, is set against that one if both make the same.
    """
    found: dict[str, tuple[str, str]] = {}
    knows_actions = any("action" in use.given for use in uses.values())
    for name, use in uses.items():
        others = []
        if "action" in use.makes and (name == acting or use.given):
            others += ["mean_action", "linear_interpolation" if use.given else "last_action"]
        if "next_obs" in use.makes and ("action" in use.given or not knows_actions):
            others += ["copied_frame", "mean_image"]
        found |= {f"{name}_vs_{other}": (name, f"baseline/{other}") for other in others}
        if "next_obs" in use.makes and "action" in use.given:
            found[f"{name}_vs_shuffled"] = (name, f"control/{name}_shuffled")
        for other, less in uses.items():
            if use.makes == less.makes and set(less.given) < set(use.given) and use.sees_obs >= less.sees_obs:
                found[f"{name}_vs_{other}"] = (name, other)
    return found


def errors(made: Mapping[str, jax.Array], truth: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Errors of the actions and frames of a batch of windows, for the keys present.

    Args:
      made: `action` (B, Ta, Da) normalised; `next_obs_latent` (B, V, T, h, w, C); `next_obs` (B, V, T, H, W, 3) in
        [0, 1]; or shapes that broadcast to these.
      truth: all of them, and `changed`, bool, the values of `next_obs` that differ from the last current frame.

    Returns:
      {metric: (B,) float32}: `action_mse`, `latent_mse`, `pixel_mse`, `changed_mse` (over changed values only; 0 where
      there are none) and `psnr` in dB.
    """
    found = {}
    for name, metric in (("action", "action_mse"), ("next_obs_latent", "latent_mse")):
        if name in made:
            found[metric] = _mean(jnp.square(made[name] - truth[name]))
    if "next_obs" in made:
        square = jnp.square(made["next_obs"] - truth["next_obs"])
        found["pixel_mse"] = _mean(square)
        changed = truth["changed"].astype(jnp.float32)
        found["changed_mse"] = _mean(square * changed) / jnp.maximum(_mean(changed), 1e-12)
        found["psnr"] = -10 * jnp.log10(jnp.maximum(found["pixel_mse"], _LEAST_PIXEL_MSE))
    return found


def _mean(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def summarize(values: Mapping[str, np.ndarray], episodes: np.ndarray, pairs: Pairs) -> Metrics:
    """Every metric over windows, and the differences of pairs, each as `interval` gives it.

    A metric for which no window counts is left out.

    Args:
      values: {metric: (N,)}, of which `has_changed` and `has_last_action`, bool, say which windows count for what.
      episodes: (N,) of each window.
      pairs: as `pairs_of` gives them.

    Returns:
      {metric: interval} and {`paired/<pair>/<metric>`: interval of the other's error minus the first's}: positive
      where the first is better.

    Raises:
      RunError: a metric is NaN or infinite.
    """
    measured = {name: np.asarray(value, np.float64) for name, value in values.items() if name not in _NEEDED}
    for name, (better, other) in _differences(measured, pairs).items():
        measured[name] = measured[other] - measured[better]
    summary = {}
    groups = [group for group in dict.fromkeys(name.split("/")[0] for name in measured) if group not in _LAST_GROUPS]
    groups += _LAST_GROUPS
    for name, value in sorted(measured.items(), key=lambda item: (groups.index(item[0].split("/")[0]), item[0])):
        counts = np.ones(len(episodes), np.bool_)
        for needed, parts in _NEEDED.items():
            if needed in values and any(part in name for part in parts):
                counts &= np.asarray(values[needed], np.bool_)
        if bad := np.flatnonzero(~np.isfinite(value) & counts).tolist():
            raise RunError(
                f"{name} is {value[bad[0]]} in held-out window {bad[0]} and {len(bad) - 1} more: the samples are not "
                "finite. Check the parameters, or sample with config.diffusion.clip above 0; a run goes on without "
                "evaluations with --config.eval.every=0."
            )
        if counts.any():
            summary[name] = interval(value[counts], episodes[counts], bounds_of(name))
    return summary


def names_of(values: Iterable[str], pairs: Pairs) -> frozenset[str]:
    """The metrics that `summarize` can give for values of these names."""
    measured = set(values) - _NEEDED.keys()
    return frozenset(measured | _differences(measured, pairs).keys())


def _differences(measured: Collection[str], pairs: Pairs) -> dict[str, tuple[str, str]]:
    """{`paired/<pair>/<metric>`: (metric of the better, of the other)} of those pairs that are measured."""
    found = {}
    for pair, names in pairs.items():
        for metric in _PAIRED_METRICS:
            better, other = (f"{name}/{metric}" for name in names)
            if better in measured and other in measured:
                found[f"paired/{pair}/{metric}"] = better, other
    return found


def bounds_of(name: str) -> tuple[float, float]:
    """Smallest and largest possible value of a metric of `summarize`."""
    low, high = BOUNDS.get(name.rsplit("/", 1)[-1], UNBOUNDED)
    return difference_bounds(low, high) if name.startswith("paired/") else (low, high)


def difference_bounds(low: float, high: float) -> tuple[float, float]:
    """Bounds of the difference of two values that lie in [low, high]."""
    return low - high, high - low


def proportion(successes: np.ndarray) -> Stored:
    """Share of successes with the 95 % interval of Wilson's score, which is not empty where all or none succeeded.

    Args:
      successes: (N,) bool, one an episode.

    Returns:
      As `interval`.
    """
    p, lo, hi = _wilson(np.asarray(successes, np.bool_))
    return _stored(p, lo, hi, len(successes), len(successes))


def proportion_difference(first: np.ndarray, second: np.ndarray) -> Stored:
    """Share of successes of `first` minus that of `second` in the same episodes, in [-1, 1].

    The interval is that of Newcombe (1998, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", method 10): Wilson's intervals of both shares, combined by their correlation.

    Args:
      first, second: (N,) bool, of the same episodes.

    Returns:
      As `interval`.
    """
    first, second = np.asarray(first, np.bool_), np.asarray(second, np.bool_)
    n = len(first)
    (p1, lo1, hi1), (p2, lo2, hi2) = _wilson(first), _wilson(second)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    one, other = int((first & ~second).sum()), int((~first & second).sum())
    covariance = float(both * neither - one * other)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # corrected for continuity
    scale = math.sqrt((both + one) * (other + neither) * (both + other) * (one + neither))
    phi = covariance / scale if scale else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    mean = p1 - p2
    return _stored(mean, mean - half(p1 - lo1, hi2 - p2), mean + half(hi1 - p1, p2 - lo2), n, n)


def interval(
    values: np.ndarray, clusters: np.ndarray, bounds: tuple[float, float] = UNBOUNDED, resamples: int = 2000
) -> Stored:
    """Mean over windows with a 95 % interval clustered by episode: windows of one episode are alike.

    Unbounded quantities have a bootstrap interval that resamples whole episodes. A bootstrap's quantiles lie too near
    to the mean where clusters are few, so both are moved away from it by the factor sqrt(G / (G - 1)) t / z of G
    clusters, by which Student's interval is wider than a normal one (after Hesterberg's expanded percentile interval,
    2015): 1.44 for 6, 1.09 for 22 and 1.02 for 100 clusters. Bounded quantities have Student's interval of the mean's
    logit (of its logarithm where one bound is infinite), with the clusters' standard error by the delta method, mapped
    back: it never leaves the bounds, and follows the skew of means that are close to one.

    Args:
      values, clusters: (N,).
      bounds: smallest and largest possible value: both, the largest or none of them infinite.

    Returns:
      {"mean", "lo", "hi", "n": N, "episodes": the number of clusters}; lo and hi are None below `FEWEST` clusters.
    """
    _, index = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    mean, number = float(values.mean()), len(sums)
    if number < FEWEST:
        return _stored(mean, mean, mean, len(values), number)
    if bounds != UNBOUNDED:
        return _stored(mean, *_bounded(mean, sums, counts, bounds), len(values), number)
    draws = np.random.default_rng(0).integers(0, number, (resamples, number))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    wider = _student(number - 1) / _Z * np.sqrt(number / (number - 1))
    lo, hi = mean + wider * (np.quantile(means, [0.025, 0.975]) - mean)
    return _stored(mean, float(lo), float(hi), len(values), number)


def text(stored: Stored, form: str = ".4g") -> str:
    """`0.5412 [0.4921, 0.5913]`, each number in a format of its own; `0.5412 [too few]` without an interval."""
    ends = TOO_FEW if stored["lo"] is None else f"{stored['lo']:{form}}, {stored['hi']:{form}}"
    return f"{stored['mean']:{form}} [{ends}]"


def _bounded(mean: float, sums: np.ndarray, counts: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval of a mean of bounded values from its clusters' (G,) sums and counts."""
    low, high = bounds
    number, below, above = len(sums), mean - low, high - mean
    error = math.sqrt(number / (number - 1) * float(np.square(sums - mean * counts).sum())) / float(counts.sum())
    if error == 0 or below <= 0 or above <= 0:  # all values are alike
        return mean, mean
    shift = _student(number - 1) * error * (1 / below + 1 / above)
    if math.isinf(above):
        return low + below * math.exp(-shift), low + below * math.exp(shift)
    odds = below / above
    lo, hi = odds * math.exp(-shift), odds * math.exp(shift)
    return low + (high - low) * lo / (1 + lo), low + (high - low) * hi / (1 + hi)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution."""
    from scipy.special import stdtrit  # imported here: a training run starts without it

    return float(stdtrit(freedom, 0.975))


def _wilson(successes: np.ndarray) -> tuple[float, float, float]:
    """(share, lo, hi) by Wilson's score."""
    from scipy.stats import binomtest  # imported here, as above

    count = int(np.count_nonzero(successes))
    interval = binomtest(count, len(successes)).proportion_ci(method="wilson")
    return count / len(successes), float(interval.low), float(interval.high)


def _stored(mean: float, lo: float, hi: float, n: int, episodes: int) -> Stored:
    tells = episodes >= FEWEST
    return {"mean": mean, "lo": lo if tells else None, "hi": hi if tells else None, "n": n, "episodes": episodes}
