"""Pictures of what a model samples on held-out windows, next to the truth and to baselines.

  idea.png     one window: every use as a role for each modality (given, hidden, made)
  modes.png    later frames of all uses, the shuffled control and the baselines, and where each is wrong
  actions.png  sampled actions and the true ones, on the frame where they are positions in it, else over time
  denoise.gif  a sample on its way from noise

Those of which the windows have nothing are not drawn. They hold no text: `pictures.json` next to them has their
labels, which a page writes around them. Numpy in, files out: nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from uwm_jax import systems
from uwm_jax.data.spec import DataSpec
from uwm_jax.evaluation.evaluator import spread
from uwm_jax.evaluation.metrics import CHANGED
from uwm_jax.files import Place
from uwm_jax.reporting import names
from uwm_jax.reporting.drawing import (
    CHANGE,
    ERROR_SCALE,
    SAMPLE,
    TRUTH,
    Plane,
    Tiles,
    draw_border,
    draw_cross,
    draw_error,
    draw_frame,
    draw_outline,
    draw_path,
    draw_traces,
    image_of,
    save,
    save_gif,
)
from uwm_jax.reporting.sheets import Labels, Mark, write_labels
from uwm_jax.systems.base import Use

Windows = Mapping[str, np.ndarray]

GIVEN, HIDDEN, MADE = "given", "hidden", "sampled"  # the words under a tile of idea.png
ROLES = {  # the colour of a tile's border, and what the border says
    GIVEN: ("#999999", "given to the model"),
    HIDDEN: ("#cccccc", "hidden from the model"),
    MADE: (SAMPLE, "made by the model"),
}
GIF_STEP_MS, GIF_HOLD_MS = 350, 2500
_LINE_STYLES = ("-", "--", ":")
_SHARP = 2.0  # pixels of a PNG for one of a page


def draw(windows: Windows, spec: DataSpec, config: ConfigDict, folder: Place) -> dict[str, Place]:
    """Writes the pictures of some windows into `folder`, each by rename, and their labels.

    Args:
      windows: N windows on the host, as `Evaluator.run` gives them.
      spec: of the model: names of the cameras (views are sorted by name) and the normaliser of actions.
      config: the run's; `eval.action_plane` and `data` say where on a frame an action lies.

    Returns:
      {"idea", "modes", "actions", "denoise": file}, of these what was drawn.
    """
    if "current" not in windows:
        return {}
    uses = systems.get(config.system).uses
    plane = Plane.of(spec, config.data, config.eval.action_plane)
    raw = {
        name: np.asarray(spec.normalizer.unnormalize("action", value), np.float32)
        for name, value in windows.items()
        if name.endswith("action")
    }
    drawn = {}
    modalities = [m for m in names.SYMBOLS if any(m in use.makes for use in uses.values())]
    if modalities:
        drawn["idea"] = _idea(windows, raw, plane, uses, modalities)
    if any(f"{use}/next_obs" in windows for use in uses):
        drawn["modes"] = _modes(windows, raw, plane, sorted(spec.cameras), uses)
    if any(f"{use}/action" in windows for use in uses):
        paths = _actions_on_frames(windows, raw, plane, uses) if plane else _actions_over_time(windows, raw, uses)
        drawn["actions"] = paths
    files = {name: save(tiles.figure, folder / f"{name}.png") for name, (tiles, _) in drawn.items()}
    labels = {f"{name}.png": found for name, (_, found) in drawn.items()}
    if "denoise/windows" in windows:
        frames, labels["denoise.gif"] = _denoise(windows, raw, plane)
        times = [GIF_STEP_MS] * (len(frames) - 1) + [GIF_HOLD_MS]
        files["denoise"] = save_gif(frames, folder / "denoise.gif", times)
    write_labels(folder, labels)
    return files


# --- the pictures ------------------------------------------------------------------------------------------------


def _idea(
    windows: Windows, raw: Windows, plane: Plane | None, uses: Mapping[str, Use], modalities: Sequence[str]
) -> tuple[Tiles, Labels]:
    """One window: uses as columns, modalities as rows, a tile's border and words say its role."""
    view = plane.view if plane else 0
    shows_later = "next_obs" in windows
    window = int(np.argmax(_change(windows)[:, view].mean(axis=(1, 2)))) if shows_later else 0  # where most happens
    now = windows["current"][window, view, -1]
    tiles = Tiles(len(modalities), 2 + len(uses), now.shape[:2])

    def show(axis: Any, modality: str, key: str, color: str) -> None:
        if modality == "next_obs":
            draw_frame(axis, windows[key][window, view, -1])
        elif plane:
            draw_frame(axis, now)
            if key != "action":
                draw_path(axis, plane.to_pixels(raw["action"][window]), TRUTH, 2.0)
            draw_path(axis, plane.to_pixels(raw[key][window]), color, 3.0)
        else:
            draw_traces(axis, windows["action"][window], windows[key][window], color, *_traced(windows))

    draw_frame(tiles.axis(0, 0), now)
    captions: list[list[str | None]] = []
    for row, modality in enumerate(modalities):
        show(tiles.axis(row, 1), modality, modality, TRUTH)
        words: list[str | None] = ["" if row == 0 else None, ""]
        for column, (name, use) in enumerate(uses.items(), start=2):
            axis = tiles.axis(row, column)
            role = MADE if modality in use.makes else GIVEN if modality in use.given else HIDDEN
            if role is HIDDEN:
                noise = np.random.default_rng(column).normal(0.5, 0.25, now.shape[:2])
                draw_frame(axis, np.repeat(0.3 + 0.7 * noise[..., None], 3, axis=-1))
            else:
                known = role is GIVEN
                show(axis, modality, modality if known else f"{name}/{modality}", TRUTH if known else SAMPLE)
            draw_border(axis, ROLES[role][0], 4.0 if role is MADE else 2.0)
            words.append(role)
        captions.append(words)
    columns = [("now", "what the model sees"), ("the truth", "what really happened")]
    columns += [(name, use.question) for name, use in uses.items()]
    borders = [Mark("frame", *ROLES[role]) for role in ROLES if any(role in words for words in captions)]
    key = _key_of_actions(windows, plane) if "action" in modalities else []
    labels = {"action": "the next actions", "next_obs": "the frame after them"}
    return tiles, Labels(columns, [labels[m] for m in modalities], captions, key + borders, _SHARP)


def _modes(
    windows: Windows, raw: Windows, plane: Plane | None, cameras: Sequence[str], uses: Mapping[str, Use]
) -> tuple[Tiles, Labels]:
    """Later frames of every predictor for some windows and all views; below each, where it is wrong. In the plane of
    actions a cross shows where those end that a predictor knows or has sampled."""
    shown = []
    for name, use in uses.items():
        if "next_obs" in use.makes:
            ends = "action" if "action" in use.given else f"{name}/action"
            shown.append(((name, use.question), windows[f"{name}/next_obs"], raw.get(ends)))
        if f"{name}_shuffled/next_obs" in windows:
            title = ("control", f"{name} with another window's actions")
            shown.append((title, windows[f"{name}_shuffled/next_obs"], raw.get("shuffled_action")))
    shown.append((("baseline", "the current frame, copied"), _last(windows["current"]), None))
    if "mean_image" in windows:
        mean = np.broadcast_to(windows["mean_image"], windows["next_obs"].shape)
        shown.append((("baseline", "the mean image"), mean, None))
    picked = spread(len(windows["episode"]), max(1, 3 // len(cameras)))
    pairs, change = [(w, v) for w in picked for v in range(len(cameras))], _change(windows)
    tiles = Tiles(2 * len(pairs), 2 + len(shown), windows["current"].shape[3:5])
    rows: list[str] = []
    captions: list[list[str | None]] = []
    for i, (window, view) in enumerate(pairs):
        current, truth = windows["current"][window, view, -1], windows["next_obs"][window, view, -1]
        upper, lower = ([tiles.axis(row, c) for c in range(row % 2, 2 + len(shown))] for row in (2 * i, 2 * i + 1))
        draw_frame(upper[0], current)
        draw_frame(upper[1], truth)
        draw_error(lower[0], np.abs(truth - current).max(-1))
        below: list[str | None] = [None, "what changed since now"]
        for axis, difference, (_, prediction, actions) in zip(upper[2:], lower[1:], shown, strict=True):
            frame = np.clip(prediction[window, view, -1], 0, 1)
            draw_frame(axis, frame)
            if plane and view == plane.view and actions is not None:
                draw_cross(axis, plane.to_pixels(actions[window, -1]))
            draw_error(difference, np.abs(frame - truth).max(-1))
            below.append(f"error {np.sqrt(np.square(frame - truth).mean()):.3f}")
        for axis in (*upper, *lower):
            draw_outline(axis, change[window, view])
        where = f"episode {windows['episode'][window]}, {cameras[view]}"
        rows += [where, f"{where}: where it is wrong"]
        captions += [[""] * len(below), below]
    key = [
        Mark("outline", CHANGE, "where the picture really changed"),
        Mark("scale", "#fcfdbf", f"how far from what really came: black is 0, the brightest {ERROR_SCALE} or more"),
    ]
    if plane:
        key.append(Mark("cross", SAMPLE, "where the actions end that the predictor knows or sampled"))
    columns = [("now", ""), ("the truth", "what really came"), *(title for title, _, _ in shown)]
    return tiles, Labels(columns, rows, captions, key, _SHARP)


def _actions_on_frames(windows: Windows, raw: Windows, plane: Plane, uses: Mapping[str, Use]) -> tuple[Tiles, Labels]:
    """Paths on the current frame: a row per use that makes actions, a column per window."""
    modes = [name for name in uses if f"{name}/action" in windows]
    picked = spread(len(windows["episode"]), 5)
    tiles = Tiles(len(modes), len(picked), windows["current"].shape[3:5], longer=300)
    for row, mode in enumerate(modes):
        for column, window in enumerate(picked):
            axis = tiles.axis(row, column)
            draw_frame(axis, windows["current"][window, plane.view, -1])
            draw_path(axis, plane.to_pixels(raw["action"][window]), TRUTH, 2.5)
            draw_path(axis, plane.to_pixels(raw[f"{mode}/action"][window]), SAMPLE, 2.5)
    columns = [(f"episode {windows['episode'][window]}", "held out") for window in picked]
    rows = [f"{mode}: {uses[mode].question}" for mode in modes]
    return tiles, Labels(columns, rows, (), _key_of_actions(windows, plane), _SHARP)


def _actions_over_time(windows: Windows, raw: Windows, uses: Mapping[str, Use], most: int = 5) -> tuple[Tiles, Labels]:
    """Actions over the chunk's steps: a row per window, a column per dimension, a line per use."""
    from matplotlib.ticker import MaxNLocator

    modes, colors = [name for name in uses if f"{name}/action" in windows], names.colors(uses)
    picked = spread(len(windows["episode"]), 4)
    dims = spread(raw["action"].shape[-1], most)
    tiles = Tiles(len(picked), len(dims), (2, 3), longer=330, left=60, bottom=30)
    for row, window in enumerate(picked):
        for column, dim in enumerate(dims):
            axis = tiles.axis(row, column)
            axis.plot(raw["action"][window][:, dim], color=TRUTH, linewidth=3)
            for mode in modes:
                axis.plot(raw[f"{mode}/action"][window][:, dim], color=colors[mode], linewidth=1.6)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.tick_params(labelsize=8)
    key = [Mark("-", TRUTH, "really done"), *(Mark("-", colors[m], f"{m}: {uses[m].question}") for m in modes)]
    columns = [(f"action, dimension {dim}", "over the steps of the chunk, raw units") for dim in dims]
    rows = [f"episode {windows['episode'][window]}" for window in picked]
    return tiles, Labels(columns, rows, (), key, _SHARP)


def _denoise(windows: Windows, raw: Windows, plane: Plane | None) -> tuple[list[Image.Image], Labels]:
    """A sample at the start and after each of its steps, next to the truth; one picture each."""
    picked, view = windows["denoise/windows"], int(windows["denoise/view"])
    parts = [name for name in names.SYMBOLS if f"denoise/{name}" in windows]
    count, truth = len(windows[f"denoise/{parts[0]}"]), "next_obs" in parts
    shape = windows["current"].shape[3:5]
    tiles = Tiles(len(picked), len(parts) + truth, shape, longer=200, bottom=22)
    axes = [[tiles.axis(row, column) for column in range(len(parts) + truth)] for row in range(len(picked))]
    for row, window in zip(axes, picked, strict=True):
        if truth:
            draw_frame(row[-1], windows["next_obs"][window, view, -1])
        if plane and "action" in parts:
            draw_frame(row[0], windows["current"][window, view, -1])
            draw_path(row[0], plane.to_pixels(raw["action"][window]), TRUTH, 2.0)
    frames = []
    for at in range(count):
        fresh: list[Any] = []  # what only this picture shows
        for i, (row, window) in enumerate(zip(axes, picked, strict=True)):
            if "action" in parts and plane:
                fresh += draw_path(row[0], plane.to_pixels(raw["denoise/action"][at, window]), SAMPLE, 2.5)
            elif "action" in parts:
                true, sample = windows["action"][window], windows["denoise/action"][at, window]
                fresh += draw_traces(row[0], true, sample, SAMPLE, *_traced(windows))
            if truth:
                fresh.append(draw_frame(row[parts.index("next_obs")], windows["denoise/next_obs"][at, i]))
            fresh += tiles.bar(i, at / max(1, count - 1))
        frames.append(image_of(tiles.figure))
        for artist in fresh:
            artist.remove()
    key = _key_of_actions(windows, plane) if "action" in parts else []
    key.append(Mark("bar", SAMPLE, f"how many of the {count - 1} steps are done"))
    titles = {"action": ("actions", "sampled"), "next_obs": ("the frame after them", "sampled")}
    columns = [titles[name] for name in parts] + ([("the truth", "what really came")] if truth else [])
    return frames, Labels(columns, [f"episode {windows['episode'][window]}" for window in picked], (), key)


# --- parts of them -----------------------------------------------------------------------------------------------


def _key_of_actions(windows: Windows, plane: Plane | None) -> list[Mark]:
    """Key of the lines of actions, on frames or over time."""
    if plane:
        truth = Mark("-", TRUTH, "target positions that were really sent (dot: the last one)")
        return [truth, Mark("-", SAMPLE, "sampled by the model")]
    dims = [
        Mark(style, "#777777", f"dimension {dim} of the action") for dim, style in zip(*_traced(windows), strict=True)
    ]
    truth = Mark("-", TRUTH, "actions that were really done, over the steps of the chunk")
    return [truth, Mark("-", SAMPLE, "sampled by the model"), *dims]


def _traced(windows: Windows) -> tuple[list[int], Sequence[str]]:
    """Dimensions of an action that are drawn over time, where it is no position, and their line styles."""
    dims = spread(windows["action"].shape[-1], len(_LINE_STYLES)).tolist()
    return dims, _LINE_STYLES[: len(dims)]


def _last(frames: np.ndarray) -> np.ndarray:
    """(N, V, T, h, w, 3): the last frame in place of every one."""
    return np.broadcast_to(frames[:, :, -1:], frames.shape)


def _change(windows: Windows) -> np.ndarray:
    """(N, V, h, w) bool: where the last next frame differs from the last current one in any colour."""
    difference = np.abs(windows["next_obs"][:, :, -1] - windows["current"][:, :, -1])
    return difference.max(axis=-1) > CHANGED
