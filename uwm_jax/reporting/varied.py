"""Metrics over a field that a sweep varies, such as the learning rate: a curve for each choice of the other fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uwm_jax.reporting import names
from uwm_jax.reporting.comparison import RUN_COLORS
from uwm_jax.reporting.curves import Curve, Panel
from uwm_jax.reporting.results import Interval

FEWEST = 3  # values of a field that make a curve
_SEED = "seed"


class Point(NamedTuple):
    """A member: its overrides, and its metrics."""

    overrides: Mapping[str, Any]
    metrics: Mapping[str, Interval]


def fields(points: Sequence[Point]) -> list[str]:
    """Fields that have numbers, at least `FEWEST` different ones, in the members; `seed` is none of them."""
    found = dict.fromkeys(field for point in points for field in point.overrides if field != _SEED)
    values = {field: [point.overrides.get(field) for point in points] for field in found}
    return [f for f, of in values.items() if all(map(_is_number, of)) and len(set(of)) >= FEWEST]


def panels(points: Sequence[Point], field: str, metrics: Sequence[str]) -> list[Panel]:
    """A panel for each metric over a field. A value is the mean over seeds; its bar goes from the smallest to the
    largest of them, or is the 95 % interval where there is one."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        rest = {name: value for name, value in point.overrides.items() if name not in (field, _SEED)}
        groups.setdefault(", ".join(f"{name}={value}" for name, value in rest.items()), []).append(point)
    values = {point.overrides[field] for point in points}
    logarithmic = min(values) > 0 and max(values) >= 10 * min(values)
    colors = {rest: RUN_COLORS[i % len(RUN_COLORS)] for i, rest in enumerate(groups)}
    return [
        Panel(
            names.of(metric)[0],
            [_curve(group, field, metric, rest, colors[rest]) for rest, group in groups.items()],
            over=field,
            logarithmic_over=logarithmic,
        )
        for metric in metrics
    ]


def _curve(points: Sequence[Point], field: str, metric: str, rest: str, color: str) -> Curve:
    at: dict[float, list[Interval]] = {}
    for point in points:
        if metric in point.metrics:
            at.setdefault(point.overrides[field], []).append(point.metrics[metric])
    ordered = sorted(at.items())
    means = [sum(m.mean for m in of) / len(of) for _, of in ordered]
    low = [min(m.mean for m in of) if len(of) > 1 else of[0].lo for _, of in ordered]
    high = [max(m.mean for m in of) if len(of) > 1 else of[0].hi for _, of in ordered]
    return Curve(rest or "all members", [value for value, _ in ordered], means, low, high, color)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
