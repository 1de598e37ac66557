"""The contract between data and models: what a batch and an observation hold, in which shapes, dtypes and units.

`DataSpec` is made once, where the data of a run are opened, and travels inside every checkpoint. Loader, systems,
policies, `sample` and rollouts read shapes from it and state none of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from uwm_jax.data.images import NUMBERS
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.robot import RobotActions
from uwm_jax.data.windows import OF_FRAMES, WindowSpec
from uwm_jax.errors import UserError

Batch = dict[str, np.ndarray]

AUGMENTATION = "augmentation"  # the key of the numbers that decide a row's draws


def latents_key(group: str, moments: bool = False) -> str:
    """The key of a group's latents in a batch, or of the means and log-variances of their posteriors."""
    return f"{group}_{'moments' if moments else 'latent'}"


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """The encoder of a run's texts.

    Attributes:
        name: folder or hub name that it was opened by, for people.
        sha256: of its files, as `uwm_jax.torch_bridge.clip_text.fingerprint` computes it.
    """

    name: str
    sha256: str

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TextEncoder:
        return cls(str(stored["name"]), str(stored["sha256"]))

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]})"


@dataclasses.dataclass(frozen=True)
class CachedLatents:
    """The latents that batches hold in place of some frames.

    Attributes:
        groups: of the window, those with latents.
        shape: (h, w, C) of a frame's.
        dtype: of their numbers.
        moments: whether they are means and log-variances, 2 C channels.
        augmented: whether they were made of frames with random crops or jitter.
    """

    groups: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: str = "float16"
    moments: bool = False
    augmented: bool = False


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The contents of a batch, the same for all sources of a run.

    Attributes:
        window: the steps of a sample; a group without steps has no keys in a batch.
        cameras: {name: (height, width)} of the raw frames.
        low_dim: {name: D}.
        action_dim: Da; 0 without actions.
        text_dim: width of the text embedding, 0 for none.
        normalizer: raw = normalised * scale + offset, of `action` and the low-dimensional keys.
        flip: {camera: "rows" or "180"} of the cameras whose pictures were turned upright when the dataset was made
            (`data_prep.hdf5`): a policy must be shown its own pictures turned in the same way.
        text_encoder: that made the text embeddings; None where it is not known.
        robots: {source with actions: its robot's actions, and how they become those of a batch}; {} in a checkpoint
            that does not know, such as an official one.
        cached: of training batches with latents; None for frames alone. A checkpoint does not keep it.
    """

    window: WindowSpec
    cameras: dict[str, tuple[int, int]]
    low_dim: dict[str, int]
    action_dim: int
    text_dim: int
    normalizer: Normalizer
    flip: dict[str, str] = dataclasses.field(default_factory=dict)
    text_encoder: TextEncoder | None = None
    robots: Mapping[str, RobotActions] = dataclasses.field(default_factory=dict)
    cached: CachedLatents | None = None

    def batch_like(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch of `rows` samples, by key.

        `obs/<camera>`, `next_obs/<camera>` (B, T, H, W, 3) uint8 raw; `obs/<low-dim key>` (B, T, D) and `action`
        (B, Ta, Da) float32 normalised; `obs/text` (B, E) float32; `action_mask` (B,) bool, False where no action was
        recorded; `row` (B,) int32, the row's index in the global batch. A group that the window lacks has no keys.

        With `cached`, a group's frames are replaced by `<group>_latent` (B, V, T, h, w, C) in the cache's dtype, or
        `<group>_moments` with 2 C channels, cameras sorted. Where other frames remain and the cache is augmented,
        `augmentation` (B, V, NUMBERS) float32 decides the same draws for these (`images.preprocess`).
        """
        window, cached = self.window, self.cached
        like: dict[str, tuple[tuple[int, ...], Any]] = {}
        for group in OF_FRAMES:
            steps = window.groups.get(group)
            if cached and steps and group in cached.groups:
                *size, channels = cached.shape
                shape = len(self.cameras), len(steps), *size, channels * (2 if cached.moments else 1)
                like[latents_key(group, cached.moments)] = shape, np.dtype(cached.dtype)
            elif steps:
                like |= {f"{group}/{name}": ((len(steps), *size, 3), np.uint8) for name, size in self.cameras.items()}
        if cached and cached.augmented and any(window.groups.get(g) for g in OF_FRAMES if g not in cached.groups):
            like[AUGMENTATION] = (len(self.cameras), NUMBERS), np.float32
        if window.obs:
            like |= {f"obs/{name}": ((len(window.obs), width), np.float32) for name, width in self.low_dim.items()}
        if window.obs and self.text_dim:
            like["obs/text"] = (self.text_dim,), np.float32
        if window.action:
            like["action"] = (len(window.action), self.action_dim), np.float32
        like["action_mask"] = (), np.bool_
        like["row"] = (), np.int32
        return {key: jax.ShapeDtypeStruct((rows, *shape), dtype) for key, (shape, dtype) in like.items()}

    @property
    def widths(self) -> dict[str, int]:
        """{key: D} of the vectors that are normalised: `action`, where there are actions, and the low-dim keys."""
        return ({"action": self.action_dim} if self.window.action else {}) | self.low_dim

    def empty(self, rows: int) -> Batch:
        """Uninitialised arrays for a batch of `rows` samples."""
        return {key: np.empty(like.shape, like.dtype) for key, like in self.batch_like(rows).items()}

    def zeros(self, rows: int) -> Batch:
        """A batch of zeros."""
        return {key: np.zeros(like.shape, like.dtype) for key, like in self.batch_like(rows).items()}

    def robot(self, source: str = "") -> RobotActions | None:
        """The actions of a robot: of this source, or, without a name, of all; None where `robots` is empty.

        Raises:
            UserError: there is no such source, or none is named and the sources have robots of different conventions.
        """
        names = sorted(self.robots)
        if source and source not in self.robots:
            known = ", ".join(names) or "no source that it knows"
            raise UserError(f"source={source!r}: the model was trained on actions of {known}.")
        if not names:
            return None
        first = self.robots[source or names[0]]
        if not source and not all(first.is_like(robot) for robot in self.robots.values()):
            raise UserError(
                f"the sources {', '.join(names)} of this model have different transforms of their actions, so it has "
                "to be said whose robot acts: --source=NAME of a server, or Policy(..., source=NAME)."
            )
        return first

    def observation_like(self, rows: int, robot: RobotActions | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one step's raw observation in `rows` episodes: {camera: (B, H, W, 3) uint8; low-dim
        key: (B, D) float32; "text": (B, E) float32 where the data have text}, and for a `robot` with relative actions
        {state that they refer to: (B, D) float32}."""
        like: dict[str, tuple[tuple[int, ...], type]] = {c: ((*size, 3), np.uint8) for c, size in self.cameras.items()}
        like |= {key: ((width,), np.float32) for key, width in self.low_dim.items()}
        like |= {key: ((width,), np.float32) for key, width in (robot.states if robot else {}).items()}
        if self.text_dim:
            like["text"] = (self.text_dim,), np.float32
        return {key: jax.ShapeDtypeStruct((rows, *shape), dtype) for key, (shape, dtype) in like.items()}

    def check(self, observation: Mapping[str, Any], rows: int, robot: RobotActions | None = None) -> Batch:
        """The arrays of one step's observation in `rows` episodes, in the dtypes of `observation_like`, whose arguments
        `rows` and `robot` are; other keys of `observation` are left out.

        Raises:
            UserError: naming every key that is missing or has an unfit shape, dtype or value.
        """
        problems: list[str] = []
        checked: Batch = {}
        for key, like in self.observation_like(rows, robot).items():
            expected = f"expected {like.dtype.name} {like.shape}"
            if robot and key in robot.states and key not in self.low_dim:
                expected += ", which the robot's actions are relative to"
            if key not in observation:
                problems.append(f"missing {key}: {expected}")
                continue
            value = np.asarray(observation[key])
            fits = value.dtype == np.uint8 if like.dtype == np.uint8 else value.dtype.kind in "fiu"
            if not fits or value.shape != like.shape:
                problems.append(f"{key}: {expected}, found {value.dtype} {value.shape}")
                continue
            checked[key] = value.astype(like.dtype)
            if not np.isfinite(checked[key]).all():
                problems.append(f"{key}: holds values that are not finite")
        if problems:
            raise UserError(
                "the observation does not fit what the model was trained on:\n  "
                + "\n  ".join(problems)
                + f"\nIt has {', '.join(sorted(observation)) or 'no keys'}."
            )
        return checked

    def check_text_encoder(self, other: TextEncoder | None, where: str, ours: str) -> None:
        """Checks that embeddings of another place are made by the encoder of these, as far as both are known.

        Args:
            where: the other place; ours: that of this spec, for messages.
        Raises:
            UserError: they are of another encoder.
        """
        mine = self.text_encoder
        if mine and other and mine.sha256 != other.sha256:
            raise UserError(
                f"the text embeddings of {where} are by another encoder than those of {ours}: expected {mine}, found "
                f"{other}. Embed the strings with the expected one, under the same name: python -m data_prep.text "
                f"--dataset=DIR --encoder={mine.name} --overwrite; or under another --name, which a new run reads by "
                "config.data.text_table."
            )

    def normalized(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch in raw units with `action` and `obs/<low-dim key>`, those that it has, normalised."""
        names = {"action": "action"} | {f"obs/{key}": key for key in self.low_dim}
        return {key: self.normalizer.normalize(names[key], x) if key in names else x for key, x in batch.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "window": self.window.to_json(),
            "cameras": {name: list(size) for name, size in self.cameras.items()},
            "low_dim": dict(self.low_dim),
            "action_dim": self.action_dim,
            "text_dim": self.text_dim,
            "normalizer": self.normalizer.to_json(),
            "flip": dict(self.flip),
            **({"text_encoder": self.text_encoder.to_json()} if self.text_encoder else {}),
            "robots": {source: robot.to_json() for source, robot in self.robots.items()},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> DataSpec:
        return cls(
            window=WindowSpec.from_json(stored["window"]),
            cameras={name: (int(size[0]), int(size[1])) for name, size in stored["cameras"].items()},
            low_dim={name: int(width) for name, width in stored["low_dim"].items()},
            action_dim=int(stored["action_dim"]),
            text_dim=int(stored["text_dim"]),
            normalizer=Normalizer.from_json(stored["normalizer"]),
            flip={name: str(how) for name, how in stored.get("flip", {}).items()},  # older checkpoints have none
            text_encoder=TextEncoder.from_json(stored["text_encoder"]) if "text_encoder" in stored else None,
            robots={name: RobotActions.from_json(robot) for name, robot in stored.get("robots", {}).items()},
        )
