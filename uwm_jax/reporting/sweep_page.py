"""The page of a sweep, `sweep.html`: its members in a table, two metrics against each other, seeds, and curves.

Everything comes from `sweep.json` and the workdirs of the members, so that it can be written at any time.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from uwm_jax.errors import UserError, suggest
from uwm_jax.files import Place, write_text
from uwm_jax.reporting import comparison, names, pairs, seeds, tradeoff, varied
from uwm_jax.reporting.comparison import RUN_COLORS, more_is_better
from uwm_jax.reporting.curves import Curve, Panel
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import (
    NOTHING,
    Section,
    cell,
    curves,
    formats,
    head,
    key,
    number_head,
    page,
    table,
    two_lines,
)
from uwm_jax.reporting.results import Interval, Run
from uwm_jax.reporting.sheets import Mark
from uwm_jax.sweeps import record as record_lib
from uwm_jax.training.checkpoints.checkpoint import latest_step

FILE = "sweep.html"
AXES = ("policy/action_mse", "forward/changed_mse")  # across and upwards
_LOSS = "loss/"  # of evaluations
_SCORES = ("rollout/policy/max_", "rollout/policy/success")  # of closed loops
_MARKERS, _LINES = "os^D", ("-", "--", "-.", ":")  # one of each after another, where colours do not suffice


class Look(NamedTuple):
    """The look of all runs of one setting, and its name."""

    color: str
    marker: str
    line: str
    setting: str


@dataclasses.dataclass(frozen=True)
class Shown:
    """A member.

    Attributes:
      name: of its workdir.
      told: what `sweep.json` says of it.
      workdir: None where its name is none of a folder.
      run: its workdir; None before it started.
    """

    name: str
    told: Mapping[str, Any]
    workdir: Place | None
    run: Run | None

    @classmethod
    def read(cls, directory: Place, name: str, told: Mapping[str, Any]) -> Shown:
        is_folder = PurePath(name).name == name and name != ".." and "\0" not in name
        workdir = directory / record_lib.MEMBERS / name if is_folder else None
        started = workdir is not None and (workdir / "config.json").is_file()
        return cls(name, told, workdir, Run.read(workdir) if workdir and started else None)

    @property
    def setting(self) -> str:
        """Its name without its seed."""
        fields, parts = list(self.told["overrides"]), self.name.split(",")
        if len(fields) == len(parts):
            parts = [part for field, part in zip(fields, parts, strict=True) if field != "seed"]
        return ",".join(parts) or "without overrides"

    @property
    def status(self) -> str:
        """Its status in words, such as "diverged at step 120"."""
        words = {
            record_lib.WAITING: "waits for its turn",
            record_lib.TRAINING: "training, at",
            record_lib.STOPPED: "stopped at",
            record_lib.DIVERGED: "diverged at",
            record_lib.DONE: "done,",
        }
        status, step = words[self.told["status"]], self.told.get("step")
        return f"{status} step {step}" if step is not None else status.removesuffix(" at").strip(",")


def write(directory: Place, output: Place | None = None, x: str | None = None, y: str | None = None) -> Place:
    """Writes a sweep's page; returns where.

    Args:
      directory: of the sweep.
      output: the page; `sweep.html` in the directory by default.
      x, y: metrics of the picture, as `metrics.json` of an evaluation calls them, those of a closed loop after
        `rollout/`; `AXES` by default.

    Raises:
      UserError: `directory` holds no sweep, a file of a member is damaged, or no member has the metric of `x` or `y`.
    """
    members = [Shown.read(directory, name, told) for name, told in record_lib.read(directory).items()]
    runs = [member.run for member in members if member.run]
    known = list(dict.fromkeys(name for run in runs for name in run.measured))
    for flag, name in (("x", x), ("y", y)):
        if name is not None and name not in known:
            there = f"there are {', '.join(known)}" if known else "none was evaluated"
            raise UserError(f"--{flag}={name}: no member has this metric.{suggest(name, known)} Of them, {there}.")
    axes = (x or AXES[0], y or AXES[1])
    of = {member.name: member.setting for member in members}

    def name_of(same: Sequence[Run]) -> str:
        return of[same[0].name]

    settings = pairs.settings(runs, name_of)
    looks = _looks(settings)
    short = [*comparison.headlines(runs), *(n for n in known if n.startswith((_LOSS, *_SCORES)))]
    short += [name for name in (x, y) if name is not None and name not in short]
    in_front = _front(members, axes)
    title = f"Sweep {directory.absolute().name}: {len(members)} members"
    sections = [
        Section("members", "Members", _members(members, short, in_front)),
        Section("tradeoff", "One error against another", _tradeoff(members, axes, in_front, looks)),
        Section("varied", "Metrics over what was varied", _varied(members, axes, short)),
        Section("seeds", "Settings, over their seeds", _seeds(settings, short)),
        Section("pairs", "Closed loops on the same starts", pairs.section(runs, name_of)),
        Section("curves", "Curves", curves(_panels(runs, looks, axes))),
        Section("metrics", "All metrics", _metrics(runs)),
    ]
    output = output or directory / FILE
    write_text(output, page(title, _top(title, members), sections))
    return output


def _looks(settings: Sequence[pairs.Setting]) -> dict[str, Look]:
    """{name of a run: its look}."""
    found: dict[str, Look] = {}
    for i, setting in enumerate(settings):
        more, color = divmod(i, len(RUN_COLORS))
        look = Look(RUN_COLORS[color], _MARKERS[more % len(_MARKERS)], _LINES[more % len(_LINES)], setting.name)
        found |= {run.name: look for run in setting.runs}
    return found


# --- sections ----------------------------------------------------------------------------------------------------


def _top(title: str, members: Sequence[Shown]) -> Html:
    counts = collections.Counter(member.told["status"] for member in members)
    runs = [member.run for member in members if member.run]
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    start = runs[0].starts[-1] if runs and runs[0].starts else {}
    command = shlex.join(map(str, start.get("command", [])))
    return fill(
        "<h1>{}</h1><p>{}. Each is a run with a page of its own: <code>python -m uwm_jax.report --workdir=DIR</code> "
        "with its directory below <code>members/</code>.</p>{}{}",
        title,
        told,
        fill("<pre>{}</pre>", command) if command else NOTHING,
        comparison.same_windows(runs) if runs else NOTHING,
    )


def _members(members: Sequence[Shown], metrics: Sequence[str], in_front: Sequence[str]) -> Html:
    """A row for each: overrides, status, last losses, metrics."""
    fields = list(dict.fromkeys(field for member in members for field in member.told["overrides"]))
    losses = [{name: _number(x) for name, x in member.told["last_losses"].items()} for member in members]
    parts = list(dict.fromkeys(name for found in losses for name in found))
    columns = [Format.of(found.get(name) for found in losses) for name in parts]
    measured = [[_measured(member).get(name) for name in metrics] for member in members]
    forms = formats(measured)
    when = {member.name: comparison.evaluated_at(member.run) if member.run else "" for member in members}
    of_all = set(filter(None, when.values()))
    rows = [
        [
            head(
                fill("<b>{}</b>", member.name), "on the front of the picture below" if member.name in in_front else ""
            ),
            *(fill('<td class="number">{}</td>', member.told["overrides"].get(field)) for field in fields),
            fill('<td class="open">{}</td>', two_lines(member.status, when[member.name] if len(of_all) > 1 else "")),
            *map(cell, of_member, forms),
            *(_loss(found.get(name), form) for name, form in zip(parts, columns, strict=True)),
        ]
        for member, found, of_member in zip(members, losses, measured, strict=True)
    ]
    heads = ["member", *(number_head(f.rpartition(".")[2], f.rpartition(".")[0]) for f in fields), "status"]
    heads += [number_head(names.of(n)[0], "held out" if n.startswith(_LOSS) else names.of(n)[1]) for n in metrics]
    heads += [number_head(names.of(name)[0], "last in training") for name in parts]
    about = (
        "<p>Losses are the last that training logged; the total is weighted, so that those of other weights cannot be "
        "compared. Metrics are of held-out windows or of the simulator, each with its 95 % interval below it{}.</p>{}{}"
    )
    same = f"; {', '.join(of_all)}" if len(of_all) == 1 else ""
    return fill(about, same, table(heads, rows, "members"), _missing(members))


def _missing(members: Sequence[Shown]) -> Html:
    """The commands that evaluate members which were not, as far as they can be."""
    left = [m for m in members if m.run and not m.run.metrics and latest_step(m.run.workdir) is not None]
    if not left:
        return NOTHING
    lines = [f"python -m uwm_jax.evaluate --workdir={shlex.quote(str(m.workdir))}\n" for m in left]
    return fill('<p class="missing">Not evaluated yet. These commands do it:</p><pre>{}</pre>', lines)


def _measured(member: Shown) -> dict[str, Interval]:
    return member.run.measured if member.run else {}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _loss(value: float | None, form: Format) -> Html:
    finite = value is not None and math.isfinite(value)
    return fill('<td class="number">{}</td>', form(value) if value is not None and finite else value)


def _points(members: Sequence[Shown], axes: tuple[str, str]) -> dict[str, tradeoff.Pair]:
    x, y = axes
    found = {member.name: _measured(member) for member in members}
    return {name: (of[x], of[y]) for name, of in found.items() if x in of and y in of}


def _front(members: Sequence[Shown], axes: tuple[str, str]) -> list[str]:
    points = _points(members, axes)
    x, y = map(more_is_better, axes)
    return tradeoff.front(points, (x, y)) if len(points) > 1 else []


def _tradeoff(
    members: Sequence[Shown], axes: tuple[str, str], in_front: Sequence[str], looks: Mapping[str, Look]
) -> Html:
    """The picture; "" where fewer than two members have both metrics."""
    points = _points(members, axes)
    if len(points) < 2:
        return NOTHING
    (across, x_unit), (upwards, y_unit) = map(names.of, axes)
    dots = [tradeoff.Dot(at, looks[name].color, looks[name].marker, name in in_front) for name, at in points.items()]
    marks = [Mark(look.marker, look.color, look.setting) for look in dict.fromkeys(looks[name] for name in points)]
    marks.append(Mark("ring", "#777777", "outlined: another member is better in one and not worse in the other"))
    title = f"{upwards}, against {across}"
    left = len([member for member in members if member.run]) - len(points)
    return fill(
        '<figure class="wide"><figcaption>Across: <b>{}</b>{}. Upwards: <b>{}</b>{}. Bars are 95 % intervals over '
        "held-out episodes{}.</figcaption>"
        '<div class="curve" role="img" aria-label="{}">{}</div>{}<figcaption>Filled, and connected: no other member is '
        "better in one and at least as good in the other, by the means. Between seeds of one setting that is chance. "
        "{}<code>python -m uwm_jax.report --workdir=DIR --x=METRIC --y=METRIC</code> draws other "
        "metrics.</figcaption></figure>",
        across,
        f", {x_unit}" if x_unit else "",
        upwards,
        f", {y_unit}" if y_unit else "",
        " or episodes in the simulator" if any(axis.startswith("rollout/") for axis in axes) else "",
        title,
        Html(tradeoff.picture(title, dots)),
        key(marks),
        f"{left} members have not both. " if left else "",
    )


def _varied(members: Sequence[Shown], axes: tuple[str, str], metrics: Sequence[str]) -> Html:
    """Curves of the main metrics over each field with several numbers."""
    points = [varied.Point(m.told["overrides"], m.run.measured) for m in members if m.run and m.run.measured]
    shown = [name for name in metrics if name in axes or name.startswith(("control/", _LOSS, *_SCORES))]
    drawn = [curves(varied.panels(points, field, shown)) for field in varied.fields(points)]
    if not any(drawn):
        return NOTHING
    about = (
        "<p>Each value is the mean over seeds, its bar goes from the smallest to the largest of them; a single seed "
        "has the 95 % interval over held-out episodes. Members that diverged have none.</p>{}"
    )
    return fill(about, drawn)


def _seeds(settings: Sequence[pairs.Setting], metrics: Sequence[str]) -> Html:
    if not metrics or len(settings) < 2 and all(len(setting.runs) < 2 for setting in settings):
        return NOTHING
    if all(len(setting.runs) < 2 for setting in settings):
        return fill(
            "<p>Every setting has one seed, so whether a difference between them exceeds the spread of seeds is not "
            "known: a sweep with <code>--grid=seed=0,1,2</code> besides shows it.</p>"
        )
    return seeds.section(settings, metrics)


def _panels(runs: Sequence[Run], looks: Mapping[str, Look], axes: tuple[str, str]) -> list[Panel]:
    """Losses of all members, in total and in parts, in training and held out; metrics of more than one evaluation."""

    def logged(name: str) -> list[Curve]:
        return [run.logged(name, look.setting, look.color, look.line) for run, look in named]

    def evaluated(name: str) -> list[Curve]:
        return [run.evaluated(name, look.setting, look.color, look.line) for run, look in named]

    named = [(run, looks[run.name]) for run in runs]
    parts = dict.fromkeys(part for run in runs for part in run.config.loss.weights)
    scores = [run.rolled_out(f"policy/{run.score}", look.setting, look.color, look.line) for run, look in named]
    return [
        Panel("Loss, weighted", logged("loss"), logarithmic=True),
        *(Panel(f"Loss: {part}", logged(f"loss/{part}"), logarithmic=True) for part in parts),
        *(Panel(f"Loss: {part}, held out", logged(f"eval/loss/{part}"), logarithmic=True) for part in parts),
        *(Panel(names.of(axis)[0], evaluated(axis)) for axis in axes),
        Panel("The best of an episode in the simulator", scores),
    ]


def _metrics(runs: Sequence[Run]) -> Html:
    if not any(run.measured for run in runs):
        return NOTHING
    found = [section.body for section in comparison.metrics(runs)]
    return fill("<details><summary>A column for each member</summary>{}</details>", found)
