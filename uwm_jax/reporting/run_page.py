"""The page of one run, `report.html`, from what lies in its workdir.

A section whose files are not there yet is a line that says which command makes them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from uwm_jax.data.windows import WindowSpec
from uwm_jax.evaluation.data import doubt
from uwm_jax.files import Place, write_text
from uwm_jax.hub.runs import origin_of
from uwm_jax.reporting import names, tables
from uwm_jax.reporting.answers import answers
from uwm_jax.reporting.curves import Panel
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.others import others
from uwm_jax.reporting.page import NOTHING, Section, curves, figure, page
from uwm_jax.reporting.provenance import facts, timing, what_was_run
from uwm_jax.reporting.results import Run, seeds_of


def write(workdir: Place, output: Place | None = None, results: Place | None = None) -> Place:
    """Writes a run's page from what lies in its workdir; returns where.

    Args:
      output: the page; `report.html` in `results` by default.
      results: where more of its results lie than in the workdir, which it is by default.

    Raises:
      UserError: `workdir` is no run's directory.
    """
    run = Run.read(workdir, results)
    kind = run.kind
    output = output or (results or workdir) / "report.html"
    sections = [
        Section("idea", f"{kind.title}: what it is asked", _idea(run)),
        Section("answers", "What the numbers say", _answers(run)),
        Section("uses", "All uses and baselines", _metrics(run)),
        Section("pictures", "Pictures", _pictures(run)),
        Section("simulator", "In the simulator", _closed_loop(run)),
        Section("few-steps", "Fewer steps", _few_steps(run)),
        Section("others", "Other results", others(run)),
        Section("curves", "Curves", curves(_panels(run))),
        Section("time", "Time", timing(run)),
        Section("run", "What was run", what_was_run(run)),
    ]
    about = str(run.starts[-1].get("about", "")) if run.starts else ""
    top = fill("<h1>{}: {}</h1>{}{}", kind.title, run.name, _about(about), facts(run))
    write_text(output, page(f"{kind.title}: {run.name}", top, sections))
    return output


# --- sections ----------------------------------------------------------------------------------------------------


def _doubt(how: Mapping[str, Any]) -> Html:
    return fill("<p><b>{}</b></p>", told) if (told := doubt(how)) else NOTHING


def _about(text: str) -> Html:
    """The first words of a config file, with what stands between backquotes as code."""
    parts = re.split(r"`([^`]+)`", text)
    return fill("<p>{}</p>", [fill("<code>{}</code>" if i % 2 else "{}", part) for i, part in enumerate(parts)])


def _idea(run: Run) -> Html:
    caption = fill(
        "One moment of {} (of some that are spread over these episodes, the one in which most moves). A column is a "
        "use: what it is given, what is hidden from it, and what it makes. Step {}.",
        "a held-out episode" if doubt(run.eval_how) else "an episode that was held out of training",
        run.eval_step,
    )
    about = "one held-out moment: what each use is given and what it makes"
    lead = fill('<div class="lead">{}</div>', _about(run.kind.introduction))
    picture = figure(run.picture("idea.png"), about, caption)
    if not picture:
        return fill("{}{}", lead, _missing("The pictures of all uses", run, "evaluate"))
    window = WindowSpec.from_config(run.config.data.window).describe()
    return fill("{}{}<p>Below, a <i>window</i> is {}.</p>", lead, picture, window)


def _answers(run: Run) -> Html:
    step = "" if run.rollout_step == run.eval_step else f", step {run.rollout_step}"
    found = answers(run.metrics, run.rollout, run.kind.questions, step)
    if not found:
        return NOTHING
    return fill(
        "<p>An answer is <i>yes</i> only where the whole 95 % interval is above zero, <i>no</i> where it is below, and "
        "<i>undecided</i> where zero is inside. The numbers are differences of errors (in the simulator: of scores), "
        "so counted that positive is better for the one that is named first, and paired: both did the same windows or "
        "episodes.</p>{}",
        found,
    )


def _metrics(run: Run) -> Html:
    """All uses, the control and the baselines in one table."""
    if not run.metrics:
        return _missing("Metrics", run, "evaluate")
    count, held_out = (max(getattr(m, of) for m in run.metrics.values()) for of in ("n", "episodes"))
    return fill(
        "{}{}<p><small>Step {}; means over {} windows of {} held-out episodes, and below them the 95 % interval, which "
        "is clustered by episode. o: what is seen now, a: the next actions, o&#x27;: what is seen after them. What "
        "changed are the values (of a pixel's red, green or blue, 0 to 1) that differ by more than 0.05 from the "
        "current frame; windows without any are left out there.</small></p>",
        _doubt(run.eval_how),
        tables.evaluation(run.metrics, run.kind.uses),
        run.eval_step,
        count,
        held_out,
    )


def _pictures(run: Run) -> Html:
    found = [figure(run.picture(name), caption, caption) for name, caption in names.PICTURES.items()]
    return fill("{}", found) if any(found) else _missing("Pictures", run, "evaluate")


def _closed_loop(run: Run) -> Html:
    if not run.rollout:
        return _missing("Closed loop (for models of PushT demonstrations)", run, "rollout --env=pusht")
    count, how = max(m.n for m in run.rollout.values()), run.rollout_how
    seeds = seeds_of(how)
    steps = f" in {how['sampler_steps']} evaluations of the network" if how.get("sampler_steps") else ""
    how_words = (
        f"{how.get('env')}, seeds {min(seeds)} to {max(seeds)}, chunks of actions sampled{steps}, of which "
        f"{how.get('execute')} steps are taken; "
        if seeds
        else ""
    )
    gif = figure(
        run.folders["rollout"] / "episodes.gif",
        "episodes in the simulator",
        "The model acts; next to it, for models that predict frames from known actions, what it imagined of the "
        "actions that were then taken, and what was seen.",
    )
    return fill(
        "{}<p><small>Step {}; {}{} episodes that start from the same seeds for all; 95 % intervals over "
        "episodes.</small></p>{}",
        tables.closed_loop(run.rollout),
        run.rollout_step,
        how_words,
        count,
        gif,
    )


def _few_steps(run: Run) -> Html:
    if not run.few_steps:
        return _missing("Comparison of samplers", run, "compare_samplers --sampler=leading,trailing --steps=10,4,2")
    return fill(
        "{}<p>Fewer evaluations of the network make a sample quicker. What does it cost? Leading timesteps end at 0, "
        "and so begin well below the noisiest when they are few; trailing ones begin at the noisiest. What a mode "
        "hides is pure noise; the network is told that it is as noisy as at the timestep <i>hidden "
        "at</i>.</p>{}<p><small>Step {}; {}means, and below them the 95 % interval over episodes. Time: one chunk of "
        "actions for one observation, without compilation.</small></p>",
        _doubt(run.few_steps_how),
        tables.samplers(run.few_steps),
        run.few_steps_step,
        _few_steps_of(run.few_steps_how, run.few_steps),
    )


def _few_steps_of(how: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if not how:
        return ""
    ways = how.get("ways")
    made = "" if len(rows) == ways else f"{len(rows)} of {ways} ways, since it was stopped; "
    acted = f"closed loop: {how.get('closed_loop_episodes')} episodes of {how['env']}; " if "env" in how else ""
    return f"{made}{how.get('windows')} windows of {how.get('episodes')} held-out episodes; {acted}"


def _panels(run: Run) -> list[Panel]:
    uses, parts = run.kind.uses, names.colors(run.config.loss.weights)
    colors = names.colors(uses)
    loss = [
        run.logged(f"{prefix}loss/{part}", f"{part}, {name}", color, style)
        for part, color in parts.items()
        for prefix, style, name in (("", "-", "training"), ("eval/", "--", "held out"))
    ]
    errors = []
    for title, (metric, baselines) in names.ERRORS.items():
        shuffled = [f"control/{use}_shuffled/{metric}" for use in uses]
        lines = [run.evaluated(f"{use}/{metric}", use, colors[use]) for use in uses]
        lines += [run.evaluated(n, f"{u}, shuffled actions", "#d81b60") for u, n in zip(uses, shuffled, strict=True)]
        lines += [run.evaluated(f"{n}/{metric}", label, "#777777", style) for n, (label, style) in baselines.items()]
        errors.append(Panel(title, lines))
    probes = [name for name in run.metrics if name.startswith("control/") and name.count("/") == 1]
    panels = [Panel("Loss (mean squared error)", loss, logarithmic=True), *errors]
    return panels + [Panel(names.of(n)[0], [run.evaluated(n, n, "#009e73")], zero=True) for n in probes]


# --- for all sections --------------------------------------------------------------------------------------------


def _missing(what: str, run: Run, command: str) -> Html:
    """A line that says which command makes what is missing."""
    name, _, more = command.partition(" ")
    place = shlex.quote(str(origin_of(run.workdir) or run.workdir))
    line = f"python -m uwm_jax.{name} --workdir={place} {more}".strip()
    return fill('<p class="missing">{}: not made yet. <code>{}</code> makes it.</p>', what, line)
