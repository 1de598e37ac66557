"""Pictures of what a model samples on held-out windows, beside the truth and beside honest baselines.

  idea.png     one window: every mode as a role for each modality (given, hidden, sampled)
  modes.png    later frames of all modes, the shuffled control and the baselines, and where each is wrong
  actions.png  sampled actions beside the true ones, on the frame where they are positions in it, else over time
  denoise.gif  the joint mode's sample on its way from noise

Numpy in, files out: nothing here runs a model.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from ml_collections import ConfigDict
from PIL import Image

from uwm_jax import files
from uwm_jax.diffusion.modes import MODES, QUESTIONS, Role
from uwm_jax.evaluation.metrics import CHANGED
from uwm_jax.system import DataFacts

matplotlib.use("Agg")

Windows = Mapping[str, np.ndarray]

SYMBOLS = {"action": "a", "next_obs": "o'"}
COLORS = {"policy": "#0072b2", "video": "#56b4e9", "forward": "#009e73", "inverse": "#d55e00", "joint": "#a0418f"}
ROLES = {  # the words under a cell of idea.png, and its frame's colour
    Role.GIVEN: ("given", "#999999"),
    Role.HIDDEN: ("hidden", "#cccccc"),
    Role.GENERATE: ("sampled", "#d81b60"),
}
TRUTH, SAMPLE = "#111111", "#d81b60"
_HOW_TO_READ = (
    "Below each frame:\nhow far it is from\nwhat really came\n(bright = wrong;\nerror: root mean square).\n\n"
    "Orange outline:\nwhere the picture\nreally changed."
)
_IDEA = (
    "One network.\nFor each mode,\nactions and frame\nare each either\n"
    "given (clean),\nhidden (noise), or\nsampled (denoised)."
)
ERROR_SCALE = 0.5  # a difference from here on is drawn in the brightest colour
DPI = 110
GIF_STEP_MS, GIF_HOLD_MS = 350, 2500


def formula(mode: str) -> str:
    """`p(o' | o, a)` of a mode."""
    roles = MODES[mode]
    made = [SYMBOLS[m] for m in roles if roles[m] is Role.GENERATE]
    known = ["o", *(SYMBOLS[m] for m in roles if roles[m] is Role.GIVEN)]
    return f"p({', '.join(made)} | {', '.join(known)})"


def draw(windows: Windows, facts: DataFacts, config: ConfigDict, folder: Path) -> dict[str, Path]:
    """Writes the pictures of some windows into `folder`, each by rename.

    Args:
      windows: N windows on the host. `episode` (N,); `action` (N, Ta, Da) normalised; `current`, `next_obs`
        (N, V, T, h, w, 3) float32 in [0, 1]; `<mode>/action`, `<mode>/next_obs` of what each mode samples. Where
        they are there, also `forward_shuffled/next_obs` (N, V, T, h, w, 3) and `shuffled_action` (N, Ta, Da);
        `mean_image` (V, 1, h, w, 3); and the joint mode's states `denoise/action` (S+1, N, Ta, Da) and
        `denoise/next_obs` (S+1, D, h, w, 3), of these what `denoised` names, without which there is no denoise.gif.
      facts: of the model: names of the cameras (views are sorted by name) and the normaliser of actions.
      config: the run's; `eval.action_plane` and `data` say where on a frame an action lies.

    Returns:
      {"idea", "modes", "actions", "denoise": file}.
    """
    plane = Plane.of(facts, config.data, config.eval.action_plane)
    raw = {
        name: np.asarray(facts.normalizer.unnormalize("action", value), np.float32)
        for name, value in windows.items()
        if name.endswith("action")
    }
    cameras = sorted(facts.cameras)
    files = {
        "idea": _save(_idea(windows, raw, plane), folder / "idea.png"),
        "modes": _save(_modes(windows, raw, plane, cameras), folder / "modes.png"),
        "actions": _save(
            _actions_on_frames(windows, raw, plane) if plane else _actions_over_time(windows, raw),
            folder / "actions.png",
        ),
    }
    if "denoise/next_obs" in windows:
        frames = _denoise(windows, raw, plane, *denoised(len(windows["episode"]), facts, config))
        times = [GIF_STEP_MS] * (len(frames) - 1) + [GIF_HOLD_MS]
        files["denoise"] = save_gif(frames, folder / "denoise.gif", times)
    return files


def denoised(count: int, facts: DataFacts, config: ConfigDict) -> tuple[np.ndarray, int]:
    """Of which of `count` windows, (D,) int, and of which view denoise.gif shows the last frame."""
    plane = Plane.of(facts, config.data, config.eval.action_plane)
    return spread(count, 3), plane.view if plane else 0


class Plane(NamedTuple):
    """Where the first two columns of a raw action lie on the frames of one view."""

    view: int
    low: np.ndarray  # (2,) x, y of the raw frame's left and upper edge
    high: np.ndarray  # (2,) of its right and lower edge
    resize: tuple[int, int]
    crop: tuple[int, int]

    @classmethod
    def of(cls, facts: DataFacts, data: ConfigDict, shown: Sequence[Any] | None) -> Plane | None:
        """From `shown`, what `config.eval.action_plane` may be: (camera, x_low, x_high, y_low, y_high). None where that
        is empty, or a camera that the model does not see."""
        if not shown or shown[0] not in facts.cameras:
            return None
        camera, x_low, x_high, y_low, y_high = shown
        low, high = np.array([x_low, y_low], np.float64), np.array([x_high, y_high], np.float64)
        return cls(sorted(facts.cameras).index(camera), low, high, tuple(data.resize), tuple(data.crop))

    def to_pixels(self, action: np.ndarray) -> np.ndarray:
        """(..., Da) raw to (..., 2) x, y on the frame that the model sees; the first pixel's centre is 0, 0."""
        share = (np.asarray(action, np.float64)[..., :2] - self.low) / (self.high - self.low)
        size, cut = np.array(self.resize[::-1]), np.array(self.crop[::-1])
        return share * size - 0.5 - np.round((size - cut) / 2)


# --- the pictures ------------------------------------------------------------------------------------------------


def _idea(windows: Windows, raw: Windows, plane: Plane | None) -> Figure:
    """One window: modes as columns, modalities as rows, a cell's frame and words say its role."""
    view = plane.view if plane else 0
    window = int(np.argmax(_change(windows)[:, view].mean(axis=(1, 2))))  # where most happens
    now, later = windows["current"][window, view, -1], windows["next_obs"][window, view, -1]
    figure = Figure(figsize=(16, 6.4), layout="constrained")
    axes = figure.subplots(2, 2 + len(MODES))

    def show_action(axis: Any, key: str, color: str) -> None:
        if plane:
            _frame(axis, now)
            if key != "action":
                _path(axis, plane.to_pixels(raw["action"][window]), TRUTH, 2.0)
            _path(axis, plane.to_pixels(raw[key][window]), color, 3.0)
        else:
            _traces(axis, windows["action"][window], windows[key][window], color)

    _frame(axes[0, 0], now)
    axes[0, 0].set_title("now\nwhat every mode sees\n", fontsize=13)
    axes[1, 0].axis("off")
    axes[1, 0].text(0.5, 0.5, _IDEA, ha="center", va="center", fontsize=12, transform=axes[1, 0].transAxes)
    axes[0, 1].set_title("the truth\nwhat really happened\n", fontsize=13)
    axes[0, 1].set_ylabel("the next actions", fontsize=13)
    axes[1, 1].set_ylabel("the frame after them", fontsize=13)
    figure.legend(handles=_handles(plane), loc="outside lower center", ncols=2, fontsize=13)
    show_action(axes[0, 1], "action", TRUTH)
    _frame(axes[1, 1], later)
    for column, mode in enumerate(MODES, start=2):
        axes[0, column].set_title(f"{mode}\n{_wrapped(QUESTIONS[mode])}", fontsize=13)
        for axis, modality in zip(axes[:, column], SYMBOLS, strict=True):
            role = MODES[mode][modality]
            if role is Role.HIDDEN:
                noise = np.random.default_rng(column).normal(0.5, 0.25, now.shape[:2])
                _frame(axis, np.repeat(0.3 + 0.7 * noise[..., None], 3, axis=-1))
            elif modality == "action":
                show_action(axis, "action" if role is Role.GIVEN else f"{mode}/action", _color(role))
            else:
                _frame(axis, later if role is Role.GIVEN else windows[f"{mode}/next_obs"][window, view, -1])
            _label(axis, ROLES[role][0], ROLES[role][1], bold=role is Role.GENERATE)
    return figure


def _modes(windows: Windows, raw: Windows, plane: Plane | None, cameras: Sequence[str]) -> Figure:
    """Later frames of every predictor for some windows and all views; below each, where it is wrong. In the plane of
    actions a cross shows where those end that a predictor knows or has sampled."""
    columns = {"forward": "forward/next_obs", "joint": "joint/next_obs", "video": "video/next_obs"}
    titles = {
        "forward": "forward\nknows the\ntrue actions",
        "joint": "joint\nwith actions\nof its own",
        "video": "video\nwhatever\nis done",
    }
    predictions = {titles[name]: windows[key] for name, key in columns.items() if key in windows}
    actions = {titles["forward"]: raw.get("action"), titles["joint"]: raw.get("joint/action")}  # what leads to a frame
    if "forward_shuffled/next_obs" in windows:
        control = "control: forward\nwith another\nwindow's actions"
        predictions[control], actions[control] = windows["forward_shuffled/next_obs"], raw.get("shuffled_action")
    predictions["baseline:\nthe current\nframe, copied"] = _last(windows["current"])
    if "mean_image" in windows:
        predictions["baseline:\nthe mean\nimage"] = np.broadcast_to(windows["mean_image"], windows["next_obs"].shape)
    picked = spread(len(windows["episode"]), max(1, 3 // len(cameras)))
    rows, change = [(w, v) for w in picked for v in range(len(cameras))], _change(windows)
    figure = Figure(figsize=(2.15 * (2 + len(predictions)), 4.55 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(2 * len(rows), 2 + len(predictions), squeeze=False)
    for i, (window, view) in enumerate(rows):
        upper, lower, changed = axes[2 * i], axes[2 * i + 1], change[window, view]
        truth = windows["next_obs"][window, view, -1]
        _frame(upper[0], windows["current"][window, view, -1])
        _frame(upper[1], truth)
        upper[0].set_ylabel(f"episode {windows['episode'][window]}\n{cameras[view]}", fontsize=10)
        lower[0].axis("off")
        _error(lower[1], np.abs(truth - windows["current"][window, view, -1]).max(-1))
        lower[1].set_xlabel("what changed since now", fontsize=9)
        for axis, below, (title, prediction) in zip(upper[2:], lower[2:], predictions.items(), strict=True):
            frame = np.clip(prediction[window, view, -1], 0, 1)
            _frame(axis, frame)
            if plane and view == plane.view and (known := actions.get(title)) is not None:
                _cross(axis, plane.to_pixels(known[window, -1]))
            _error(below, np.abs(frame - truth).max(-1))
            below.set_xlabel(f"error {np.sqrt(np.square(frame - truth).mean()):.3f}", fontsize=9)
        for axis in (*upper, *lower[1:]):
            _outline(axis, changed)
    how = _HOW_TO_READ + ("\n\nCross: where the\nactions end." if plane else "")
    axes[1, 0].text(0.5, 0.5, how, ha="center", va="center", fontsize=10, transform=axes[1, 0].transAxes)
    for axis, title in zip(axes[0], ("now", "what really came", *predictions), strict=True):
        axis.set_title(title, fontsize=10.5)
    return figure


def _actions_on_frames(windows: Windows, raw: Windows, plane: Plane) -> Figure:
    """Paths on the current frame: a row per mode that samples actions, a column per window."""
    modes = [mode for mode in MODES if f"{mode}/action" in windows]
    picked = spread(len(windows["episode"]), 5)
    figure = Figure(figsize=(3.1 * len(picked) + 0.8, 3.1 * len(modes) + 0.8), layout="constrained")
    axes = figure.subplots(len(modes), len(picked), squeeze=False)
    for row, mode in enumerate(modes):
        axes[row, 0].set_ylabel(f"{mode}\n{_wrapped(QUESTIONS[mode], 24)}", fontsize=13)
        for axis, window in zip(axes[row], picked, strict=True):
            _frame(axis, windows["current"][window, plane.view, -1])
            _path(axis, plane.to_pixels(raw["action"][window]), TRUTH, 2.5)
            _path(axis, plane.to_pixels(raw[f"{mode}/action"][window]), SAMPLE, 2.5)
    for axis, window in zip(axes[0], picked, strict=True):
        axis.set_title(f"held-out episode {windows['episode'][window]}", fontsize=11)
    figure.legend(handles=_handles(plane), loc="outside lower center", ncols=3, fontsize=12)
    return figure


def _actions_over_time(windows: Windows, raw: Windows, most: int = 5) -> Figure:
    """Actions over the chunk's steps: a row per window, a column per dimension, a line per mode."""
    modes = [mode for mode in MODES if f"{mode}/action" in windows]
    picked = spread(len(windows["episode"]), 4)
    dims = spread(raw["action"].shape[-1], most)
    figure = Figure(figsize=(3.4 * len(dims) + 0.4, 2.3 * len(picked) + 0.9), layout="constrained")
    axes = figure.subplots(len(picked), len(dims), squeeze=False)
    for row, window in zip(axes, picked, strict=True):
        row[0].set_ylabel(f"episode {windows['episode'][window]}", fontsize=10)
        for axis, dim in zip(row, dims, strict=True):
            axis.plot(raw["action"][window][:, dim], color=TRUTH, linewidth=3, label="what was really done")
            for mode in modes:
                label = f"{mode}: {QUESTIONS[mode]}"
                axis.plot(raw[f"{mode}/action"][window][:, dim], color=COLORS[mode], linewidth=1.6, label=label)
            axis.tick_params(labelsize=8)
    for axis, dim in zip(axes[0], dims, strict=True):
        axis.set_title(f"action, dimension {dim}", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("step of the chunk", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11)
    return figure


def _denoise(windows: Windows, raw: Windows, plane: Plane | None, picked: np.ndarray, view: int) -> list[Image.Image]:
    """What the joint mode has at the start and after each of its steps, beside what really came; one picture each."""
    count = len(windows["denoise/next_obs"])
    figure = Figure(figsize=(3.0 * 3, 3.05 * len(picked) + 1.3), layout="constrained")
    axes = figure.subplots(len(picked), 3, squeeze=False)
    for axis, title in zip(axes[0], ("actions", "the frame after them", "what really came"), strict=True):
        axis.set_title(title, fontsize=14)
    figure.legend(handles=_handles(plane), loc="outside lower center", ncols=1, fontsize=12)
    heading = figure.suptitle(" ", fontsize=15)
    for row, window in zip(axes, picked, strict=True):
        _frame(row[2], windows["next_obs"][window, view, -1])
        if plane:
            _frame(row[0], windows["current"][window, view, -1])
            _path(row[0], plane.to_pixels(raw["action"][window]), TRUTH, 2.0)
    pictures = []
    for at in range(count):
        fresh: list[Any] = []  # what only this picture shows
        for i, (row, window) in enumerate(zip(axes, picked, strict=True)):
            if plane:
                fresh += _path(row[0], plane.to_pixels(raw["denoise/action"][at, window]), SAMPLE, 2.5)
            else:
                fresh += _traces(row[0], windows["action"][window], windows["denoise/action"][at, window], SAMPLE)
            fresh.append(_frame(row[1], windows["denoise/next_obs"][at, i]))
        done = "pure noise" if at == 0 else f"after step {at} of {count - 1}"
        heading.set_text(f"imagining actions and their outcome together: {done}")
        pictures.append(image_of(figure, dpi=80))
        figure.set_layout_engine("none")  # which stays as the first picture has it, and saves most of the time
        for artist in fresh:
            artist.remove()
    return pictures


# --- parts of pictures -------------------------------------------------------------------------------------------


def _frame(axis: Any, frame: np.ndarray) -> Any:
    """(h, w, 3) in [0, 1], every pixel a square; returns what was drawn."""
    drawn = axis.imshow(np.clip(frame, 0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[], xlim=(-0.5, frame.shape[1] - 0.5), ylim=(frame.shape[0] - 0.5, -0.5))
    return drawn


def _error(axis: Any, error: np.ndarray) -> None:
    axis.imshow(error, cmap="magma", vmin=0, vmax=ERROR_SCALE, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _outline(axis: Any, mask: np.ndarray) -> None:
    """A line around the pixels of a mask (h, w), along their edges."""
    padded = np.pad(mask, 1)
    y, x = np.nonzero(padded[1:] != padded[:-1])  # the edge below pixel (y - 1, x - 1)
    across = np.stack([np.stack([x - 1.5, x - 0.5], 1), np.stack([y - 0.5, y - 0.5], 1)], 2)
    y, x = np.nonzero(padded[:, 1:] != padded[:, :-1])
    down = np.stack([np.stack([x - 0.5, x - 0.5], 1), np.stack([y - 1.5, y - 0.5], 1)], 2)
    axis.add_collection(LineCollection([*across, *down], colors="#ff8c00", linewidths=0.9), autolim=False)


def _path(axis: Any, points: np.ndarray, color: str, width: float) -> list[Any]:
    """A path (T, 2) in pixels with a dot at its end, cut off at the frame's edge; returns what was drawn."""
    halo = [patheffects.withStroke(linewidth=width + 2, foreground="white")]
    return [
        *axis.plot(*points.T, color=color, linewidth=width, path_effects=halo, solid_capstyle="round"),
        *axis.plot(*points[-1], "o", color=color, markersize=3.2 * width, markeredgecolor="white", markeredgewidth=1.2),
    ]


def _cross(axis: Any, point: np.ndarray) -> None:
    axis.plot(*point, "+", color="white", markersize=13, markeredgewidth=4.5)
    axis.plot(*point, "+", color=SAMPLE, markersize=11, markeredgewidth=2.2)


def _traces(axis: Any, truth: np.ndarray, sample: np.ndarray, color: str, most: int = 3) -> list[Any]:
    """Normalised actions (T, Da) over time, where they are no positions on a frame, a line style for each of some
    dimensions; returns what was drawn."""
    drawn = []
    for dim, style in zip(spread(truth.shape[-1], most), ("-", "--", ":"), strict=False):
        drawn += axis.plot(truth[:, dim], style, color=TRUTH, linewidth=2.0)
        drawn += axis.plot(sample[:, dim], style, color=color, linewidth=2.0)
    low, high = truth.min(), truth.max()
    room = 0.5 * max(high - low, 1e-6)
    axis.set(xticks=[], yticks=[], ylim=(low - room, high + room), box_aspect=1)
    return drawn


def _label(axis: Any, text: str, color: str, bold: bool) -> None:
    axis.set_xlabel(text, fontsize=12, color=color if bold else "#666666", fontweight="bold" if bold else "normal")
    for spine in axis.spines.values():
        spine.set(visible=True, color=color, linewidth=4.0 if bold else 2.0)


def _color(role: Role) -> str:
    return SAMPLE if role is Role.GENERATE else TRUTH


def _handles(plane: Plane | None) -> list[Line2D]:
    what = "target positions that were really sent (dot: the last one)" if plane else "actions that were really done"
    return [
        Line2D([], [], color=TRUTH, linewidth=3, label=what),
        Line2D([], [], color=SAMPLE, linewidth=3, label="sampled by the model"),
    ]


def _wrapped(text: str, width: int = 20) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _last(frames: np.ndarray) -> np.ndarray:
    """(N, V, T, h, w, 3): the last frame in place of every one."""
    return np.broadcast_to(frames[:, :, -1:], frames.shape)


def _change(windows: Windows) -> np.ndarray:
    """(N, V, h, w) bool: where the last next frame differs from the last current one in any colour."""
    difference = np.abs(windows["next_obs"][:, :, -1] - windows["current"][:, :, -1])
    return difference.max(axis=-1) > CHANGED


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` evenly spread numbers below `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


# --- files -------------------------------------------------------------------------------------------------------


def _save(figure: Figure, path: Path) -> Path:
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
    return path


def image_of(figure: Figure, dpi: int = DPI) -> Image.Image:
    """A figure as a picture in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: Sequence[int]) -> Path:
    """Writes pictures of one size as a GIF that repeats for ever, each shown for its time; one palette for all."""
    sheet = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (0, i * frame.height))
    palette = sheet.quantize(256, method=Image.Quantize.MEDIANCUT)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with files.replacing(path) as temporary:
        indexed[0].save(
            temporary, save_all=True, append_images=indexed[1:], duration=list(milliseconds), loop=0, optimize=False
        )
    return path
