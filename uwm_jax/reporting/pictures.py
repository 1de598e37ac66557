"""Pictures of what a model samples on held-out windows, next to the truth and to baselines.

  idea.png     one window: every mode as a role for each modality (given, hidden, sampled)
  modes.png    later frames of all modes, the shuffled control and the baselines, and where each is wrong
  actions.png  sampled actions and the true ones, on the frame where they are positions in it, else over time
  denoise.gif  the joint mode's sample on its way from noise

They hold no text: `pictures.json` next to them has their labels, which a page writes around them. Numpy in, files out:
nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from uwm_jax.data.spec import DataSpec
from uwm_jax.diffusion.roles import Role
from uwm_jax.evaluation.evaluator import spread
from uwm_jax.evaluation.metrics import CHANGED
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
from uwm_jax.systems.uwm.modes import MODES, USES

Windows = Mapping[str, np.ndarray]

SYMBOLS = {"action": "a", "next_obs": "o'"}
COLORS = {"policy": "#0072b2", "video": "#56b4e9", "forward": "#009e73", "inverse": "#d55e00", "joint": "#a0418f"}
ROLES = {  # the words under a tile of idea.png, the colour of its border, and what the border says
    Role.GIVEN: ("given", "#999999", "given to the mode, clean"),
    Role.HIDDEN: ("hidden", "#cccccc", "hidden from the mode: noise"),
    Role.GENERATE: ("sampled", SAMPLE, "sampled by the mode, out of noise"),
}
GIF_STEP_MS, GIF_HOLD_MS = 350, 2500
_LINE_STYLES = ("-", "--", ":")
_SHARP = 2.0  # pixels of a PNG for one of a page


def formula(mode: str) -> str:
    """`p(o' | o, a)` of a mode."""
    roles = MODES[mode]
    made = [SYMBOLS[m] for m in roles if roles[m] is Role.GENERATE]
    known = ["o", *(SYMBOLS[m] for m in roles if roles[m] is Role.GIVEN)]
    return f"p({', '.join(made)} | {', '.join(known)})"


def draw(windows: Windows, spec: DataSpec, config: ConfigDict, folder: Path) -> dict[str, Path]:
    """Writes the pictures of some windows into `folder`, each by rename, and their labels.

    Args:
      windows: N windows on the host. `episode` (N,); `action` (N, Ta, Da) normalised; `current`, `next_obs`
        (N, V, T, h, w, 3) float32 in [0, 1]; `<mode>/action`, `<mode>/next_obs` of what each mode samples. Where
        they are there, also `forward_shuffled/next_obs` (N, V, T, h, w, 3) and `shuffled_action` (N, Ta, Da);
        `mean_image` (V, 1, h, w, 3); and the joint mode's states `denoise/action` (S+1, N, Ta, Da) and
        `denoise/next_obs` (S+1, D, h, w, 3), the last frame of the view `denoise/view` () of the windows
        `denoise/windows` (D,); without them there is no denoise.gif.
      spec: of the model: names of the cameras (views are sorted by name) and the normaliser of actions.
      config: the run's; `eval.action_plane` and `data` say where on a frame an action lies.

    Returns:
      {"idea", "modes", "actions", "denoise": file}.
    """
    plane = Plane.of(spec, config.data, config.eval.action_plane)
    raw = {
        name: np.asarray(spec.normalizer.unnormalize("action", value), np.float32)
        for name, value in windows.items()
        if name.endswith("action")
    }
    drawn = {
        "idea": _idea(windows, raw, plane),
        "modes": _modes(windows, raw, plane, sorted(spec.cameras)),
        "actions": _actions_on_frames(windows, raw, plane) if plane else _actions_over_time(windows, raw),
    }
    files = {name: save(tiles.figure, folder / f"{name}.png") for name, (tiles, _) in drawn.items()}
    labels = {f"{name}.png": found for name, (_, found) in drawn.items()}
    if "denoise/next_obs" in windows:
        frames, labels["denoise.gif"] = _denoise(windows, raw, plane)
        times = [GIF_STEP_MS] * (len(frames) - 1) + [GIF_HOLD_MS]
        files["denoise"] = save_gif(frames, folder / "denoise.gif", times)
    write_labels(folder, labels)
    return files


# --- the pictures ------------------------------------------------------------------------------------------------


def _idea(windows: Windows, raw: Windows, plane: Plane | None) -> tuple[Tiles, Labels]:
    """One window: modes as columns, modalities as rows, a tile's border and words say its role."""
    view = plane.view if plane else 0
    window = int(np.argmax(_change(windows)[:, view].mean(axis=(1, 2))))  # where most happens
    now, later = windows["current"][window, view, -1], windows["next_obs"][window, view, -1]
    tiles = Tiles(2, 2 + len(MODES), now.shape[:2])

    def show_action(axis: Any, key: str, color: str) -> None:
        if plane:
            draw_frame(axis, now)
            if key != "action":
                draw_path(axis, plane.to_pixels(raw["action"][window]), TRUTH, 2.0)
            draw_path(axis, plane.to_pixels(raw[key][window]), color, 3.0)
        else:
            draw_traces(axis, windows["action"][window], windows[key][window], color, *_traced(windows))

    draw_frame(tiles.axis(0, 0), now)
    show_action(tiles.axis(0, 1), "action", TRUTH)
    draw_frame(tiles.axis(1, 1), later)
    captions: list[list[str | None]] = [["", ""], [None, ""]]
    for column, mode in enumerate(MODES, start=2):
        for row, modality in enumerate(SYMBOLS):
            axis, role = tiles.axis(row, column), MODES[mode][modality]
            if role is Role.HIDDEN:
                noise = np.random.default_rng(column).normal(0.5, 0.25, now.shape[:2])
                draw_frame(axis, np.repeat(0.3 + 0.7 * noise[..., None], 3, axis=-1))
            elif modality == "action":
                known = role is Role.GIVEN
                show_action(axis, "action" if known else f"{mode}/action", TRUTH if known else SAMPLE)
            else:
                draw_frame(axis, later if role is Role.GIVEN else windows[f"{mode}/next_obs"][window, view, -1])
            word, color, _ = ROLES[role]
            draw_border(axis, color, 4.0 if role is Role.GENERATE else 2.0)
            captions[row].append(word)
    columns = [("now", "what every mode sees"), ("the truth", "what really happened")]
    columns += [(mode, USES[mode].question) for mode in MODES]
    borders = [Mark("frame", color, says) for _, color, says in ROLES.values()]
    key = _key_of_actions(windows, plane) + borders
    return tiles, Labels(columns, ["the next actions", "the frame after them"], captions, key, _SHARP)


# Columns of modes.png: {key of the frames: ((title, what is below it), key of the actions that lead there)}.
_PREDICTORS = {
    "forward/next_obs": (("forward", "knows the true actions"), "action"),
    "joint/next_obs": (("joint", "with actions of its own"), "joint/action"),
    "video/next_obs": (("video", "whatever is done"), ""),
    "forward_shuffled/next_obs": (("control", "forward with another window's actions"), "shuffled_action"),
}


def _modes(windows: Windows, raw: Windows, plane: Plane | None, cameras: Sequence[str]) -> tuple[Tiles, Labels]:
    """Later frames of every predictor for some windows and all views; below each, where it is wrong. In the plane of
    actions a cross shows where those end that a predictor knows or has sampled."""
    shown = [(title, windows[key], raw.get(action)) for key, (title, action) in _PREDICTORS.items() if key in windows]
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


def _actions_on_frames(windows: Windows, raw: Windows, plane: Plane) -> tuple[Tiles, Labels]:
    """Paths on the current frame: a row per mode that samples actions, a column per window."""
    modes = [mode for mode in MODES if f"{mode}/action" in windows]
    picked = spread(len(windows["episode"]), 5)
    tiles = Tiles(len(modes), len(picked), windows["current"].shape[3:5], longer=300)
    for row, mode in enumerate(modes):
        for column, window in enumerate(picked):
            axis = tiles.axis(row, column)
            draw_frame(axis, windows["current"][window, plane.view, -1])
            draw_path(axis, plane.to_pixels(raw["action"][window]), TRUTH, 2.5)
            draw_path(axis, plane.to_pixels(raw[f"{mode}/action"][window]), SAMPLE, 2.5)
    columns = [(f"episode {windows['episode'][window]}", "held out") for window in picked]
    rows = [f"{mode}: {USES[mode].question}" for mode in modes]
    return tiles, Labels(columns, rows, (), _key_of_actions(windows, plane), _SHARP)


def _actions_over_time(windows: Windows, raw: Windows, most: int = 5) -> tuple[Tiles, Labels]:
    """Actions over the chunk's steps: a row per window, a column per dimension, a line per mode."""
    from matplotlib.ticker import MaxNLocator

    modes = [mode for mode in MODES if f"{mode}/action" in windows]
    picked = spread(len(windows["episode"]), 4)
    dims = spread(raw["action"].shape[-1], most)
    tiles = Tiles(len(picked), len(dims), (2, 3), longer=330, left=60, bottom=30)
    for row, window in enumerate(picked):
        for column, dim in enumerate(dims):
            axis = tiles.axis(row, column)
            axis.plot(raw["action"][window][:, dim], color=TRUTH, linewidth=3)
            for mode in modes:
                axis.plot(raw[f"{mode}/action"][window][:, dim], color=COLORS[mode], linewidth=1.6)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.tick_params(labelsize=8)
    key = [Mark("-", TRUTH, "really done"), *(Mark("-", COLORS[m], f"{m}: {USES[m].question}") for m in modes)]
    columns = [(f"action, dimension {dim}", "over the steps of the chunk, raw units") for dim in dims]
    rows = [f"episode {windows['episode'][window]}" for window in picked]
    return tiles, Labels(columns, rows, (), key, _SHARP)


def _denoise(windows: Windows, raw: Windows, plane: Plane | None) -> tuple[list[Image.Image], Labels]:
    """The joint mode's sample at the start and after each of its steps, next to the truth; one picture each."""
    picked, view = windows["denoise/windows"], int(windows["denoise/view"])
    count = len(windows["denoise/next_obs"])
    tiles = Tiles(len(picked), 3, windows["next_obs"].shape[3:5], longer=200, bottom=22)
    axes = [[tiles.axis(row, column) for column in range(3)] for row in range(len(picked))]
    for row, window in zip(axes, picked, strict=True):
        draw_frame(row[2], windows["next_obs"][window, view, -1])
        if plane:
            draw_frame(row[0], windows["current"][window, view, -1])
            draw_path(row[0], plane.to_pixels(raw["action"][window]), TRUTH, 2.0)
    frames = []
    for at in range(count):
        fresh: list[Any] = []  # what only this picture shows
        for i, (row, window) in enumerate(zip(axes, picked, strict=True)):
            if plane:
                fresh += draw_path(row[0], plane.to_pixels(raw["denoise/action"][at, window]), SAMPLE, 2.5)
            else:
                truth, sample = windows["action"][window], windows["denoise/action"][at, window]
                fresh += draw_traces(row[0], truth, sample, SAMPLE, *_traced(windows))
            fresh += [draw_frame(row[1], windows["denoise/next_obs"][at, i]), *tiles.bar(i, at / max(1, count - 1))]
        frames.append(image_of(tiles.figure))
        for artist in fresh:
            artist.remove()
    key = [*_key_of_actions(windows, plane), Mark("bar", SAMPLE, f"how many of the {count - 1} steps are done")]
    columns = [("actions", "sampled"), ("the frame after them", "sampled"), ("the truth", "what really came")]
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
