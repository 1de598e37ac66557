"""The page of a replay: the outcome, predicted next to recorded actions in raw units, and every fault that was tried.

One file, readable offline.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np

from uwm_jax.data.episodes import encode_png
from uwm_jax.reporting.curves import Curve, Panel
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.page import Section, curves, head, number_head, page, table
from uwm_jax.serving.replay import Replay, Tried

_RECORDED, _AS_SENT, _MENDED = "#555555", "#0072b2", "#d55e00"
_MOST_COLUMNS = 32  # of an action that are drawn


def replay_page(replay: Replay) -> str:
    """The whole page."""
    title = f"Replay of {replay.name}"
    sections = [
        Section("actions", "Predicted and recorded actions", _actions(replay)),
        Section("faults", "What was tried", _tried(replay)),
        Section("frames", "The first frames, as they were sent", _frames(replay.frames)),
        Section("served", "What was served", _served(replay)),
    ]
    return page(title, _head(title, replay), sections)


def _head(title: str, replay: Replay) -> Html:
    wrong = replay.looks_wrong
    outcome = (
        [fill('<p class="lead"><span class="no">LOOKS WRONG:</span> {}</p>', line) for line in wrong]
        if wrong
        else [
            fill(
                '<p class="lead"><span class="yes">Nothing looks wrong:</span> undoing none of {} faults brings the '
                "answers much nearer.</p>",
                len(replay.tried),
            )
        ]
    )
    outcome += [fill("<p>Would not show, for the answers hardly change: {}.</p>", f) for f in replay.not_told_apart]
    p50, p99 = np.percentile(replay.latency_ms, (50, 99))
    facts = {
        "Error": f"{replay.as_sent.error:.3f}, where 1 is the spread of recorded actions",
        "Error of the mean action": f"{replay.mean_error:.3f}",
        "Compared": f"{len(replay.steps)} decisions, {sum(map(len, replay.recorded.values()))} actions",
        "A request takes": f"{p50:.1f} ms (99th percentile {p99:.1f} ms), connection included",
    }
    warnings = [fill("<p>Warning of the server: {}</p>", line) for line in replay.warnings]
    rows = [fill("<dt>{}</dt><dd>{}</dd>", name, value) for name, value in facts.items()]
    return fill("<h1>{}</h1>{}<dl class=facts>{}</dl>{}", title, outcome, rows, warnings)


def _actions(replay: Replay) -> Html:
    """A panel for each column of the action: chunks over the steps of the episode, in the robot's units."""
    shown: list[tuple[str, Mapping[int, np.ndarray], str, str]] = [
        ("recorded", replay.recorded, _RECORDED, "-"),
        ("predicted, as sent", replay.as_sent.rows, _AS_SENT, "-"),
    ]
    if replay.faults:
        shown.append(("predicted, without the faults", replay.faults[-1].rows, _MENDED, "--"))
    panels = []
    for column in range(min(len(replay.spread), _MOST_COLUMNS)):
        drawn = []
        for label, rows, color, style in shown:
            steps, values = _line(rows, replay.recorded, column)
            drawn.append(Curve(label, steps, values, color=color, style=style))
        error = np.sqrt(
            np.mean(
                np.concatenate(
                    [(replay.as_sent.rows[s][: len(r), column] - r[:, column]) ** 2 for s, r in replay.recorded.items()]
                )
            )
        )
        about = f"action [{column}], error {error:.4g} as sent (spread {replay.spread[column]:.4g})"
        panels.append(Panel(about, drawn, over="steps of the episode"))
    return curves(panels)


def _line(
    rows: Mapping[int, np.ndarray], like: Mapping[int, np.ndarray], column: int
) -> tuple[list[float], list[float]]:
    """One line of all chunks; where a chunk does not continue the one before, the line is broken."""
    steps: list[float] = []
    values: list[float] = []
    for step in sorted(like):
        if steps and step != steps[-1] + 1:
            steps.append(step - 0.5)
            values.append(float("nan"))
        count = len(like[step])
        steps += range(step, step + count)
        values += rows[step][:count, column].tolist()
    return steps, values


def _tried(replay: Replay) -> Html:
    named = {fault.fault for fault in replay.faults}

    def row(tried: Tried, base: float) -> Sequence[object]:
        if tried.refused:
            return [head(tried.fault), fill('<td class="number">refused</td>'), "", tried.refused]
        share = fill(f'<td class="number">{tried.error / base:.2f}</td>') if base else ""
        said = fill('<td class="no">named</td>') if tried.fault in named else ""
        return [head(tried.fault or "as sent"), fill('<td class="number">{}</td>', f"{tried.error:.3f}"), share, said]

    rows = [row(tried, replay.as_sent.error) for tried in (replay.as_sent, *replay.tried)]
    heads = ["Assumed", number_head("Error"), number_head("Share", "of that as sent"), ""]
    about = fill(
        "<p>Each line undoes one fault in the same requests. A fault is named where the error falls by a tenth or "
        "more, and by more than chance over the decisions explains.</p>"
    )
    return fill("{}{}", about, table(heads, rows, "What was tried"))


def _frames(frames: Mapping[str, np.ndarray]) -> Html:
    figures = []
    for name, frame in frames.items():
        data = base64.b64encode(encode_png(frame)).decode()
        width = max(frame.shape[1], 160)
        picture = Html(f'<img width="{width}" src="data:image/png;base64,{data}" alt="')
        figures.append(fill('<figure>{}{}"><figcaption>{}</figcaption></figure>', picture, name, name))
    about = fill("<p>Compare them with those of the training data, and with what the robot's own program sends.</p>")
    return fill("{}{}", about, figures) if figures else Html("")


def _served(replay: Replay) -> Html:
    about = replay.metadata
    keys = ("system", "step", "parameters", "acting", "frames", "action_horizon", "action_dim", "execute", "stepwise")
    rows = [[head(key), str(about[key])] for key in keys if key in about]
    rows += [[head(f"--keys: {name}"), key or "dropped"] for name, key in about.get("keys", {}).items()]
    return table([], rows, "What was served")
