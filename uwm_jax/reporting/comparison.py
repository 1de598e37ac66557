"""The page of several runs, `comparison.html`: metrics, closed loops in pairs, curves and differing config fields."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from uwm_jax.config import flatten
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.files import Place, write_text
from uwm_jax.reporting import names, pairs
from uwm_jax.reporting.curves import Curve, Panel
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import NOTHING, Section, cell, curves, fields, head, number_head, page, table
from uwm_jax.reporting.provenance import facts
from uwm_jax.reporting.results import Interval, Run, differing_fields, seeds_of

RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#a0418f", "#e69f00", "#56b4e9", "#777777")

# Fields that decide which windows are held out, and in which units errors are.
DECISIVE = (
    *("data.path", "data.split", "data.sources", "data.val_ratio", "data.window.action", "data.action"),
    *("data.normalize", "data.cameras", "data.resize", "data.crop", "model.codec.name", "model.codec.vae"),
    *("data.ranges", "data.max_action", "data.choices", "eval.num_windows"),
)

# What an evaluation or a closed loop records of itself and depends on.
HOW = (
    *("own_data", "sampler_spacing", "sampler_steps", "sampler_hidden_timestep"),
    *("sampler_seed", "env", "execute", "max_steps"),
)


def compare(workdirs: Sequence[Place], output: Place) -> Place:
    """Writes a page that sets runs side by side; returns `output`.

    Raises:
      UserError: one of `workdirs` is no run's directory, or is named twice.
    """
    if len({w.resolve() for w in workdirs}) < len(workdirs):
        raise UserError(f"expected different runs, found {', '.join(map(str, workdirs))}.")
    runs = [Run.read(workdir) for workdir in workdirs]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.workdir)
    top = fill("<h1>{} runs side by side</h1>{}", len(runs), same_windows(runs))
    sections = [
        Section("runs", "The runs", _facts(runs)),
        *metrics(runs),
        Section("pairs", "Closed loops on the same starts", pairs.section(runs)),
        Section("curves", "Curves", curves(_panels(runs))),
        Section("configs", "Config fields that differ", _configs(runs)),
    ]
    write_text(output, page(", ".join(run.name for run in runs), top, sections))
    return output


def _facts(runs: Sequence[Run]) -> Html:
    return fill("{}", [fill("<h3>{}</h3>{}", run.name, facts(run)) for run in runs])


def same_windows(runs: Sequence[Run]) -> Html:
    """A warning where the numbers are not of the same windows or not in the same units."""
    reasons = [name for name in differing_fields(runs) if name.startswith(DECISIVE) and not _is_absent(name, runs)]
    if any(_places(run) != _places(runs[0]) for run in runs[1:]):
        reasons.append("data.window")
    trained = [{source: m["splits"] for source, m in run.manifests.items()} for run in runs if run.manifests]
    # A source is what it holds: its name and place may differ.
    evaluated = [sorted((run.eval_how.get("datasets") or {}).values()) for run in runs if run.metrics]
    known = [found for found in evaluated if found]
    if len(known) == len(runs) and all(found == known[0] for found in known):
        reasons = [name for name in reasons if not fnmatch.fnmatchcase(name, "data.*path")]
    if any(found != trained[0] for found in trained[1:]) or any(found != known[0] for found in known[1:]):
        reasons.append("the files of their datasets")
    for what, found in (("held-out windows", [r.metrics for r in runs]), ("episodes", [r.rollout for r in runs])):
        if len({max(m.n for m in metrics.values()) for metrics in found if metrics}) > 1:
            reasons.append(f"the number of {what} that were evaluated")
    ways = {
        "evaluate": [_how(run.eval_how) for run in runs if run.metrics],
        "rollout": [_how(run.rollout_how) for run in runs if run.rollout],
    }
    for command, hows in ways.items():
        differing = []
        for name in sorted(set().union(*hows)):
            values = [how.get(name) for how in hows if name in how or name not in HOW]  # older records lack some of HOW
            differing += [name] if len(set(values)) > 1 else []
        reasons += [f"{command}'s {name}" for name in differing]
    if not reasons:
        if len(evaluated) < 2:
            return NOTHING
        if len(known) < len(evaluated):
            return fill(
                "<p>Whether their held-out windows are the same is not known: not all of them tell their datasets.</p>"
            )
        return fill("<p>Held-out windows are the same for all of them.</p>")
    return fill(
        "<p><b>These runs differ in {}</b>: their metrics are of other windows or in other units, and a difference "
        "between them need not be one of the models.</p>",
        ", ".join(reasons),
    )


def _is_absent(name: str, runs: Sequence[Run]) -> bool:
    """Whether a field of a system's own differs only in that other systems have none, such as a codec."""
    own = [flat[name] for flat in (flatten(run.config) for run in runs) if name in flat]
    return name.startswith("model.") and all(value == own[0] for value in own)


def _places(run: Run) -> Mapping[str, Any]:
    """The fields that decide where the windows of a run lie: systems read different parts of the same ones."""
    return WindowSpec.from_config(run.config.data.window).places


def _how(record: Mapping[str, Any]) -> dict[str, str]:
    """Settings of an evaluation or a closed loop that its numbers depend on, by name."""
    how = {name: str(record[name]) for name in HOW if name in record}
    how |= {f"--config.{name}": str(value) for name, value in record.get("changed", {}).items()}
    if seeds := seeds_of(record):
        how["seeds"] = str(seeds)
    return how


def metrics(runs: Sequence[Run]) -> list[Section]:
    """All metrics: a row per metric, a column per run; what is better than every other with intervals apart is
    marked."""
    found = list(dict.fromkeys(name for run in runs for name in run.measured))
    if not found:
        say = "<p>None of the runs was evaluated: <code>python -m uwm_jax.evaluate --workdir=DIR</code>.</p>"
        return [Section("metrics", "Metrics", fill(say))]
    heads = ["metric", *(number_head(run.name, evaluated_at(run)) for run in runs)]

    def rows(chosen: Sequence[str]) -> Html:
        cells = [_row(name, [run.measured.get(name) for run in runs], _is_merit(name, runs)) for name in chosen]
        return table(heads, cells, "metrics")

    uses = {f"{use}/" for run in runs for use in run.kind.uses}
    main = [name for name in found if name.startswith((*uses, "loss/", "control/", "rollout/policy/"))]
    rest = [name for name in found if name not in main]
    about = "<p>Mean, and below it the 95 % interval. Marked: better than all others, with intervals apart.</p>{}"
    return [
        Section("metrics", "Metrics", fill(about, rows(main))),
        Section(
            "differences",
            "Baselines, and differences to them",
            fill("<details><summary>{} rows</summary>{}</details>", len(rest), rows(rest)) if rest else NOTHING,
        ),
    ]


def evaluated_at(run: Run) -> str:
    """The steps of the numbers of a run, in words."""
    evaluated = f"evaluated at step {run.eval_step}" if run.metrics else "not evaluated"
    return evaluated + (f", in the simulator at {run.rollout_step}" if run.rollout else "")


def _is_merit(name: str, runs: Sequence[Run]) -> bool:
    """Whether the best of a metric is marked: those of baselines, of the expert and of shuffled actions are no
    merits."""
    uses = {f"{use}/" for run in runs for use in run.kind.uses}
    probe = name.startswith("control/") and name.count("/") == 1
    return probe or name.startswith((*uses, "paired/", "rollout/policy/", "rollout/paired/"))


def _row(name: str, found: Sequence[Interval | None], merit: bool) -> list[Html]:
    """Cells of a metric of all runs, in one format."""
    best = _best(found, more_is_better(name)) if merit else None
    form = Format.of(m and m.mean for m in found)
    return [head(*names.of(name)), *(cell(m, form, "best" if m and m is best else "") for m in found)]


def more_is_better(name: str) -> bool:
    """Whether larger values of a metric are better ones."""
    kind = name.rsplit("/", 1)[-1]
    return "paired/" in name or not (kind.endswith("_mse") or name.startswith("loss/"))


def _best(found: Sequence[Interval | None], more: bool) -> Interval | None:
    """The one that is better than every other with intervals apart, if there is one and all have enough episodes."""
    there = [m for m in found if m is not None]
    for m in there if all(m.is_conclusive for m in there) else ():
        others = [other for other in there if other is not m]
        if others and all((m.lo > other.hi) if more else (m.hi < other.lo) for other in others):
            return m
    return None


def _configs(runs: Sequence[Run]) -> Html:
    found = differing_fields(runs)
    return fields({run.name: flatten(run.config) for run in runs}, found) if found else fill("<p>None.</p>")


def _panels(runs: Sequence[Run]) -> list[Panel]:
    named = [(run, RUN_COLORS[i % len(RUN_COLORS)]) for i, run in enumerate(runs)]

    def losses(part: str) -> list[Curve]:
        return [
            run.logged(f"{prefix}loss/{part}", f"{run.name}{suffix}", color, style)
            for run, color in named
            if part in run.config.loss.weights
            for prefix, style, suffix in (("", "-", ""), ("eval/", "--", ", held out"))
        ]

    def values(name: str) -> list[Curve]:
        return [run.evaluated(name, run.name, color) for run, color in named]

    parts = dict.fromkeys(part for run in runs for part in run.config.loss.weights)
    scores = Panel(
        "The best of an episode in the simulator",
        [run.rolled_out(f"policy/{run.score}", run.name, c) for run, c in named],
    )
    return [
        *(Panel(f"Loss: {part}", losses(part), logarithmic=True) for part in parts),
        *(Panel(names.of(name)[0], values(name), zero=name.startswith("control/")) for name in headlines(runs)),
        scores,
    ]


def headlines(runs: Sequence[Run]) -> list[str]:
    """The metrics of evaluations that curves and short tables show: errors of all uses, and probes."""
    uses = dict.fromkeys(use for run in runs for use in run.kind.uses)
    shown = [f"{use}/{metric}" for use in uses for metric in ("action_mse", "changed_mse")]
    shown += dict.fromkeys(n for run in runs for n in run.metrics if n.startswith("control/") and n.count("/") == 1)
    return [name for name in shown if any(name in run.metrics for run in runs)]
