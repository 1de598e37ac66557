"""The normaliser of a run: an affine map per low-dimensional key, from statistics of its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from uwm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """raw = normalised * scale + offset, per key and dimension; a key without an entry is unchanged.

    Attributes:
        entries: key (`action`, `state`, ...) -> (scale (D,), offset (D,)) float32.
    """

    entries: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_stats(cls, stats: Mapping[str, Mapping[str, Any]], kind: str, keys: Iterable[str]) -> Normalizer:
        """The normaliser that maps a range of each key onto [-1, 1]; values outside are not clipped.

        Args:
            stats: as `uwm_jax.data.stats.column_stats` returns them, by key.
            kind: "minmax": the full range; "quantile": the 1 % to the 99 % quantile (the full range for a
                dimension where these are equal); "none": nothing is normalised.
            keys: the keys to normalise.
        Constant dimensions get scale 1: they become 0, and a prediction of 0 gives the constant.

        Raises:
            UserError: a key has values that are not finite.
        """
        if kind not in ("minmax", "quantile", "none"):
            raise ValueError(f"expected kind minmax, quantile or none, found {kind!r}")
        entries = {}
        for key in keys:
            s = stats[key]
            if s["nonfinite"]:
                raise UserError(
                    f"{key}: {s['nonfinite']} of {s['count']} steps are NaN or infinite; "
                    "config.data.drop_nonfinite=true leaves these episodes out."
                )
            if kind == "none":
                continue
            low, high = range_of(s, kind)
            scale = np.where(is_constant(low, high), 1.0, (high - low) / 2)
            entries[key] = (scale.astype(np.float32), ((high + low) / 2).astype(np.float32))
        return cls(entries)

    def normalize(self, key: str, x: Any) -> Any:
        """(..., D) raw to normalised; numpy or JAX arrays."""
        if key not in self.entries:
            return x
        scale, offset = self.entries[key]
        return (x - offset) / scale

    def unnormalize(self, key: str, x: Any) -> Any:
        """(..., D) normalised to raw; numpy or JAX arrays."""
        if key not in self.entries:
            return x
        scale, offset = self.entries[key]
        return x * scale + offset

    def to_json(self) -> dict[str, dict[str, list[float]]]:
        """{key: {"scale": [...], "offset": [...]}}; float32 survives the round trip exactly."""
        return {
            key: {"scale": scale.tolist(), "offset": offset.tolist()} for key, (scale, offset) in self.entries.items()
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Mapping[str, Iterable[float]]]) -> Normalizer:
        return cls(
            {
                key: (np.asarray(v["scale"], np.float32), np.asarray(v["offset"], np.float32))
                for key, v in stored.items()
            }
        )


def range_of(stats: Mapping[str, Any], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value (D,) float64 that a normaliser of this kind maps onto [-1, 1]; "none": of all values."""
    low, high = np.asarray(stats["min"], np.float64), np.asarray(stats["max"], np.float64)
    if kind != "quantile":
        return low, high
    q01, q99 = np.asarray(stats["q01"], np.float64), np.asarray(stats["q99"], np.float64)
    spread = ~is_constant(q01, q99)
    return np.where(spread, q01, low), np.where(spread, q99, high)


def is_constant(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether a range is no more than rounding, in float32, of its own values."""
    return high - low <= 1e-6 * np.maximum(np.abs(low), np.abs(high)) + 1e-12
