"""Results with names of their own, each with its settings: of other data, configs, parameters, simulators or samplers
than those that the rest of a run's page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from uwm_jax.diffusion.modes import MODES
from uwm_jax.evaluation.results import Interval, Result, Run, doubt
from uwm_jax.reporting import names
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import NOTHING, cell, formats, head, number_head, table, two_lines
from uwm_jax.reporting.provenance import use

_TITLES = {"eval": "Evaluation", "rollout": "Closed loop", "few_steps": "Comparison of samplers"}
_MAIN = (*(f"{mode}/" for mode in MODES), "control/", "policy/", "expert/")  # the rest is folded away


def others(run: Run) -> Html:
    """All of `run.others`, the newest step first; "" where there is none."""
    if not run.others:
        return NOTHING
    about = (
        "<p>Each is told apart by its settings: what differs from the run's own config and data, and for a closed loop "
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
        _samplers(result) if result.kind == "few_steps" else _metrics(result.metrics),
        fill("<details><summary>Command</summary>{}</details>", command) if command else NOTHING,
    )


def _metrics(metrics: Mapping[str, Interval]) -> Html:
    main = [name for name in metrics if name.startswith(_MAIN)]
    rest = [name for name in metrics if name not in main]
    fold = fill("<details><summary>{} more</summary>{}</details>", len(rest), _rows(metrics, rest)) if rest else NOTHING
    return fill("{}{}", _rows(metrics, main), fold)


def _rows(metrics: Mapping[str, Interval], shown: Sequence[str]) -> Html:
    rows = [[head(two_lines(*names.of(name))), cell(metrics[name], Format.of([metrics[name].mean]))] for name in shown]
    return table(["metric", number_head("mean", "95 % interval")], rows, "metrics")


def _samplers(result: Result) -> Html:
    every = dict.fromkeys(name for row in result.rows for name in row["metrics"])
    shown = [name for name in every if name.endswith(("/action_mse", "/psnr")) or name.startswith("closed_loop/")]
    found = [[row["metrics"].get(name) for name in shown] for row in result.rows]
    forms = formats(found)
    rows = [
        [head(row["sampler"]), fill('<td class="number">{}</td>', row["steps"]), *map(cell, metrics, forms)]
        for row, metrics in zip(result.rows, found, strict=True)
    ]
    heads = ["sampler", number_head("evaluations"), *(number_head(*names.of(name)) for name in shown)]
    return table(heads, rows, "samplers")
