"""Warnings about data at the start of a run: values out of the samplers' reach, too few held-out episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.sources import Source
from uwm_jax.data.windows import split_episodes

_FAR = 1.5  # times the clip: values up to this lose little by clipping
_RARE = 1e-3  # smallest share of values beyond it that is reported, ...
_HUGE = 3.0  # ... unless one of them is beyond this
_FAR_INPUT = 10.0  # normalised low-dimensional values up to this are fine for a network
_ROWS = 1 << 22  # steps that shares are counted over; more are thinned evenly
_BLOCK = 1 << 18
_SHOWN = 6  # columns named in a line


def far_out(sources: Sequence[Source], normalizer: Normalizer, clip: float) -> list[str]:
    """A warning for each source and key with values far beyond the clip of samples, or a network's usual inputs.

    Args:
        sources: those with actions.
        normalizer: the run's.
        clip: range of a predicted action (`config.diffusion.clip.action`), normalised; 0 = unlimited.
    """
    lines = []
    for source in sources:
        for key, stats in source.stats().items():
            limit = clip if key == "action" else _FAR_INPUT
            ends = np.asarray([stats["min"], stats["max"]], np.float64)
            reach = np.abs(normalizer.normalize(key, ends)).max(axis=0)
            factor = _FAR if key == "action" else 1.0
            if not limit or not (reach > factor * limit).any():
                continue
            beyond, far = _shares(source, key, normalizer, (limit, factor * limit))
            columns = np.flatnonzero((reach > factor * limit) & ((far >= _RARE) | (reach > _HUGE * limit)))
            if not len(columns):
                continue
            shown = [f"column {i} ({beyond[i]:.2%} of its values, up to {reach[i]:.4g})" for i in columns[:_SHOWN]]
            if len(columns) > _SHOWN:
                shown.append(f"{len(columns) - _SHOWN} more")
            what = f"warning: {key} of {source.where} lies beyond +-{limit:g}, normalised: {', '.join(shown)}. "
            if key == "action":
                what += f"config.diffusion.clip.action={clip:g} cuts samples there: such values can never be sampled. "
            else:
                what += "The network reads them unclipped, which makes it hard to train. "
            other = ", or a larger diffusion.clip.action (0 = no clip)" if key == "action" else ""
            lines.append(
                f"{what}Use config.data.normalize=minmax (with init_from, init_from_normalizer=fresh){other}; where "
                "the values are errors, leave out their episodes."
            )
    return lines


def few_held_out(sources: Sequence[Source], val_ratio: float, fewest: int) -> list[str]:
    """A warning if fewer than `fewest` episodes of the sources with actions are held out; none for a `val_ratio` of
    0, where none should be."""

    def held_out(ratio: float) -> tuple[int, int]:
        """Episodes with windows: held out, and left for training."""
        counts = [0, 0]
        for source in sources:
            train, validation = split_episodes(source.dataset.num_episodes, ratio)
            counts[0] += int(usable[source.name][validation].sum())
            counts[1] += int(usable[source.name][train].sum())
        return counts[0], counts[1]

    usable = {source.name: source.usable() for source in sources}
    found, left = held_out(val_ratio)
    if not val_ratio or found >= fewest:
        return []
    ratios = (round(percent / 100, 2) for percent in range(1, 100))
    enough = next((r for r in ratios if r > val_ratio and held_out(r)[0] >= fewest and held_out(r)[1] > 0), None)
    advice = f"--config.data.val_ratio={enough:g} in a new run holds out enough." if enough else "More data is needed."
    return [
        f"warning: {found} of {found + left} episodes with windows {'is' if found == 1 else 'are'} held out "
        f"(config.data.val_ratio={val_ratio:g}): an evaluation gives no intervals and no verdict from fewer than "
        f"{fewest}. {advice}"
    ]


def _shares(
    source: Source, key: str, normalizer: Normalizer, limits: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """(D,) shares of training steps whose normalised absolute value exceeds each of the limits."""
    total, above = 0, [np.zeros(1), np.zeros(1)]
    for values in _blocks(source, key):
        size = np.abs(normalizer.normalize(key, values))
        total += len(size)
        above = [a + (size > limit).sum(axis=0) for a, limit in zip(above, limits, strict=True)]
    return above[0] / max(total, 1), above[1] / max(total, 1)


def _blocks(source: Source, key: str) -> Iterator[np.ndarray]:
    """Raw values (n, D) of a key at the training steps, evenly thinned if there are many."""
    dataset, samples = source.dataset, source.samples
    if key == "action" and samples.robot.states:
        count = len(source.windows) * len(samples.window.action)
        for actions in source.training_actions(stride=max(1, -(-count // _ROWS))):
            yield actions.reshape(-1, actions.shape[-1])
        return
    steps = source.counted_steps(key)
    stride = max(1, -(-len(steps) // _ROWS))
    for start in range(0, len(steps), _BLOCK):
        rows = np.flatnonzero(steps[start : start + _BLOCK])[::stride]
        if key == "action":
            values = {k: _flat(dataset.column(k)[start : start + _BLOCK])[rows] for k in samples.action_keys}
            parts = [part.columns.of(values[part.columns.key]) for part in samples.robot.parts]
            yield samples.robot.to_model(np.concatenate(parts, axis=-1), {})
        else:
            yield _flat(dataset.column(samples.low_dim_keys[key])[start : start + _BLOCK])[rows]


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)
