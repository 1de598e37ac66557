"""Closed-loop episodes as a GIF: at every decision what was seen, what the model imagined, and what came.

The forward mode is given the actions that were really sent from the decision on, among them those of later decisions,
so what it imagines can be held against what happened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from uwm_jax.data.windows import WindowSpec
from uwm_jax.envs import EnvSpec
from uwm_jax.envs.parallel import EpisodeResult
from uwm_jax.reporting.pictures import SAMPLE, TRUTH, Plane, save_gif
from uwm_jax.system import System

BATCH = 16
CELL = 256  # pixels of a frame's longer side, at least
FRAME_MS, LAST_MS = 450, 2500


class Clip(NamedTuple):
    """One episode at those of its decisions whose outcome the episode still shows.

    Attributes:
        label: what the episode is, in words.
        episode: as it was run.
        steps: (D,) int, of the decisions.
        actions: (D, Ta, Da) that were sent from each decision on, raw units.
        current, imagined, truth: (D, V, h, w, 3) float32 in [0, 1], as the model sees frames: the newest frame at the
            decision, and the last of the frames after the actions, imagined and real.
    """

    label: str
    episode: EpisodeResult
    steps: np.ndarray
    actions: np.ndarray
    current: np.ndarray
    imagined: np.ndarray
    truth: np.ndarray


def imagine(
    system: System,
    params: Any,
    frozen: Any,
    episode: EpisodeResult,
    seen: Mapping[str, np.ndarray],
    *,
    execute: int,
    label: str = "",
) -> Clip:
    """The forward mode at the decisions of an episode.

    Args:
        seen: {camera or low-dimensional key: (T + 1, ...)}, raw, as `uwm_jax.envs.parallel.replay` gives them.
        execute: steps between decisions.
    """
    window, normalizer = WindowSpec.from_config(system.config.data.window), system.facts.normalizer
    present, length = max(window.obs), len(episode.actions)
    # The last step's action and the frame after it are the end of what there is.
    outcome = max(max(window.next_obs) - present, max(window.action) - present + 1)
    steps = np.arange(0, length - outcome + 1, execute)

    def frames(key: str, indices: tuple[int, ...]) -> np.ndarray:
        return np.stack([seen[key][window.steps(indices, int(t) - present, length + 1)] for t in steps])

    actions = [episode.actions[window.steps(window.action, int(t) - present, length)] for t in steps]
    batch = {}
    if len(steps):
        for camera in system.facts.cameras:
            batch[f"obs/{camera}"] = frames(camera, window.obs)
            batch[f"next_obs/{camera}"] = frames(camera, window.next_obs)
        for key in system.facts.low_dim:
            batch[f"obs/{key}"] = normalizer.normalize(key, frames(key, window.obs).astype(np.float32))
        batch["action"] = normalizer.normalize("action", np.stack(actions).astype(np.float32))
        batch["row"] = np.arange(len(steps), dtype=np.int32)
    pieces = []
    for start in range(0, len(steps), BATCH):
        part = np.resize(np.arange(start, min(start + BATCH, len(steps))), BATCH)
        pieces.append(_forward(system)(params, frozen, {key: x[part] for key, x in batch.items()}))
    empty = np.zeros((0, len(system.cameras), *system.config.data.crop, 3), np.float32)
    made = [np.concatenate([empty, *each])[: len(steps)] for each in zip(*jax.device_get(pieces), strict=True)]
    return Clip(label, episode, steps, np.array(actions), *(made or [empty] * 3))


@functools.lru_cache(maxsize=4)
def _forward(system: System) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(params, frozen, batch) -> the last current, imagined and true next frame, each (B, V, h, w, 3)."""

    def forward(params: Any, frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        noise = system.draw_noise(jax.random.key(0), batch["row"])
        current, following = system.preprocess(batch)
        assert following is not None
        latent = system.sample(params, frozen, batch, "forward", noise)["next_obs_latent"]
        imagined = jnp.clip(system.decode(frozen, latent), 0, 1)
        return current[:, :, -1], imagined[:, :, -1], following[:, :, -1]

    return jax.jit(forward)


def draw(clips: Sequence[Clip], spec: EnvSpec, system: System, path: Path) -> bool:
    """Writes a GIF with a row per clip and a picture per decision; a clip that has ended stays at its last one.

    Returns:
        whether there was a decision to show; if not, there is no such file afterwards.
    """
    clips = [clip for clip in clips if len(clip.steps)]
    if not clips:
        path.unlink(missing_ok=True)  # of an earlier start
        return False
    plane = Plane.of(system.facts, system.config.data, spec.action_plane)
    window = system.config.data.window
    later = max(window.next_obs) - max(window.obs)
    sheet = _Sheet(
        clips,
        plane,
        [
            f"now: the next {len(window.action)} targets" if plane else "now",
            f"imagined: {later} steps later",
            "what really came",
        ],
        spec,
    )
    count = max(len(clip.steps) for clip in clips)
    save_gif([sheet.draw(i) for i in range(count)], path, [FRAME_MS] * (count - 1) + [LAST_MS])
    return True


class _Sheet:
    """The layout of one picture: a title over each of three columns, a caption under each row."""

    def __init__(self, clips: Sequence[Clip], plane: Plane | None, titles: Sequence[str], spec: EnvSpec):
        self._clips, self._plane, self._titles, self._spec = clips, plane, titles, spec
        h, w = clips[0].current.shape[2:4]
        self._scale = -(-CELL // max(h, w))
        self._height, self._width = h * self._scale, w * self._scale
        self._font, self._bold = (
            ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(weight=weight)), 17)
            for weight in ("normal", "bold")
        )
        self._gap, self._top, self._line = 12, 34, 34

    def draw(self, i: int) -> Image.Image:
        gap = self._gap
        row_height = self._height + self._line
        size = (3 * self._width + 4 * gap, self._top + len(self._clips) * (row_height + gap))
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        for column, title in enumerate(self._titles):
            middle = gap + column * (self._width + gap) + self._width // 2
            pen.text((middle, self._top // 2), title, fill=TRUTH, font=self._bold, anchor="mm")
        for row, clip in enumerate(self._clips):
            at, top = min(i, len(clip.steps) - 1), self._top + row * (row_height + gap)
            view = self._plane.view if self._plane else 0
            cells = (clip.current[at, view], clip.imagined[at, view], clip.truth[at, view])
            for column, (frame, color) in enumerate(zip(cells, (TRUTH, SAMPLE, TRUTH), strict=True)):
                left = gap + column * (self._width + gap)
                sheet.paste(self._enlarged(frame), (left, top))
                pen.rectangle(
                    (left - 3, top - 3, left + self._width + 2, top + self._height + 2), outline=color, width=3
                )
            if self._plane:
                self._path(sheet, clip.actions[at], gap, top)
            pen.text((gap, top + row_height - self._line // 2), self._caption(clip, at), fill=TRUTH, font=self._font,
                     anchor="lm")  # fmt: skip
        return sheet

    def _caption(self, clip: Clip, at: int) -> str:
        step, scores = int(clip.steps[at]), clip.episode.scores
        name = self._spec.score
        text = f"{clip.label}: step {step}, {name} {scores[step]:.2f}, best so far {scores[: step + 1].max():.2f}"
        if at == len(clip.steps) - 1:
            end = "solved" if clip.episode.success else "ended"
            text = f"{clip.label}: {end} after {len(scores) - 1} steps, best {name} {scores.max():.2f}"
        return text

    def _enlarged(self, frame: np.ndarray) -> Image.Image:
        image = Image.fromarray(np.round(np.clip(frame, 0, 1) * 255).astype(np.uint8))
        return image.resize((self._width, self._height), Image.Resampling.NEAREST)

    def _path(self, sheet: Image.Image, actions: np.ndarray, left: int, top: int) -> None:
        """The targets (Ta, Da) of a decision on its frame: a line, and a dot where it ends."""
        assert self._plane is not None
        points = (self._plane.to_pixels(actions) + 0.5) * self._scale
        cell = sheet.crop((left, top, left + self._width, top + self._height))  # what lies outside is cut off
        pen = ImageDraw.Draw(cell)
        line = [(float(x), float(y)) for x, y in points]
        for color, width, radius in (("white", 8, 9), (SAMPLE, 4, 6)):
            pen.line(line, fill=color, width=width, joint="curve")
            x, y = line[-1]
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        sheet.paste(cell, (left, top))
