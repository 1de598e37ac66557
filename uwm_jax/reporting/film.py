"""Closed-loop episodes as a GIF: at every decision what was seen, and of systems that predict frames from given actions
what the model imagined, and what came.

Such a use is given the actions that were really sent from the decision on, among them those of later decisions, so what
it imagines can be held against what happened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from uwm_jax.envs import EnvSpec
from uwm_jax.envs.parallel import EpisodeResult
from uwm_jax.evaluation.closed_loop import acting_source
from uwm_jax.files import Place
from uwm_jax.reporting.drawing import SAMPLE, TRACK, TRUTH, Plane, save_gif
from uwm_jax.reporting.sheets import Labels, Mark, write_labels
from uwm_jax.systems.base import System

BATCH = 16
CELL = 256  # pixels of a frame's longer side, at least
GAP, BELOW = 6, 28  # pixels around a frame, and below it, where the bar is
FRAME_MS, LAST_MS = 450, 2500


class Clip(NamedTuple):
    """One episode at those of its decisions whose outcome the episode still shows.

    Attributes:
        label: what the episode is, in words.
        episode: as it was run.
        steps: (D,) int, of the decisions.
        actions: (D, Ta, Da) that were sent from each decision on, raw units.
        current: (D, V, h, w, 3) float32 in [0, 1], as the model sees frames: the newest one at the decision.
        imagined, truth: the last of the frames after the actions, imagined and real, as `current`; None of systems that
            imagine none.
    """

    label: str
    episode: EpisodeResult
    steps: np.ndarray
    actions: np.ndarray
    current: np.ndarray
    imagined: np.ndarray | None = None
    truth: np.ndarray | None = None


def representative(episodes: Sequence[EpisodeResult]) -> list[tuple[str, int]]:
    """(words, place) of the best, the median and the worst episode by their best score, as far as there are."""
    order = np.argsort([e.max_score for e in episodes], kind="stable")
    places = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    chosen: dict[int, str] = {}
    for word, place in places.items():
        chosen.setdefault(int(place), f"{word} of {len(episodes)}")
    return [(words, place) for place, words in chosen.items()]


def imagining(system: System) -> str:
    """The use that makes frames of given actions; "" where there is none."""
    fitting = (name for name, use in system.uses.items() if use.given == ("action",) and use.makes == ("next_obs",))
    return next(fitting, "")


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
    """The decisions of an episode, and what the model imagines of their outcome; none of a model without cameras.

    Args:
        seen: {camera or low-dimensional key: (T + 1, ...)}, raw, as `uwm_jax.envs.parallel.replay` gives them.
        execute: steps between decisions.
    """
    spec, window, use = system.spec, system.spec.window, imagining(system)
    groups = ("obs", "next_obs") if use else ("obs",)
    present, length = max(window.obs), len(episode.actions)
    outcome = max(window.action) - present + 1  # the last step's action, and the frame after it, are the last
    if use:
        outcome = max(outcome, max(window.next_obs) - present)
    steps = np.arange(0, length - outcome + 1 if spec.cameras else 0, execute)

    def frames(key: str) -> np.ndarray:
        group, name = key.split("/")
        return np.stack([seen[name][window.steps(window.groups[group], int(t) - present, length + 1)] for t in steps])

    actions = [episode.actions[window.steps(window.action, int(t) - present, length)] for t in steps]
    batch = {}
    if len(steps):
        raw, robot = np.stack(actions).astype(np.float32), spec.robot(acting_source(system))
        if robot:
            raw = robot.to_model(raw, {key: np.asarray(seen[key], np.float32)[steps] for key in robot.states})
        like = spec.batch_like(len(steps))
        batch = {key: frames(key).astype(like[key].dtype) for key in like if key.partition("/")[0] in groups}
        batch = spec.normalized(batch | {"action": raw})
        batch["row"] = np.arange(len(steps), dtype=np.int32)
    pieces = []
    for start in range(0, len(steps), BATCH):
        part = np.resize(np.arange(start, min(start + BATCH, len(steps))), BATCH)
        pieces.append(_shown(system, use)(params, frozen, {key: x[part] for key, x in batch.items()}))
    if not pieces:
        return Clip(
            label, episode, steps, np.array(actions), np.zeros((0, len(spec.cameras), *system.config.data.crop, 3))
        )
    made = [np.concatenate(parts)[: len(steps)] for parts in zip(*jax.device_get(pieces), strict=True)]
    return Clip(label, episode, steps, np.array(actions), *made)


@functools.lru_cache(maxsize=4)
def _shown(system: System, use: str) -> Callable[..., tuple[jax.Array, ...]]:
    """(params, frozen, batch) -> the last current frame and, with a use, the last imagined and true next one, each
    (B, V, h, w, 3)."""

    def shown(params: Any, frozen: Any, batch: Any) -> tuple[jax.Array, ...]:
        current, following = system.images(batch)
        if not use:
            return (current[:, :, -1],)
        assert following is not None
        noise = system.noise(jax.random.key(0), batch["row"], use)
        made = system.sample(params, system.encode(frozen, batch), use, noise)
        imagined = jnp.clip(system.frames(frozen, made), 0, 1)
        return current[:, :, -1], imagined[:, :, -1], following[:, :, -1]

    return jax.jit(shown)


def draw(clips: Sequence[Clip], spec: EnvSpec, system: System, path: Place) -> bool:
    """Writes a GIF with a row per clip and a picture per decision, and its labels to the folder's `pictures.json`; a
    clip that has ended stays at its last decision.

    Returns:
        whether there was a decision to show; if not, there is no such file afterwards.
    """
    clips = [clip for clip in clips if len(clip.steps)]
    if not clips:
        path.unlink(missing_ok=True)  # of an earlier start
        return False
    sheet = _Sheet(clips, Plane.of(system.spec, system.config.data, spec.action_plane))
    count = max(len(clip.steps) for clip in clips)
    save_gif([sheet.draw(i) for i in range(count)], path, [FRAME_MS] * (count - 1) + [LAST_MS])
    write_labels(path.parent, {path.name: sheet.labels(spec.score, system.config.data.window)})
    return True


class _Sheet:
    """The layout of one picture: a row of tiles for each clip, and below it a bar of the score."""

    def __init__(self, clips: Sequence[Clip], plane: Plane | None):
        self._clips, self._plane = clips, plane
        h, w = clips[0].current.shape[2:4]
        self._scale = -(-CELL // max(h, w))
        self._height, self._width = h * self._scale, w * self._scale
        self._tile = (self._height + GAP + BELOW, self._width + 2 * GAP)
        self._columns = 1 if clips[0].imagined is None else 3
        self._full = max(float(clip.episode.scores.max()) for clip in clips)

    def labels(self, score: str, window: Any) -> Labels:
        columns = [("now", f"with the next {len(window.action)} targets" if self._plane else "what is seen")]
        if self._columns > 1:
            later = max(window.next_obs) - max(window.obs)
            columns += [("imagined", f"{later} steps later"), ("the truth", "what really came")]
        rows = []
        for clip in self._clips:
            end = "solved" if clip.episode.success else "ended"
            scores = clip.episode.scores
            rows.append(f"{clip.label}: {end} after {len(scores) - 1} steps, best {score} {scores.max():.2f}")
        key = [Mark("-", SAMPLE, "the targets that are sent next (dot: the last one)")] if self._plane else []
        key.append(Mark("bar", SAMPLE, f"{score} at the decision; its full width is {self._full:.2f}"))
        key.append(Mark("tick", TRUTH, "the best so far"))
        return Labels(columns, rows, (), key)

    def draw(self, i: int) -> Image.Image:
        height, width = self._tile
        sheet = Image.new("RGB", (self._columns * width, len(self._clips) * height), "white")
        pen = ImageDraw.Draw(sheet)
        for row, clip in enumerate(self._clips):
            at, top = min(i, len(clip.steps) - 1), row * height + GAP
            view = self._plane.view if self._plane else 0
            cells = [(frames[at, view], color) for frames, color in self._tiles(clip) if frames is not None]
            for column, (frame, color) in enumerate(cells):
                left = column * width + GAP
                sheet.paste(self._enlarged(frame), (left, top))
                pen.rectangle(
                    (left - 3, top - 3, left + self._width + 2, top + self._height + 2), outline=color, width=3
                )
            if self._plane:
                self._path(sheet, clip.actions[at], GAP, top)
            self._bar(pen, clip, at, top + self._height + BELOW // 2)
        return sheet

    @staticmethod
    def _tiles(clip: Clip) -> list[tuple[np.ndarray | None, str]]:
        """The frames of each column, and the colour around them."""
        return [(clip.current, TRUTH), (clip.imagined, SAMPLE), (clip.truth, TRUTH)]

    def _bar(self, pen: ImageDraw.ImageDraw, clip: Clip, at: int, middle: int) -> None:
        """The score at a decision as a share of the best of all clips, and a tick at the best so far; at the end of an
        episode the score of its end."""
        scores, step = clip.episode.scores, int(clip.steps[at])
        if at == len(clip.steps) - 1:
            step = len(scores) - 1
        left, full = GAP, self._columns * self._tile[1] - 2 * GAP
        now, best = (
            left + full * min(max(float(score) / self._full, 0.0), 1.0) if self._full > 0 else left
            for score in (scores[step], scores[: step + 1].max())
        )
        pen.rectangle((left, middle - 4, left + full, middle + 4), fill=TRACK)
        pen.rectangle((left, middle - 4, now, middle + 4), fill=SAMPLE)
        pen.rectangle((best - 2, middle - 7, best + 2, middle + 7), fill=TRUTH)

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
