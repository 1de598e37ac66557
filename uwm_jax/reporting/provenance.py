"""Provenance of a run's numbers: its facts in short, the commands and configs that made them, data and time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base, flatten
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.page import NOTHING, fields, head, number_head, table
from uwm_jax.reporting.results import Run
from uwm_jax.training import average
from uwm_jax.training.goodput import CATEGORIES, duration
from uwm_jax.training.provenance import code_version


def facts(run: Run) -> Html:
    """Date, data, steps and config of a run, for the top of its page."""
    found: list[tuple[str, Any]] = []
    if run.starts:
        last, count = run.starts[-1], len(run.starts)
        again = f"; started {count} times, first {_date(run.starts[0])}" if count > 1 else ""
        found.append(("Trained", f"{_date(last)}{again}"))
    if run.branched_from:
        found.append(("Branched", f"from {', which went on from '.join(reversed(run.branched_from))}"))
    found.append(("Data", _data_in_short(run)))
    done = run.lines[-1]["step"] if run.lines else 0
    found.append(
        ("Steps", f"{_thousands(done)} of {_thousands(run.config.total_steps)}, {run.config.batch_size} windows each")
    )
    if run.starts:
        changed = len(run.starts[-1].get("changed", {}))
        flags = f", {changed} field{'s' if changed != 1 else ''} changed by flags" if changed else ""
        found.append(("Config", fill("<code>{}</code>{}", run.starts[-1].get("config_file", ""), flags)))
    if run.metrics:
        windows, episodes = (max(getattr(m, of) for m in run.metrics.values()) for of in ("n", "episodes"))
        when = f", {_date(run.eval_how)}" if run.eval_how.get("time") else ""
        text = f"step {run.eval_step}{when}: {windows} windows of {episodes} held-out episodes"
        found.append(("Evaluated", text + parameters(run.eval_how)))
    if run.rollout:
        count = max(m.n for m in run.rollout.values())
        when = f", {_date(run.rollout_how)}" if run.rollout_how.get("time") else ""
        acted = f"step {run.rollout_step}{when}: {count} episodes of {run.rollout_how.get('env', '?')}"
        found.append(("In the simulator", acted + parameters(run.rollout_how)))
    trained = f"trained by uwm_jax {run.code_version}, " if run.code_version else ""
    found.append(("Code", f"{trained}page by {code_version()}"))
    return fill('<dl class="facts">{}</dl>', [fill("<dt>{}</dt><dd>{}</dd>", name, value) for name, value in found])


def parameters(how: Mapping[str, Any]) -> str:
    """ ", averaged parameters", and how much of these is still the start; "" where a result does not tell."""
    kind, share = how.get("parameters"), how.get("share_of_start")
    if kind == average.RAW:
        return ", parameters as trained last"
    told = isinstance(share, float) and share > average.MUCH
    still = f", of which {share:.1%} are still those of the start" if told else ""
    return f", averaged parameters{still}" if kind == average.AVERAGE else ""


def _date(record: Mapping[str, Any]) -> str:
    """`2026-01-31 12:00 UTC` of an ISO time; other text unchanged."""
    time = str(record.get("time", ""))
    date, t, clock = time.partition("T")
    return f"{date} {clock[:5]} UTC" if t and clock.endswith("+00:00") else time


def _thousands(count: Any) -> str:
    return f"{count:,}" if isinstance(count, int) else str(count)


def _data_in_short(run: Run) -> str:
    if not run.manifests:
        return str(run.config.data.path)
    return "; ".join(
        f"{manifest.get('name')} {manifest.get('version')} ("
        + ", ".join(
            f"{name}: {_thousands(split['episodes'])} episodes, {_thousands(split['steps'])} steps"
            for name, split in manifest["splits"].items()
        )
        + ")"
        for manifest in run.manifests.values()
    )


def timing(run: Run) -> Html:
    """Wall time by category; "" where nothing of it was logged."""
    last = run.lines[-1] if run.lines else {}
    seconds = {name: last[f"time/{name}"] for name in CATEGORIES if last.get(f"time/{name}")}
    if not seconds:
        return NOTHING
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
    rows = [
        [
            head(name.replace("_", " ")),
            fill('<td class="number">{}</td>', duration(s)),
            fill('<td class="number">{}</td>', f"{100 * s / total:.1f} %"),
            fill('<td class="bar"><i style="width:{}%"></i></td>', f"{100 * s / total:.2f}"),
        ]
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    heads = ["what", number_head(unit), number_head("share"), ""]
    return fill("<p>{}.</p>{}", "; ".join(parts), table(heads, rows, "time"))


def what_was_run(run: Run) -> Html:
    """Commands, changed fields, data and config."""
    defaults, flat = flatten(base()), flatten(run.config)
    # The sources of a mixture have no defaults.
    changed = [name for name in sorted(flat) if name not in defaults or flat[name] != defaults[name]]
    return fill(
        "{}{}{}{}{}<details><summary>Config: {} fields that differ from <code>uwm_jax.config.base()</code></summary>{}"
        "</details>",
        [_start(start) for start in run.starts],
        use("Evaluation", run.eval_step, run.eval_how, run.config),
        use("Comparison of samplers", run.few_steps_step, run.few_steps_how, run.config),
        use("Closed loop", run.rollout_step, run.rollout_how, run.config),
        _data(run),
        len(changed),
        fields({"base()": defaults, "this run": flat}, changed),
    )


def _start(start: Mapping[str, Any]) -> Html:
    changed, file = start.get("changed", {}), start.get("config_file", "")
    if changed:
        columns = {"the file": start.get("in_file", {}), "this run": changed}
        how = fill("<p>Flags changed {}:</p>{}", file, fields(columns, changed))
    else:
        how = fill("<p>As {} has it.</p>", file)
    return fill(
        "<p>{}, uwm_jax {}:</p><pre>{}</pre>{}",
        start.get("time", ""),
        start.get("code_version", ""),
        _command(start),
        how,
    )


def use(what: str, step: Any, how: Mapping[str, Any], config: ConfigDict) -> Html:
    """Command, code version and changed fields of an evaluation or closed loop; "" where that is not recorded."""
    if not how.get("command"):
        return NOTHING
    changed = how.get("changed", {})
    return fill(
        "<p>{} of step {}{}, {}, uwm_jax {}:</p><pre>{}</pre>{}",
        what,
        step,
        parameters(how),
        how.get("time", ""),
        how.get("code_version", ""),
        _command(how),
        fields({"training": flatten(config), "here": changed}, changed) if changed else None,
    )


def _command(record: Mapping[str, Any]) -> str:
    return shlex.join(map(str, record.get("command", [])))


def _data(run: Run) -> Html:
    """The datasets of the run's checkpoints, by their manifests, and what of them was trained on."""
    rows = []
    for source, manifest in run.manifests.items():
        splits = "; ".join(
            f"{name}: {split['episodes']} episodes, {split['steps']} steps"
            for name, split in manifest["splits"].items()
        )
        cameras = ", ".join(f"{name} {c['height']}x{c['width']}" for name, c in manifest["cameras"].items())
        digests = ", ".join(s["sha256"][:12] for split in manifest["splits"].values() for s in split["shards"][:4])
        name = f"{manifest['name']} {manifest['version']}"
        rows.append([source or run.config.data.path, name, splits, run.used.get(source, ""), cameras, digests])
    heads = ["source", "dataset", "splits", "trained on", "cameras", "SHA-256 of the first shards"]
    return fill("<p>Data:</p>{}", table(heads, rows, "datasets")) if rows else NOTHING
