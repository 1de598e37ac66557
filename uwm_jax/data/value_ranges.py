"""Checks of the range that data use of a normaliser's, or of a pool's of sources: they reveal differing units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from uwm_jax.data.normalize import Normalizer, is_constant, range_of

Range = tuple[np.ndarray, np.ndarray]  # (D,) lowest and highest value of each column, float64

# Largest normalised value without a warning; training data lie within about 1.
_FAR = 1.5
# Smallest share of a range without one: differences within less are hard to see for a model of the full range.
_NARROW = 0.1


def ranges_of(stats: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Range]:
    """The range of each key that `Normalizer.from_stats` maps onto [-1, 1]; the full range for the kind "none"."""
    return {key: range_of(of_key, kind) for key, of_key in stats.items()}


def about_pool(ranges: Mapping[str, Mapping[str, Range]]) -> list[str]:
    """A warning for each source and key that uses little of the range of all sources (see `_narrow`).

    Args:
      ranges: {source: {key: range}} of the sources that share a normaliser.
    """
    lines = []
    for key in sorted({key for of_source in ranges.values() for key in of_source}):
        parts = {name: of_source[key] for name, of_source in ranges.items() if key in of_source}
        low, high = np.min([p[0] for p in parts.values()], axis=0), np.max([p[1] for p in parts.values()], axis=0)
        for name, part in parts.items():
            if columns := _narrow(part, (high - low) / 2):
                lines.append(
                    f"warning: source {name!r} uses little of the range of {key} that all sources together have: "
                    f"{columns}. Are the units the same? They share one normaliser, so the model hardly sees "
                    f"differences within such a column. Convert the units, let config.data.sources.{name} read other "
                    f"columns, or use only its video: "
                    f"--config.data.sources.{name}.use_actions=false"
                )
    return lines


def under(normalizer: Normalizer, ranges: Mapping[str, Mapping[str, Range]], keys: Iterable[str]) -> list[str]:
    """A sentence for each source and key that is far outside, or in a small part of, another run's normaliser's range.

    Args:
      ranges: {source: {key: range}}.
      keys: the keys to check; one without an entry is compared unnormalised.
    """
    lines = []
    for key in keys:
        for name, of_source in ranges.items():
            if key not in of_source:
                continue
            low, high = of_source[key]
            of_whom = f"{key} of {name!r}" if len(ranges) > 1 else f"{key} of this data"
            reach = max(float(np.abs(normalizer.normalize(key, end)).max()) for end in (low, high))
            if reach > _FAR:
                lines.append(f"{of_whom} reaches {reach:.3g} where the model was trained within about 1")
            scale = normalizer.entries[key][0] if key in normalizer.entries else np.ones(len(low))
            if columns := _narrow((low, high), scale):
                lines.append(f"{of_whom} uses little of the range that the model was trained on: {columns}")
    return lines


def far_out(normalizer: Normalizer, key: str, values: np.ndarray) -> str:
    """A sentence about the columns of raw `values` (..., D) with values far outside the normaliser's range, each with
    the share of such values; "" if there are none, or the key is not normalised."""
    if key not in normalizer.entries:
        return ""
    share = (np.abs(normalizer.normalize(key, values)) > _FAR).reshape(-1, values.shape[-1]).mean(axis=0)
    columns = np.flatnonzero(share)
    if not len(columns):
        return ""
    scale, offset = normalizer.entries[key]
    shown = [f"column {i} ({share[i]:.1%} of its values)" for i in columns[:6]]
    more = f" and {len(columns) - 6} more" if len(columns) > 6 else ""
    low, high = offset[columns[0]] - abs(scale[columns[0]]), offset[columns[0]] + abs(scale[columns[0]])
    return (
        f"{key} is far outside the range that the model was trained on: {', '.join(shown)}{more}. Column {columns[0]} "
        f"was within about {low:.4g} to {high:.4g} there. Are the units raw, and the columns in the same order?"
    )


def _narrow(part: Range, half: np.ndarray) -> str:
    """The columns that vary, but by less than a tenth of +-half, each with its share; "" if there are none."""
    low, high = part
    share = np.where(is_constant(low, high), 1.0, (high - low) / 2 / np.maximum(half, 1e-30))
    columns = np.flatnonzero(share < _NARROW)
    shown = [f"column {i} ({share[i]:.2%})" for i in columns[:6]]
    return ", ".join(shown) + (f" and {len(columns) - 6} more" if len(columns) > 6 else "")
