"""Windows of one source as rows of batches.

`Samples` fills rows with the windows of one source, whatever it lacks: a source without actions has zeros in their
place, one with fewer cameras than the model fills the other views by one of three rules, and frames of another size are
resized to cover the model's and cropped.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uwm_jax.data.choices import keys_of, pick
from uwm_jax.data.cover import cover
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.order import mix
from uwm_jax.data.records import Dataset
from uwm_jax.data.robot import Part, RobotActions
from uwm_jax.data.rotations import Rotation
from uwm_jax.data.selection import not_finite, steps_where
from uwm_jax.data.source_latents import SourceLatents
from uwm_jax.data.spec import Batch, DataSpec
from uwm_jax.data.texts import open_texts
from uwm_jax.data.transforms import Columns, parse
from uwm_jax.data.windows import OF_FRAMES, WindowSpec
from uwm_jax.errors import UserError


class Clip(NamedTuple):
    """A window: an episode's number in the split, and the step at which the window begins."""

    episode: int
    origin: int


class Samples:
    """Reads windows of a dataset into rows, as `config.data` and one of its sources ask for.

    Args:
        dataset: an open split.
        config: `config.data`.
        source: the fields of `uwm_jax.config.source`.
        where: what to call the source in messages.
    Raises:
        UserError: a key that the dataset does not have, a transform that does not fit.

    Attributes:
        camera_keys: the model's camera -> step key, for the cameras that the source has of its own; of a choice
            (`config.choices`) the first.
        robot: the parts of the action, by step key, and the states that relative ones refer to; empty for a source that
            is used as video, and where the window has no actions.
        state_keys: {key of an observation: step key} of these states.
        low_dim_keys: name -> step key; empty for a source that is used as video.
        texts: None without `config.text`, and for a source that is used as video and has none.
        action_lengths: (E,) int64, the steps of each episode whose action counts: with `config.last_action` "drop" not
            the last where `is_last` marks it. All steps for a source that is used as video.
        latents: caches that its frames are read from where a batch has latents, or None.
    """

    def __init__(self, dataset: Dataset, config: Any, source: Any, where: str):
        self.dataset = dataset
        self.where = where
        self.window = WindowSpec.from_config(config.window)
        keys = source.cameras or config.cameras
        self._views = tuple(config.cameras)
        self._options = {
            view: tuple(map(dataset.camera_key, keys_of(key, config.choices, source.choices)))
            for view, key in zip(self._views, keys, strict=len(keys) == len(self._views))
        }
        self.camera_keys = {view: options[0] for view, options in self._options.items()}
        self._fill = source.fill_views if len(keys) < len(self._views) else ""
        self.use_actions = bool(source.use_actions)
        self.robot, self.low_dim_keys = RobotActions(()), dict[str, str]()
        self.state_keys: dict[str, str] = {}
        self.action_lengths = dataset.episode_lengths
        if self.use_actions and self.window.action and config.last_action == "drop":
            self.action_lengths = dataset.action_lengths
        if self.use_actions:
            self.low_dim_keys = {name: dataset.column_key(name) for name in sorted(config.low_dim)}
            if self.window.action:
                self.robot = self._robot(source.action or config.action)
        self.texts = open_texts(dataset, config, source, where)
        for key in {*self.action_keys, *self.state_keys.values(), *self.low_dim_keys.values()}:
            dataset.column(key)  # read and verified now, not with the first batch
        self.action_dim = self.robot.model_width
        self.latents: SourceLatents | None = None
        self.text_dim = self.texts.width if self.texts else 0

    def _robot(self, pairs: Sequence[tuple[str, str]]) -> RobotActions:
        """The robot's actions of the config's pairs; a state is called as in `config.low_dim` where it is there too."""
        names = {key: name for name, key in self.low_dim_keys.items()}
        parts, states = [], {}
        for columns, transform in parse(pairs):
            columns = columns._replace(key=self.dataset.column_key(columns.key))
            dim = columns.width(self._width(columns.key))
            transform.width(str(columns), dim)
            if state := transform.state:
                key = self.dataset.column_key(state.key)
                transform = transform.with_state(names.get(key, state.key))
                transform.check_state(dim, state.width(self._width(key)))
                self.state_keys[names.get(key, state.key)] = key
                states[names.get(key, state.key)] = self._width(key)
            parts.append(Part(columns, transform, dim))
        return RobotActions(tuple(parts), states)

    @property
    def action_keys(self) -> list[str]:
        """Step keys of the parts of the action."""
        return list(dict.fromkeys(part.columns.key for part in self.robot.parts))

    @property
    def shown_cameras(self) -> dict[str, tuple[str, ...]]:
        """{view: step keys of the cameras that it may show}, of views that show one."""
        own = list(self._options.values())
        if self._fill == "none":
            return {view: tuple(dict.fromkeys(key for keys in own for key in keys)) for view in self._views}
        more = self._views[len(own) :] if self._fill else ()
        return self._options | {v: own[0 if self._fill == "same" else i % len(own)] for i, v in enumerate(more)}

    @property
    def num_clips(self) -> int:
        """Windows that a row shows: its own, and with `fill_views` "random" one more for each view without camera."""
        return 1 + (len(self._views) - len(self.camera_keys) if self._fill == "random" else 0)

    def not_finite(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        """{step key: numbers of the episodes, among those `kept` (E,) bool, whose values are NaN or infinite}, of
        actions, low-dimensional keys and text, as far as these have columns; also of columns of actions and states
        whose transform makes them so, as of a quaternion of zeros."""
        lengths = self.dataset.episode_lengths
        counted = [(key, self.action_lengths) for key in self.action_keys]
        observed = [*self.low_dim_keys.values(), *self.state_keys.values(), *(self.texts.keys if self.texts else ())]
        counted += [(key, lengths) for key in observed]
        found: dict[str, np.ndarray] = {}
        for key, steps in counted:
            if key in self.dataset.column_keys:
                bad = not_finite(self.dataset.column(key), lengths, np.where(kept, steps, 0))
                found[key] = np.union1d(bad, found.get(key, bad))
        for columns, transform, rotation, steps in self._rotations():
            if rotation and rotation.is_none:
                column, none = self.dataset.column(columns.key), functools.partial(_is_none, columns, rotation)
                episodes, _ = steps_where(none, column, lengths, np.where(kept, steps, 0))
                found[f"{columns} by {transform}"] = np.unique(episodes)
        return {key: episodes for key, episodes in found.items() if len(episodes)}

    def _rotations(self) -> Iterator[tuple[Columns, str, Rotation | None, np.ndarray]]:
        """(columns, name of the transform, representation of their last numbers, steps of each episode that count) of
        the parts of the action, and of the states that they refer to."""
        for part in self.robot.parts:
            transform = part.transform
            yield part.columns, transform.name, transform.rotation, self.action_lengths
            if state := transform.state:
                columns = state._replace(key=self.state_keys[state.key])
                yield columns, transform.name, transform.state_rotation, self.dataset.episode_lengths

    def spec(self) -> DataSpec:
        """The rows of a run of which this is the first source with actions; without a normaliser."""
        return DataSpec(
            window=self.window,
            cameras={name: self.dataset.cameras[key] for name, key in sorted(self.camera_keys.items())},
            low_dim={name: self._width(key) for name, key in self.low_dim_keys.items()},
            action_dim=self.action_dim,
            text_dim=self.text_dim,
            normalizer=Normalizer(),
            flip={name: flip for name in sorted(self.camera_keys)} if (flip := self.dataset.flip) else {},
            text_encoder=self.texts.encoder if self.texts else None,
        )

    def check_fits(self, spec: DataSpec, first: str) -> None:
        """Raises UserError where this source's widths, or the encoder of its texts, differ from those of the `first`
        source with actions."""
        if self.texts:
            spec.check_text_encoder(self.texts.encoder, self.where, first)
        widths = {"obs/text": (self.text_dim, spec.text_dim)} if self.texts else {}
        if self.use_actions:
            widths |= {"action": (self.action_dim, spec.action_dim)}
            widths |= {name: (self._width(key), spec.low_dim[name]) for name, key in self.low_dim_keys.items()}
        for name, (found, expected) in widths.items():
            if found != expected:
                raise UserError(
                    f"{name} has {found} numbers in {self.where}, but {expected} in {first}: one model needs the same "
                    "width in all. Choose other keys in the `action` of one of these sources, or leave one out."
                )

    def load(self, batch: Batch, at: int, row: int, clips: Sequence[Clip], draw: int | None, spec: DataSpec) -> None:
        """Writes a sample into place `at` of a batch, as row `row`.

        Args:
            clips: `num_clips` windows; the first is the sample's own.
            draw: a number of 64 random bits that belongs to the sample; None shows the first key of every choice.
        """
        self._load_frames(batch, at, clips, draw)
        dataset, window = self.dataset, self.window
        episode, _ = clips[0]
        start, obs = int(dataset.episode_starts[episode]), self._observed(clips[0])
        if "obs/text" in batch:
            batch["obs/text"][at] = self.texts.embedding(episode, obs[-1], draw) if self.texts else 0
            self._check_finite(batch, at, "obs/text", clips[0])
        batch["action_mask"][at] = self.use_actions
        batch["row"][at] = row
        for key in ("action", *(f"obs/{name}" for name in spec.low_dim)):
            if key not in batch:
                continue
            if not self.use_actions:
                batch[key][at] = 0
            elif key == "action":
                batch[key][at] = self.action(clips[0], window.action, spec.normalizer)
            else:
                name = key.removeprefix("obs/")
                batch[key][at] = spec.normalizer.normalize(name, self._rows(self.low_dim_keys[name], start, obs))
            self._check_finite(batch, at, key, clips[0])

    def _check_finite(self, batch: Batch, at: int, name: str, clip: Clip) -> None:
        """Columns are known to be finite; what they are mapped to, and what has no column, may not be."""
        if not np.isfinite(batch[name][at]).all():
            raise UserError(
                f"{self.dataset.directory}: {name} is NaN or infinite in episode {clip.episode} of split "
                f"{self.dataset.split!r}, in the window at step {clip.origin}. Remove the episode from the source and "
                "reshard it."
            )

    def action(self, clip: Clip, indices: tuple[int, ...], normalizer: Normalizer) -> np.ndarray:
        """(len(indices), Da) float32 normalised actions at steps relative to a window of a source with actions."""
        episode, origin = clip
        return normalizer.normalize("action", self.actions(np.array([episode]), np.array([origin]), indices)[0])

    def actions(self, episodes: np.ndarray, origins: np.ndarray, indices: Sequence[int]) -> np.ndarray:
        """(n, len(indices), Da) float32, raw units, of the n windows of these episodes and origins (n,): the actions as
        the model learns them, at steps relative to the windows' origins."""
        ends, starts = self.action_lengths[episodes] - 1, self.dataset.episode_starts[episodes]
        steps = np.minimum(np.maximum(origins[:, None] + np.asarray(indices), 0), ends[:, None])
        values = {key: self._values(key, starts[:, None] + steps) for key in self.action_keys}
        recorded = np.concatenate([part.columns.of(values[part.columns.key]) for part in self.robot.parts], axis=-1)
        states = {}
        if self.state_keys:
            last = self.dataset.episode_lengths[episodes] - 1
            present = starts + np.clip(origins + self.window.present, 0, last)
            states = {name: self._values(key, present) for name, key in self.state_keys.items()}
        return self.robot.to_model(recorded, states)

    def begin(self, keys: Container[str], clips: Sequence[Clip], draw: int | None) -> None:
        """Starts to read what `load` of a sample reads, where that saves time: from a bucket.

        Args:
            keys: of the batch. clips, draw: as `load` has them.
        """
        if not self.dataset.is_remote:
            return
        filled = self._filled(draw)
        if self.latents and self.latents.are_in(keys):
            shown = {view: (clips[number], key) for view, (number, key) in filled.items()}
            self.latents.begin(sorted(self._views), shown, draw or 0)
        for number in {number for number, _ in filled.values()}:
            self.dataset.begin(clips[number].episode, self._frame_steps(keys, clips[number]))
        if self.texts and "obs/text" in keys:
            self.texts.begin(clips[0].episode, self._observed(clips[0])[-1])

    def _observed(self, clip: Clip) -> list[int]:
        """The steps of a window that are observed."""
        return self.window.steps(self.window.obs, clip.origin, int(self.dataset.episode_lengths[clip.episode]))

    def _filled(self, draw: int | None) -> dict[str, tuple[int, str]]:
        """{view: (number of the clip, step key) that it shows}, of views that are not black."""
        filled: dict[str, tuple[int, str]] = {}
        keys = [pick(options, view, draw) for view, options in self._options.items()]
        views = _shuffled(self._views, draw or 0) if self._fill == "none" else self._views
        for view, key in zip(views, keys, strict=False):
            filled[view] = (0, key)
        for i, view in enumerate(views[len(keys) :]):
            if self._fill == "same":
                filled[view] = (0, keys[0])
            elif self._fill == "random":
                filled[view] = (1 + i, keys[i % len(keys)])
        return filled

    def _load_frames(self, batch: Batch, at: int, clips: Sequence[Clip], draw: int | None) -> None:
        filled = self._filled(draw)
        for view in self._views:
            if view not in filled:
                for frames in _frames_of(batch, view):
                    frames[at] = 0
        if self.latents and self.latents.are_in(batch):
            shown = {view: (clips[number], key) for view, (number, key) in filled.items()}
            self.latents.load(batch, at, sorted(self._views), shown, draw or 0)
        for number, clip in enumerate(clips):
            wanted: dict[str, list[str]] = {}  # step key -> views
            for view, (n, key) in filled.items():
                if n == number:
                    wanted.setdefault(key, []).append(view)
            self._decode(batch, at, clip, wanted)

    def _decode(self, batch: Batch, at: int, clip: Clip, wanted: Mapping[str, list[str]]) -> None:
        """Decodes a clip's frames of some step keys, each once, into the views that show them."""
        if not wanted:
            return
        dataset, steps = self.dataset, self._frame_steps(batch, clip)
        if not steps:
            return
        places = {
            view: [frame for frames in _frames_of(batch, view) for frame in frames[at]]
            for views in wanted.values()
            for view in views
        }
        into: dict[str, Any] = {}
        for key, views in wanted.items():
            same_size = places[views[0]][0].shape[:2] == dataset.cameras[key]
            # Straight into the batch where that can be: it saves a copy of every frame.
            into[key] = places[views[0]] if same_size else np.empty((len(steps), *dataset.cameras[key], 3), np.uint8)
        dataset.frames(clip.episode, dict.fromkeys(into, steps), into)
        for key, views in wanted.items():
            for view in views:
                if into[key] is not places[view]:
                    for frame, place in zip(into[key], places[view], strict=True):
                        place[...] = cover(frame, place.shape[:2])

    def _frame_steps(self, keys: Container[str], clip: Clip) -> list[int]:
        """The steps of a clip whose frames a batch with these keys has."""
        window, length = self.window, int(self.dataset.episode_lengths[clip.episode])
        groups = [group for group in OF_FRAMES if f"{group}/{self._views[0]}" in keys]
        return [s for group in groups for s in window.steps(window.groups[group], clip.origin, length)]

    def _rows(self, key: str, start: int, steps: list[int]) -> np.ndarray:
        return self._values(key, start + np.asarray(steps))

    def _values(self, key: str, rows: np.ndarray) -> np.ndarray:
        """(*rows.shape, D) float32 values of a column."""
        values = self.dataset.column(key)[rows.reshape(-1)]
        return np.asarray(values, np.float32).reshape(*rows.shape, -1)

    def _width(self, key: str) -> int:
        return int(np.prod(self.dataset.step_shape(key), dtype=np.int64))


def _is_none(columns: Columns, rotation: Rotation, rows: np.ndarray) -> np.ndarray:
    assert rotation.is_none is not None
    return rotation.is_none(columns.of(rows)[..., -rotation.width :])


def _frames_of(batch: Batch, view: str) -> list[np.ndarray]:
    """The arrays of a view, in the order of `OF_FRAMES`."""
    return [batch[f"{group}/{view}"] for group in OF_FRAMES if f"{group}/{view}" in batch]


def _shuffled(items: Sequence[str], draw: int) -> list[str]:
    """The items in an order that `draw` decides."""
    return sorted(items, key=lambda item: mix(draw ^ items.index(item)))
