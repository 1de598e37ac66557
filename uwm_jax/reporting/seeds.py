"""Metrics over training seeds: the mean and spread of each setting, and which differences exceed the spread."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from uwm_jax.reporting import names
from uwm_jax.reporting.comparison import more_is_better
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import head, number_head, table
from uwm_jax.reporting.pairs import Setting

FIRST, SECOND, WITHIN, UNKNOWN = "the first is better", "the second is better", "not shown", "one seed: not known"
_KINDS = {FIRST: "yes", SECOND: "no"}
MOST_ROWS = 15  # of differences, above which they are folded


class Spread(NamedTuple):
    """The mean of a metric's means over training seeds, and the smallest and largest of them."""

    mean: float
    lo: float
    hi: float
    seeds: int

    @classmethod
    def of(cls, setting: Setting, name: str) -> Spread | None:
        """Of the runs that have the metric; None where none has it."""
        found = [run.measured[name].mean for run in setting.runs if name in run.measured]
        if not found:
            return None
        return cls(sum(found) / len(found), min(found), max(found), len(found))


def verdict(first: Spread, second: Spread, more: bool) -> str:
    """Whether a difference exceeds the spread of seeds, and which is better.

    It does where every seed of one is better than every seed of the other, and the difference of their means is larger
    than the range of the seeds of either. FIRST, SECOND, WITHIN, or UNKNOWN where one of them has a single seed.
    """
    if min(first.seeds, second.seeds) < 2:
        return UNKNOWN
    difference = first.mean - second.mean
    apart = first.lo > second.hi or first.hi < second.lo
    if not apart or abs(difference) <= max(first.hi - first.lo, second.hi - second.lo):
        return WITHIN
    return FIRST if (difference > 0) == more else SECOND


def section(settings: Sequence[Setting], metrics: Sequence[str]) -> Html:
    """Tables of settings and of their differences, for these metrics."""
    spreads = [[Spread.of(setting, name) for name in metrics] for setting in settings]
    forms = [Format.of(s and s.mean for s in column) for column in zip(*spreads, strict=True)]
    heads = [number_head(*names.of(name)) for name in metrics]
    rows = [
        [head(setting.name, _seeds(setting)), *(_cell(s, form) for s, form in zip(found, forms, strict=True))]
        for setting, found in zip(settings, spreads, strict=True)
    ]
    pairs = list(itertools.combinations(range(len(settings)), 2))
    compared = [i for i, name in enumerate(metrics) if not name.startswith("rollout/")]
    columns = [_differences(metrics[i], [(spreads[a][i], spreads[b][i]) for a, b in pairs]) for i in compared]
    differences = [
        [head(f"{settings[a].name}, against {settings[b].name}"), *cells]
        for (a, b), *cells in zip(pairs, *columns, strict=True)
    ]
    against = table(
        ["first, against the second", *(heads[i] for i in compared)], differences, "differences of settings"
    )
    if len(pairs) > MOST_ROWS:
        against = fill("<details><summary>{} differences</summary>{}</details>", len(pairs), against)
    return fill(
        "<p>Members that differ in <code>seed</code> alone are one setting: the mean over its seeds, and below it the "
        "smallest and largest of them.</p>{}<p>The first's mean minus the second's. A difference is called shown, and "
        "says which is better, only where it exceeds the spread of seeds: every seed of one is better than every seed "
        "of the other, and the difference is larger than the range of the seeds of either. It is one on these held-out "
        "windows; closed loops are compared start by start, further below.</p>{}",
        table(["setting", *heads], rows, "settings"),
        against,
    )


def _seeds(setting: Setting) -> str:
    """Its training seeds, in words."""
    seeds = [str(run.config.seed) for run in setting.runs]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"


def _cell(spread: Spread | None, form: Format) -> Html:
    if spread is None:
        return Html('<td class="number"></td>')
    below = f"{form(spread.lo)} to {form(spread.hi)}" if spread.seeds > 1 else "one seed"
    return fill('<td class="number">{}<br><small>{}</small></td>', form(spread.mean), below)


def _differences(name: str, pairs: Sequence[tuple[Spread | None, Spread | None]]) -> list[Html]:
    """The cells of a metric's column."""
    form = Format.of(one.mean - other.mean for one, other in pairs if one and other)
    more = more_is_better(name)

    def cell_of(one: Spread | None, other: Spread | None) -> Html:
        if one is None or other is None:
            return Html('<td class="number"></td>')
        told = verdict(one, other, more)
        below = fill('<small class="{}">{}</small>', _KINDS.get(told), told)
        return fill('<td class="number">{}<br>{}</td>', form(one.mean - other.mean), below)

    return [cell_of(*pair) for pair in pairs]
