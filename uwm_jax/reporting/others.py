"""Results with names of their own, each with its settings: of other data, configs, parameters, simulators or samplers
than those that the rest of a run's page shows."""

from __future__ import annotations

import json

from uwm_jax.evaluation.data import doubt
from uwm_jax.reporting import tables
from uwm_jax.reporting.answers import answers
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.page import NOTHING, head, table
from uwm_jax.reporting.provenance import use
from uwm_jax.reporting.results import Result, Run

_TITLES = {"eval": "Evaluation", "rollout": "Closed loop", "few_steps": "Comparison of samplers"}


def others(run: Run) -> Html:
    """All of `run.others`, the newest step first; "" where there is none."""
    if not run.others:
        return NOTHING
    about = (
        "<p>Each is identified by its settings: what differs from the run's own config and data, and for a closed loop "
        "or a comparison of samplers how it was made. Pictures lie in its folder.</p>"
    )
    ordered = sorted(run.others, key=lambda result: -result.step)
    return fill("{}{}", fill(about), [_one(result, run) for result in ordered])


def _one(result: Result, run: Run) -> Html:
    how = result.how
    told = doubt(how) if result.kind != "rollout" else ""
    settings = [
        [head(fill("<code>{}</code>", name)), fill("<code>{}</code>", json.dumps(value, ensure_ascii=False))]
        for name, value in how.get("settings", {}).items()
    ]
    command = use(_TITLES[result.kind], result.step, how, run.config)
    return fill(
        '<h3 id="{}-{}-{}">{}: {}, step {}</h3>{}<p>Folder: <code>{}</code></p>{}{}{}',
        result.kind,
        result.step,
        result.name,
        _TITLES[result.kind],
        result.name,
        result.step,
        fill("<p><b>{}</b></p>", told) if told else NOTHING,
        result.folder,
        table(["setting", "value"], settings, "settings"),
        _tables(result, run),
        fill("<details><summary>Command</summary>{}</details>", command) if command else NOTHING,
    )


def _tables(result: Result, run: Run) -> Html:
    if result.kind == "few_steps":
        return tables.samplers(result.rows)
    if result.kind == "rollout":
        return fill("{}{}", tables.closed_loop(result.metrics), answers({}, result.metrics, {}))
    told = answers(result.metrics, {}, run.kind.questions)
    fold = fill("<details><summary>What the numbers say</summary>{}</details>", told) if told else NOTHING
    return fill("{}{}", tables.evaluation(result.metrics, run.kind.uses), fold)
