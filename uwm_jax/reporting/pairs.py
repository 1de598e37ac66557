"""Paired comparison of the closed loops of several runs from the same starts."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uwm_jax.config import flatten
from uwm_jax.evaluation.metrics import Stored, difference_bounds, interval, proportion_difference
from uwm_jax.reporting import names
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import NOTHING, cell, formats, head, number_head, table
from uwm_jax.reporting.results import Interval, Run, damaged, seeds_of, verdict

_SAME = ("env", "execute", "max_steps", "score_range")  # with the starts' seeds: what makes two closed loops comparable

Difference = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], Stored]
Name = Callable[[Sequence[Run]], str]  # of the runs of one setting


class Setting(NamedTuple):
    """Runs of one config that differ in their training seed alone."""

    name: str
    runs: list[Run]


def name_of(runs: Sequence[Run]) -> str:
    """The name of a setting by what the names of its runs begin with."""
    if len(runs) == 1:
        return runs[0].name
    every = [run.name for run in runs]
    begins = os.path.commonprefix(every).rstrip("_-./ ")
    return f"{begins} (seeds {', '.join(str(run.config.seed) for run in runs)})" if begins else ", ".join(every)


def settings(runs: Sequence[Run], name: Name = name_of) -> list[Setting]:
    """The settings of runs, in the order of their first runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(str(sorted({**flatten(run.config), "seed": None}.items())), []).append(run)
    return [Setting(name(same), same) for same in found.values()]


def differences(first: Setting, second: Setting) -> dict[str, Interval]:
    """{metric: first minus second, on the same starts}, positive where the first is better.

    Every run of one is paired with every run of the other. The mean is that of all pairs, and the interval spans the
    95 % intervals of all pairs: it lies on one side of 0 only where each of them does, so that no training seed alone
    decides.
    """
    low, high = (math.inf if end is None else end for end in first.runs[0].rollout_how["score_range"])
    score, bounds = first.runs[0].score, difference_bounds(-low if math.isinf(low) else low, high)

    def of_scores(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Stored:
        gains = np.array([a[score] - b[score] for a, b in zip(one, other, strict=True)])
        return interval(gains, np.arange(len(gains)), bounds)

    def of_successes(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Stored:
        return proportion_difference(*(np.array([e["success"] for e in episodes]) for episodes in (one, other)))

    return {score: _over_seeds(first, second, of_scores), "success": _over_seeds(first, second, of_successes)}


def _over_seeds(first: Setting, second: Setting, difference: Difference) -> Interval:
    pairs = itertools.product(*([run.rollout_how["episodes"]["policy"] for run in s.runs] for s in (first, second)))
    found = [Interval.of(difference(*pair)) for pair in pairs]
    there = [m for m in found if m is not None]
    mean = sum(m.mean for m in there) / len(there)
    return Interval(mean, min(m.lo for m in there), max(m.hi for m in there), there[0].n, there[0].episodes)


def _check(run: Run) -> None:
    """Raises UserError where the record of a closed loop lacks what differences are made of."""
    how = run.rollout_how
    try:
        good = isinstance(how["env"], str) and len(how["score_range"]) == 2
        good &= all(end is None or math.isfinite(end) for end in how["score_range"])
        for episode in how["episodes"]["policy"]:
            good &= math.isfinite(episode[run.score]) and isinstance(episode["success"], bool)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise damaged(
            run.folders["rollout"] / "episodes.json",
            f"expected an environment's name, a score_range of two numbers or nulls, and in each episode a finite "
            f"{run.score} and whether it was a success",
        )


def section(runs: Sequence[Run], name: Name = name_of) -> Html:
    """A table of the differences of every two settings whose closed loops can be paired; "" where there are none."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        how = run.rollout_how
        if run.score and "score_range" in how and seeds_of(how):
            _check(run)
            groups.setdefault(str([*(how.get(name) for name in _SAME), seeds_of(how)]), []).append(run)
    tables = [_table(settings(group, name)) for group in groups.values()]
    return fill("{}", tables) if any(tables) else NOTHING


def _table(of_starts: Sequence[Setting]) -> Html:
    pairs = list(itertools.combinations(of_starts, 2))
    if not pairs:
        return NOTHING
    found = [differences(*pair) for pair in pairs]
    heads = ["first, against the second", *(number_head(*names.of_metric(name)) for name in found[0])]
    forms = formats([list(row.values()) for row in found])
    rows = [_row(pair, row, forms) for pair, row in zip(pairs, found, strict=True)]
    about = (
        "<p>The first's result minus the second's in {} from the same {} starts; positive: the first is better. Where "
        "a config was trained from several seeds, every run of one is paired with every run of the other: the mean is "
        "that of all pairs, and the range spans the 95 % intervals of all of them. A difference is shown only where "
        "all pairs agree.</p>{}"
    )
    how = of_starts[0].runs[0].rollout_how
    return fill(about, how["env"], len(seeds_of(how)), table([*heads, "better score?"], rows, "closed loops"))


def _row(pair: tuple[Setting, Setting], found: Mapping[str, Interval], forms: Sequence[Format]) -> list[Html]:
    first, second = pair
    counts = [len({run.config.seed for run in setting.runs}) for setting in pair]
    seeds = f"{counts[0]} x {counts[1]} training seeds"
    if min(counts) == 1:
        seeds += ": another seed may say otherwise"
    score = next(iter(found.values()))
    return [
        head(f"{first.name}, against {second.name}", seeds),
        *(cell(m, form) for m, form in zip(found.values(), forms, strict=True)),
        fill("<td>{}</td>", verdict(score)),
    ]
