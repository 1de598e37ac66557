"""The page of one run, `report.html`, from what lies in its workdir.

A section whose files are not there yet is a line that says which command makes them.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base, flatten
from uwm_jax.diffusion.modes import MODES, QUESTIONS
from uwm_jax.envs.parallel import HOLD
from uwm_jax.evaluation.program import MEAN_IMAGE_WINDOWS
from uwm_jax.evaluation.results import Run, verdict, words
from uwm_jax.files import write_text
from uwm_jax.reporting.curves import Panel
from uwm_jax.reporting.page import cell, curves, fields, image, page
from uwm_jax.reporting.pictures import COLORS, formula
from uwm_jax.training.goodput import CATEGORIES, duration
from uwm_jax.training.record import code_version


def write(workdir: Path, output: Path | None = None) -> Path:
    """Writes a run's page from what lies in its workdir; returns where, `report.html` in the workdir by default.

    Raises:
      UserError: `workdir` is no run's directory.
    """
    run = Run.read(workdir)
    output = output or workdir / "report.html"
    parts = [_idea(run), _answers(run), _metrics(run), _pictures(run), _closed_loop(run), _few_steps(run)]
    parts += [curves(_own_panels(run)), _timing(run), _what_was_run(run)]
    write_text(output, page(f"UWM: {run.name}", "\n".join(parts)))
    return output


# --- sections of one run -----------------------------------------------------------------------------------------

INTRODUCTION = """<p class="lead">A robot that learns from recordings usually learns one thing: which action to take
next. A <b>Unified World Model</b> is one network that sees actions and later camera frames together, each under noise
of a strength of its own, and learns to take the noise away. What it is given clean it takes as known, what is pure
noise it does without, so the same weights <b>act</b> (policy), <b>predict</b> (video, forward), <b>explain</b>
(inverse) and <b>imagine</b> (joint).</p>"""

# (question, metric whose interval answers it); positive is yes.
CLAIMS = (
    ("Does it act? The policy mode against the mean action", "paired/policy_vs_mean_action/action_mse"),
    ("&hellip; against the last action, repeated", "paired/policy_vs_last_action/action_mse"),
    ("Does it explain? The inverse mode against the mean action", "paired/inverse_vs_mean_action/action_mse"),
    (
        "&hellip; against a straight line to the true last action",
        "paired/inverse_vs_linear_interpolation/action_mse",
    ),
    ("&hellip; against the policy mode, which does not see the later frame", "paired/inverse_vs_policy/action_mse"),
    (
        "Does it predict what actions do? One evaluation with the true actions against another window's",
        "control/shuffle_gap",
    ),
    ("&hellip; whole samples, all pixels", "paired/forward_vs_shuffled/pixel_mse"),
    ("&hellip; whole samples, pixels that changed", "paired/forward_vs_shuffled/changed_mse"),
    (
        "Do known actions help to predict? Forward against video, pixels that changed",
        "paired/forward_vs_video/changed_mse",
    ),
    (
        "Are the forward mode's frames better than the current frame, copied?",
        "paired/forward_vs_copied_frame/pixel_mse",
    ),
    ("Are they better than the mean image?", "paired/forward_vs_mean_image/pixel_mse"),
    ("&hellip; on pixels that changed", "paired/forward_vs_mean_image/changed_mse"),
)
CLOSED_LOOP_CLAIMS = (
    ("In the simulator: does it do better than random targets?", "random_uniform"),
    (f"&hellip; than random targets that are held for {HOLD} steps?", "random_held"),
)
METRICS = {  # what a metric says
    "action_mse": "error of actions<br><small>MSE, range -1 to 1</small>",
    "pixel_mse": "error of frames<br><small>MSE, pixels 0 to 1</small>",
    "changed_mse": "&hellip; where the picture changed<br><small>MSE</small>",
    "psnr": "quality of frames<br><small>PSNR, dB; more is better</small>",
    "latent_mse": "error of latents<br><small>MSE</small>",
}
BASELINES = {
    "mean_action": "the mean action of the training episodes",
    "last_action": "the last action, repeated",
    "linear_interpolation": "a straight line from the last action to the chunk's true last one",
    "copied_frame": "the current frame, copied",
    "mean_image": f"the mean later frame of {MEAN_IMAGE_WINDOWS} windows of training episodes",
    "codec": "not a baseline but the ceiling: the true frame through the image codec",
}
ACTORS = {
    "policy": "the policy mode",
    "expert": "the expert that made the demonstrations",
    "random_held": f"random targets, each held for {HOLD} steps",
    "random_uniform": "random targets, a new one each step",
    "no_action": "doing nothing: how the episodes start",
}


_MAY_BE_KNOWN = "Episodes that are held out here may be among those that it learned from."
OTHER_DATA = {  # by whether an evaluation's data are the run's own
    False: f"This evaluation is of other data than the run was trained on. {_MAY_BE_KNOWN}",
    None: f"It is not known what this run was trained on. {_MAY_BE_KNOWN}",
}


def _other_data(how: Mapping[str, Any]) -> str:
    own = how.get("own_data", True)
    return "" if own else f"<p><b>{OTHER_DATA[own]}</b></p>"


def _idea(run: Run) -> str:
    picture = image(run.picture("idea.png"), "one held-out moment: what each mode is given and what it samples")
    if picture:
        own = run.eval_how.get("own_data", True)
        episode = "an episode that was held out of training" if own else "a held-out episode"
        picture = f"""<figure>{picture}<figcaption>One moment of {episode} (of some that are spread over these episodes,
the one in which most moves). A mode, a column here, is nothing but the choice of what is given, what is hidden and what
is sampled. Step {run.eval_step}.</figcaption></figure><p>{_window(run.config)}</p>"""
    else:
        picture = _missing("The pictures of all modes", f"python -m uwm_jax.evaluate --workdir={_path(run)}")
    about = run.starts[-1].get("about", "") if run.starts else ""
    about = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(about))
    about = f"<p>This run, <b>{html.escape(run.name)}</b>. {about}</p>" if about else ""
    return f"<h1>One network that acts, predicts, explains and imagines</h1>{INTRODUCTION}{about}{picture}"


def _window(config: ConfigDict) -> str:
    window = config.data.window
    steps = [*window.obs, *window.action, *window.next_obs]
    seen, actions, later = len(window.obs), len(window.action), len(window.next_obs)
    return (
        f"Below, a <i>window</i> is {max(steps) - min(steps) + 1} steps of an episode: {seen} frames of each camera "
        f"that are seen, a <i>chunk</i> of {actions} actions, and {later} later frames."
    )


def _answers(run: Run) -> str:
    """Questions that the intervals answer, in words."""
    rows = []
    for question, name in CLAIMS:
        if (m := run.metrics.get(name)) is not None:
            rows.append((question, verdict(m), words(m)))
    for question, other in CLOSED_LOOP_CLAIMS:
        if (m := run.rollout.get(f"paired/policy_vs_{other}/{run.score}")) is not None:
            step = "" if run.rollout_step == run.eval_step else f", step {run.rollout_step}"
            rows.append((question, verdict(m), f"{words(m)}, {m.n} episodes{step}"))
    if not rows:
        return ""
    body = "".join(
        f'<tr><td>{question}</td><td class="{answer.split(",")[0]}">{answer}</td><td>{numbers}</td></tr>'
        for question, answer, numbers in rows
    )
    return f"""<h2>What the numbers say</h2>
<p>An answer is <i>yes</i> only where the whole 95 % interval is above zero. The numbers are differences of errors
(in the simulator: of scores), so counted that positive is better for the one that is named first, and paired: both did
the same windows or episodes.</p>
<table><tr><th>question</th><th>answer</th><th>difference [95 % interval]</th></tr>{body}</table>"""


def _metrics(run: Run) -> str:
    """All modes, the control and the baselines in one table."""
    if not run.metrics:
        return _section("Every mode beside baselines", run, "evaluate", "")
    columns = [name for name in METRICS if any(key.endswith("/" + name) for key in run.metrics)]

    def row(label: str, prefix: str, about: str) -> str:
        cells = "".join(cell(run.metrics.get(f"{prefix}/{name}")) for name in columns)
        return f"<tr><th>{label}</th><td>{about}</td>{cells}</tr>" if cells.replace("<td></td>", "") else ""

    rows = [
        row(mode, mode, f"<code>{html.escape(formula(mode))}</code> {html.escape(QUESTIONS[mode])}") for mode in MODES
    ]
    rows.append(
        row("control", "control/forward_shuffled", "forward, but with the actions of a window of another episode")
    )
    rows += [row(name.replace("_", " "), f"baseline/{name}", about) for name, about in BASELINES.items()]
    heads = "".join(f"<th>{METRICS[name]}</th>" for name in columns)
    count, episodes = (max(getattr(m, of) for m in run.metrics.values()) for of in ("n", "episodes"))
    return f"""<h2>Every mode beside baselines</h2>{_other_data(run.eval_how)}
<table><tr><th></th><th></th>{heads}</tr>{"".join(rows)}</table>
<p><small>Step {run.eval_step}; means over {count} windows of {episodes} held-out episodes, and below
them the 95 % interval, clustered by episode. o: what is seen now, a: the next actions, o': what is seen after
them. What changed are the values (of a pixel's red, green or blue, 0 to 1) that differ by more than 0.05 from
the current frame; windows without any are left out there.</small></p>"""


def _pictures(run: Run) -> str:
    captions = {
        "modes.png": "Predicted frames beside what really came, and where they are wrong.",
        "actions.png": "Sampled actions beside those that were really done.",
        "denoise.gif": "The joint mode at work: from pure noise to actions and the frame that they lead to.",
    }
    figures = "".join(
        f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"
        for name, caption in captions.items()
        if (drawn := image(run.picture(name), caption))
    )
    return _section("Pictures", run, "evaluate", figures)


def _closed_loop(run: Run) -> str:
    command = "rollout --env=pusht"
    if not run.rollout:
        return _section("In the simulator (for models of PushT demonstrations)", run, command, "")
    columns = (run.score, "success")
    rows = "".join(
        f"<tr><th>{actor.replace('_', ' ')}</th><td>{about}</td>"
        + "".join(cell(run.rollout.get(f"{actor}/{name}")) for name in columns)
        + "</tr>"
        for actor, about in ACTORS.items()
        if f"{actor}/{run.score}" in run.rollout
    )
    count, how = max(m.n for m in run.rollout.values()), run.rollout_how
    seeds = [episode["seed"] for episode in how.get("episodes", {}).get("policy", [])]
    how_words = (
        f"{how['env']}, seeds {min(seeds)} to {max(seeds)}, chunks of actions sampled in {how['sampler_steps']} "
        f"evaluations of the network, of which {how['execute']} steps are taken; "
        if seeds
        else ""
    )
    gif = image(run.workdir / "rollout" / str(run.rollout_step) / "episodes.gif", "episodes in the simulator")
    caption = """The policy mode acts; beside it what the forward mode, told the actions that were then taken, imagined
would be seen, and what was seen."""
    figure = f"<figure>{gif}<figcaption>{caption}</figcaption></figure>" if gif else ""
    best = run.score.removeprefix("max_").replace("_", " ")
    body = f"""<table><tr><th></th><th></th><th>best {best} of an episode<br><small>mean over episodes</small></th>
<th>success<br><small>share of episodes</small></th></tr>{rows}</table>
<p><small>Step {run.rollout_step}; {html.escape(how_words)}{count} episodes that start from the same seeds for all;
95 % intervals over episodes.</small></p>{figure}"""
    return _section("In the simulator", run, command, body)


def _few_steps(run: Run) -> str:
    body = ""
    if run.few_steps:
        names = ["policy/action_mse", "inverse/action_mse", "forward/changed_mse", "video/psnr"]
        names += sorted({key for row in run.few_steps for key in row["metrics"] if key.startswith("closed_loop/")})
        names = [n for n in names if any(n in row["metrics"] for row in run.few_steps)]
        heads = "".join(f"<th>{_title(n)}</th>" for n in names)
        rows = "".join(
            f"<tr><th>{html.escape(str(row['sampler']))}</th><td>{row['steps']}</td>"
            f"<td>{row.get('first_timestep', '')}</td><td>{row.get('hidden_timestep', '')}</td>"
            f"<td>{1000 * row['seconds_per_sample']:.3g} ms</td>"
            + "".join(cell(row["metrics"].get(n)) for n in names)
            + "</tr>"
            for row in run.few_steps
        )
        body = f"""{_other_data(run.few_steps_how)}
<p>Fewer evaluations of the network make a sample quicker. What does it cost? Leading timesteps end at 0, and so begin
well below the noisiest when they are few; trailing ones begin at the noisiest. What a mode hides is pure noise; the
network is told that it is as noisy as at the timestep <i>hidden at</i>.</p>
<table><tr><th>sampler</th><th>evaluations</th><th>first timestep</th><th>hidden at</th><th>time of a sample</th>
{heads}</tr>{rows}</table>
<p><small>Step {run.few_steps_step}; {_few_steps_of(run.few_steps_how, run.few_steps)}means, and below them the 95 %
interval over episodes. Time: one chunk of actions for one observation, without compilation.</small></p>"""
    return _section("Fewer steps", run, "evaluate --sampler=leading,trailing --steps=10,4,2", body)


def _few_steps_of(how: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if not how:
        return ""
    made = "" if len(rows) == how["ways"] else f"{len(rows)} of {how['ways']} ways, since it was stopped; "
    acted = f"closed loop: {how['closed_loop_episodes']} episodes of {how['env']}; " if "env" in how else ""
    return html.escape(f"{made}{how['windows']} windows of {how['episodes']} held-out episodes; {acted}")


def _title(name: str) -> str:
    """Words for `policy/action_mse` or `closed_loop/success`."""
    who, _, metric = name.rpartition("/")
    return f"{who.replace('_', ' ')}<br>{METRICS.get(metric, metric.replace('_', ' '))}"


def _timing(run: Run) -> str:
    last = run.lines[-1] if run.lines else {}
    seconds = {name: last[f"time/{name}"] for name in CATEGORIES if last.get(f"time/{name}")}
    if not seconds:
        return ""
    rates = sorted(line["samples_per_second"] for line in run.lines[1:] or run.lines if "samples_per_second" in line)
    total = sum(seconds.values())
    rate = rates[len(rates) // 2] if rates else 0.0
    unit = "h:mm:ss" if total >= 3600 else "m:ss"
    parts = [f"{last['step']} steps of {run.config.batch_size} windows in {duration(total)} ({unit})"]
    if rate:
        parts.append(f"{1000 * run.config.batch_size / rate:.3g} ms a step, {rate:.4g} windows a second (medians)")
    parts.append(f"{100 * last.get('goodput', 0):.1f} % of the wall time in steps")
    if "mfu" in last:
        parts.append(f"{100 * last['mfu']:.1f} % of the accelerator's peak FLOP/s")
    bars = "".join(
        f"<tr><th>{name.replace('_', ' ')}</th><td>{duration(s)}</td><td>{100 * s / total:.1f} %</td>"
        f'<td class="bar"><i style="width:{100 * s / total:.2f}%"></i></td></tr>'
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return f"<h2>Time</h2><p>{'; '.join(parts)}.</p><table>{bars}</table>"


def _what_was_run(run: Run) -> str:
    starts = "".join(
        f"<p>{html.escape(start['time'])}, uwm_jax {html.escape(start['code_version'])}:</p>"
        f"<pre>{html.escape(shlex.join(start['command']))}</pre>"
        + (
            f"<p>Flags changed {html.escape(start['config_file'])}:</p>"
            + fields({"the file": start.get("in_file", {}), "this run": start["changed"]}, start["changed"])
            if start["changed"]
            else f"<p>As {html.escape(start['config_file'])} has it.</p>"
        )
        for start in run.starts
    )
    defaults, flat = flatten(base()), flatten(run.config)
    # The sources of a mixture have no defaults.
    changed = [name for name in sorted(flat) if name not in defaults or flat[name] != defaults[name]]
    version = f"trained by uwm_jax {html.escape(run.code_version)}, " if run.code_version else ""
    return f"""<h2>What was run</h2>
{starts}
<p>{version}report by uwm_jax {html.escape(code_version())}.</p>
{_use("Evaluation", run.eval_step, run.eval_how, run.config)}
{_use("Comparison of samplers", run.few_steps_step, run.few_steps_how, run.config)}
{_use("Closed loop", run.rollout_step, run.rollout_how, run.config)}
{_data(run)}
<details><summary>Config: {len(changed)} fields that differ from <code>uwm_jax.config.base()</code></summary>
{fields({"base()": defaults, "this run": flat}, changed)}</details>"""


def _use(what: str, step: int | None, how: Mapping[str, Any], config: ConfigDict) -> str:
    """With which command the newest evaluation or closed loop was made; "" where that is not recorded."""
    if not how.get("command"):
        return ""
    changed, trained = how["changed"], flatten(config)
    table = fields({"training": trained, "here": changed}, changed) if changed else ""
    return f"""<p>{what} of step {step}, {html.escape(how["time"])}, uwm_jax {html.escape(how["code_version"])}:</p>
<pre>{html.escape(shlex.join(how["command"]))}</pre>{table}"""


def _data(run: Run) -> str:
    """The datasets of the run's checkpoints, by their manifests."""
    rows = ""
    for source, manifest in run.manifests.items():
        splits = "; ".join(
            f"{name}: {split['episodes']} episodes, {split['steps']} steps"
            for name, split in manifest["splits"].items()
        )
        cameras = ", ".join(f"{name} {c['height']}x{c['width']}" for name, c in manifest["cameras"].items())
        digests = ", ".join(s["sha256"][:12] for split in manifest["splits"].values() for s in split["shards"][:4])
        cells = (source or run.config.data.path, f"{manifest['name']} {manifest['version']}", splits, cameras, digests)
        rows += "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"
    heads = (
        "<tr><th>source</th><th>dataset</th><th>splits</th><th>cameras</th><th>SHA-256 of the first shards</th></tr>"
    )
    return f"<p>Data:</p><table>{heads}{rows}</table>" if rows else ""


# --- curves --------------------------------------------------------------------------------------------------------


def _own_panels(run: Run) -> list[Panel]:
    loss = [
        run.logged(f"{prefix}loss/{modality}", f"{what}, {name}", color, style)
        for modality, what, color in (("action", "actions", "#d55e00"), ("next_obs", "later frames", "#0072b2"))
        for prefix, style, name in (("", "-", "training"), ("eval/", "--", "held out"))
    ]
    baselines = {"mean_action": ("-.", "mean action"), "linear_interpolation": (":", "straight line")}
    actions = [run.evaluated(f"{mode}/action_mse", mode, COLORS[mode]) for mode in MODES]
    actions += [run.evaluated(f"baseline/{b}/action_mse", label, "#777777", s) for b, (s, label) in baselines.items()]
    frames = [run.evaluated(f"{mode}/changed_mse", mode, COLORS[mode]) for mode in MODES]
    frames += [
        run.evaluated("control/forward_shuffled/changed_mse", "forward, shuffled actions", "#d81b60"),
        run.evaluated("baseline/copied_frame/changed_mse", "copied frame", "#777777", "-."),
        run.evaluated("baseline/mean_image/changed_mse", "mean image", "#777777", ":"),
    ]
    gap = [run.evaluated("control/shuffle_gap", "shuffled minus true actions", "#009e73")]
    return [
        Panel("loss (mean squared error)", loss, logarithmic=True),
        Panel("error of sampled actions", actions),
        Panel("error of frames where the picture changed", frames),
        Panel("what wrong actions cost, one evaluation", gap, zero=True),
    ]


# --- for all sections ---------------------------------------------------------------------------------------------


def _section(title: str, run: Run, command: str, body: str) -> str:
    """A section, or one line that says which command makes it."""
    name, _, more = command.partition(" ")
    line = f"python -m uwm_jax.{name} --workdir={_path(run)} {more}".strip()
    return f"<h2>{title}</h2>{body}" if body else _missing(title, line)


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">{what}: not made yet. <code>{html.escape(command)}</code> makes it.</p>'


def _path(run: Run) -> str:
    return shlex.quote(str(run.workdir))
