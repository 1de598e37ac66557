"""Several runs side by side, as a page's HTML: metrics, curves and the config fields that differ."""

from __future__ import annotations

import fnmatch
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uwm_jax.config import flatten
from uwm_jax.diffusion.modes import MODES
from uwm_jax.errors import UserError
from uwm_jax.evaluation.results import Interval, Run, differing_fields
from uwm_jax.files import write_text
from uwm_jax.reporting.curves import Curve, Panel
from uwm_jax.reporting.page import cell, curves, fields, page

RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#a0418f", "#e69f00", "#56b4e9", "#777777")

# Fields that decide which windows are held out, and in which units errors are.
DECISIVE = (
    *("data.path", "data.split", "data.sources", "data.val_ratio", "data.window", "data.action", "data.normalize"),
    *("data.cameras", "data.resize", "data.crop", "model.codec.name", "model.codec.vae", "eval.num_windows"),
)

# Of these metrics the best is marked; those of baselines, of the expert and of shuffled actions are no merits.
MARKED = (*(f"{mode}/" for mode in MODES), "control/shuffle_gap", "paired/", "rollout/policy/", "rollout/paired/")

# What an evaluation or a closed loop records of itself and depends on.
HOW = (
    *("own_data", "sampler_spacing", "sampler_steps", "sampler_hidden_timestep"),
    *("sampler_seed", "env", "execute", "max_steps"),
)


def compare(workdirs: Sequence[Path], output: Path) -> Path:
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
    write_text(output, page("UWM: " + ", ".join(run.name for run in runs), body(runs)))
    return output


def body(runs: Sequence[Run]) -> str:
    """All of it; runs are told apart by their names."""
    heading = f"<h1>{len(runs)} runs side by side</h1>"
    return "\n".join([heading, _same_windows(runs), _metrics(runs), curves(_panels(runs)), _configs(runs)])


def _same_windows(runs: Sequence[Run]) -> str:
    """A warning where the numbers are not of the same windows or not in the same units."""
    names = [name for name in differing_fields(runs) if name.startswith(DECISIVE)]
    trained = [{source: m["splits"] for source, m in run.manifests.items()} for run in runs if run.manifests]
    # A source is what it holds: its name and place may differ.
    evaluated = [sorted((run.eval_how.get("datasets") or {}).values()) for run in runs if run.metrics]
    known = [found for found in evaluated if found]
    if len(known) == len(runs) and all(found == known[0] for found in known):
        names = [name for name in names if not fnmatch.fnmatchcase(name, "data.*path")]
    if any(found != trained[0] for found in trained[1:]) or any(found != known[0] for found in known[1:]):
        names.append("the files of their datasets")
    for what, found in (("held-out windows", [r.metrics for r in runs]), ("episodes", [r.rollout for r in runs])):
        if len({max(m.n for m in metrics.values()) for metrics in found if metrics}) > 1:
            names.append(f"the number of {what} that were evaluated")
    ways = {
        "evaluate": [_how(run.eval_how) for run in runs if run.metrics],
        "rollout": [_how(run.rollout_how) for run in runs if run.rollout],
    }
    for command, hows in ways.items():
        differing = []
        for name in sorted(set().union(*hows)):
            values = [how.get(name) for how in hows if name in how or name not in HOW]  # older records lack some of HOW
            differing += [name] if len(set(values)) > 1 else []
        names += [f"{command}'s {name}" for name in differing]
    if not names:
        if len(evaluated) < 2:
            return ""
        if len(known) < len(evaluated):
            return (
                "<p>Whether their held-out windows are the same is not known: not all of them tell their datasets.</p>"
            )
        return "<p>Held-out windows are the same for all of them.</p>"
    return f"""<p><b>These runs differ in {html.escape(", ".join(names))}</b>: their metrics are of other windows or
in other units, and a difference between them need not be one of the models.</p>"""


def _how(record: Mapping[str, Any]) -> dict[str, str]:
    """How an evaluation or a closed loop was run, as far as its numbers depend on it, by name."""
    how = {name: str(record[name]) for name in HOW if name in record}
    how |= {f"--config.{name}": str(value) for name, value in record.get("changed", {}).items()}
    if isinstance(episodes := record.get("episodes"), dict):  # of a closed loop; an evaluation has their number
        how["seeds"] = str([episode["seed"] for episode in episodes["policy"]])
    return how


def _metrics(runs: Sequence[Run]) -> str:
    """A row per metric, a column per run; what is better than every other with intervals apart is marked."""
    by_run = [{**run.metrics, **{f"rollout/{name}": m for name, m in run.rollout.items()}} for run in runs]
    names = list(dict.fromkeys(name for found in by_run for name in found))
    heads = "".join(
        f"<th>{html.escape(run.name)}<br><small>evaluated at step {run.eval_step}"
        f"{f', in the simulator at {run.rollout_step}' if run.rollout else ''}</small></th>"
        for run in runs
    )
    if not names:
        return "<p>None of the runs was evaluated: <code>python -m uwm_jax.evaluate --workdir=DIR</code>.</p>"

    def table(names: Sequence[str]) -> str:
        rows = ""
        for name in names:
            found = [metrics.get(name) for metrics in by_run]
            best = _best(found, _more_is_better(name)) if name.startswith(MARKED) else None
            cells = "".join(cell(m, "best" if m is not None and m is best else "") for m in found)
            rows += f"<tr><th>{html.escape(name)}</th>{cells}</tr>"
        return f"<table><tr><th></th>{heads}</tr>{rows}</table>"

    main = [name for name in names if name.startswith((*MODES, "control/", "rollout/policy/"))]
    rest = [name for name in names if name not in main]
    return f"""<h2>Metrics</h2><p>Mean and 95 % interval, by their names in <code>metrics.json</code>. Marked: better
than all others, with intervals apart.</p>
{table(main)}
<details><summary>Baselines, and differences to them</summary>{table(rest)}</details>"""


def _more_is_better(name: str) -> bool:
    kind = name.rsplit("/", 1)[-1]
    return not kind.endswith("_mse") or "paired/" in name


def _best(found: Sequence[Interval | None], more: bool) -> Interval | None:
    """The one that is better than every other with intervals apart, if there is one and all have enough episodes."""
    there = [m for m in found if m is not None]
    for m in there if all(m.tells for m in there) else ():
        others = [other for other in there if other is not m]
        if others and all((m.lo > other.hi) if more else (m.hi < other.lo) for other in others):
            return m
    return None


def _configs(runs: Sequence[Run]) -> str:
    names = differing_fields(runs)
    table = fields({run.name: flatten(run.config) for run in runs}, names) if names else "<p>None.</p>"
    return f"<h2>Config fields that differ</h2>{table}"


def _panels(runs: Sequence[Run]) -> list[Panel]:
    named = [(run, RUN_COLORS[i % len(RUN_COLORS)]) for i, run in enumerate(runs)]

    def losses(modality: str) -> list[Curve]:
        return [
            run.logged(f"{prefix}loss/{modality}", f"{run.name}{suffix}", color, style)
            for run, color in named
            for prefix, style, suffix in (("", "-", ""), ("eval/", "--", ", held out"))
        ]

    def values(name: str) -> list[Curve]:
        return [run.evaluated(name, run.name, color) for run, color in named]

    return [
        Panel("loss of actions", losses("action"), logarithmic=True),
        Panel("loss of later frames", losses("next_obs"), logarithmic=True),
        Panel("error of the policy mode's actions", values("policy/action_mse")),
        Panel("error of the inverse mode's actions", values("inverse/action_mse")),
        Panel("error of forward frames where the picture changed", values("forward/changed_mse")),
        Panel("what wrong actions cost, one evaluation", values("control/shuffle_gap"), zero=True),
        Panel(
            "the best of an episode in the simulator",
            [run.rolled_out(f"policy/{run.score}", run.name, c) for run, c in named],
        ),
    ]
