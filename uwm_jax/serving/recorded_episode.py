"""A recorded episode as a robot would send it: one request of a served model for every step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uwm_jax.actor import Actor
from uwm_jax.data import fields
from uwm_jax.data.cover import cover
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.places import find_dataset
from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.data.samples import Samples
from uwm_jax.data.stats import column_stats
from uwm_jax.errors import UserError

TEXT = "obs/text"
_WINDOWS, _STEPS = 4096, 65536  # of a dataset, by which its actions are measured


class RecordedEpisode:
    """An episode of a dataset that a served model reads.

    Args:
        place: `DATASET:EPISODE`: a directory or a name in $UWM_DATA_DIR, and the episode's number in its split.
        actor: the served model.
        source: of the run's data, whose keys the dataset has; "" for the first one with actions.
        keys: {name in requests: key here} of the server. A camera or number that the dataset has under such a name is
            sent under that name, so that it is the server who decides what the model sees it as.
    Raises:
        UserError: there is no such dataset or episode, or it lacks what the model reads.

    Attributes:
        name: for people. length: steps that have an action.
        cameras: {name in requests: (height, width)} of the frames.
        spread: (Dr,) standard deviation of the recorded actions of the dataset, 1 where they are constant.
        mean: (Dr,) their mean.
    """

    def __init__(self, place: str, actor: Actor, *, source: str = "", keys: Mapping[str, str] | None = None):
        path, number = parse_place(place)
        spec, config = actor.backend.spec, actor.backend.config.data
        own = config.sources[source] if source in config.sources else _first_source(config)
        directory = find_dataset(path, "--replay")
        self._dataset = _open(str(directory), own.split or config.split)
        if not 0 <= number < self._dataset.num_episodes:
            raise UserError(
                f"--replay={place}: expected an episode from 0 to {self._dataset.num_episodes - 1}, found {number}."
            )
        self._samples = Samples(self._dataset, config, own, str(directory))
        self._spec, self._number, self._normalize = spec, number, str(config.normalize)
        self._robot = spec.robot(source) if spec.robots else None
        if self._samples.action_dim != spec.action_dim:
            raise UserError(
                f"--replay={place}: its actions have {self._samples.action_dim} numbers for this model, which was "
                f"trained on {spec.action_dim}: it is another robot's data."
            )
        self.name = f"{directory.name}, split {self._dataset.split}, episode {number}"
        self.length = int(self._samples.action_lengths[number])
        self._steps = int(self._dataset.episode_lengths[number])
        self._start = int(self._dataset.episode_starts[number])
        self._sent_as = {key: name for name, key in (keys or {}).items() if key and self._knows(name, key)}
        self.cameras = {self._name(f"obs/{camera}"): size for camera, size in sorted(spec.cameras.items())}
        self._learnt = self._recorded_windows().reshape(-1, spec.action_dim)
        taken = self._learnt if self._robot is None else self._taken(self._steps_with_action())
        self.mean, deviation = taken.mean(0), taken.std(0)
        self.spread = np.where(deviation > 1e-6 * (1 + np.abs(self.mean)), deviation, 1.0)

    def requests(self, steps: Sequence[int], back: Sequence[int]) -> list[dict[str, Any]]:
        """What a robot sends at some steps.

        Args:
            back: steps back from the present of each frame, oldest first; () sends one frame or number alone.
        """
        found = []
        for step in steps:
            at = np.clip([step - b for b in (back or (0,))], 0, self._steps - 1)
            request: dict[str, Any] = {}
            for camera, size in sorted(self._spec.cameras.items()):
                frames = self._frames(self._camera_key(f"obs/{camera}", camera), at.tolist(), size)
                request[self._name(f"obs/{camera}")] = frames if back else frames[0]
            for key, column in self._number_keys().items():
                rows = self._values(column, at)
                request[self._name(f"obs/{key}")] = rows if back else rows[0]
            if self._samples.texts and self._spec.text_dim:
                request[TEXT] = np.array(self._samples.texts.embedding(self._number, step, None), np.float32)
            found.append(request)
        return found

    def actions(self, step: int, count: int) -> np.ndarray:
        """(n, Dr) recorded actions as the robot took them, n at most `count`, from a step on."""
        at = np.arange(step, min(step + count, self.length))
        if self._robot is not None:
            return self._taken(self._start + at)
        present = self._spec.window.present
        origins, indices = np.array([step - present]), [present + k for k in range(len(at))]
        return self._samples.actions(np.array([self._number]), origins, indices)[0]

    def own_normalizer(self) -> Normalizer | None:
        """A normaliser made of this dataset, as the run would make one; None where the run normalises nothing."""
        if self._normalize == "none":
            return None
        stats = {"action": column_stats(self._learnt)}
        stats |= {key: column_stats(self._dataset.column(column)) for key, column in self._low_dim().items()}
        return Normalizer.from_stats(stats, self._normalize, stats)

    def normalized(self, request: Mapping[str, Any], normalizer: Normalizer) -> dict[str, Any]:
        """A request whose low-dimensional keys are normalised, as a model without a normaliser would need them."""
        names = {self._name(f"obs/{key}"): key for key in self._low_dim()}
        return {
            name: np.asarray(normalizer.normalize(names[name], x), np.float32) if name in names else x
            for name, x in request.items()
        }

    def unnormalized(self, rows: np.ndarray, step: int, normalizer: Normalizer) -> np.ndarray:
        """Answers (n, Dr) at a step of a model without a normaliser in raw units."""
        if self._robot is None:
            return np.asarray(normalizer.unnormalize("action", rows), np.float32)
        states = {key: self._values(column, np.array([step])) for key, column in self._samples.state_keys.items()}
        inside = self._robot.to_model(rows[None], states)
        return self._robot.to_robot(np.asarray(normalizer.unnormalize("action", inside), np.float32), states)[0]

    def close(self) -> None:
        """Closes the dataset."""
        self._dataset.close()

    def _low_dim(self) -> dict[str, str]:
        return dict(self._samples.low_dim_keys)

    def _number_keys(self) -> dict[str, str]:
        """{key of a request, without `obs/`: step key} of all numbers."""
        own = self._low_dim() | self._samples.state_keys
        for key in own:
            name = self._sent_as.get(f"obs/{key}")
            own[key] = self._dataset.column_key(name) if name else own[key]
        return own

    def _name(self, key: str) -> str:
        return self._sent_as.get(key, key)

    def _knows(self, name: str, key: str) -> bool:
        """Whether the dataset has, under a name of the server's, what a key of the model may show."""
        keys = self._dataset.cameras if key.removeprefix("obs/") in self._spec.cameras else self._dataset.column_keys
        return not {name, f"observation/{name}"}.isdisjoint(keys)

    def _camera_key(self, key: str, camera: str) -> str:
        if key in self._sent_as:
            return self._dataset.camera_key(self._sent_as[key])
        return self._samples.shown_cameras[camera][0]

    def _frames(self, key: str, steps: list[int], size: tuple[int, int]) -> np.ndarray:
        """(len(steps), *size, 3) uint8, resized to cover the model's size where they have another."""
        frames = np.empty((len(steps), *self._dataset.cameras[key], 3), np.uint8)
        self._dataset.frames(self._number, {key: steps}, {key: frames})
        return frames if frames.shape[1:3] == size else np.stack([cover(frame, size) for frame in frames])

    def _values(self, column: str, steps: np.ndarray) -> np.ndarray:
        values = self._dataset.column(column)[self._start + np.asarray(steps)]
        return np.asarray(values, np.float32).reshape(len(steps), -1)

    def _taken(self, rows: np.ndarray) -> np.ndarray:
        """(n, Dr) the robot's actions at some steps of the whole split."""
        values = {
            key: np.asarray(self._dataset.column(key)[rows], np.float32).reshape(len(rows), -1)
            for key in self._samples.action_keys
        }
        return np.concatenate([part.columns.of(values[part.columns.key]) for part in self._samples.robot.parts], -1)

    def _steps_with_action(self) -> np.ndarray:
        """(n,) steps of the whole split, evenly spread."""
        starts, lengths = self._dataset.episode_starts, self._samples.action_lengths
        steps = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
        return steps[:: max(1, len(steps) // _STEPS)]

    def _recorded_windows(self) -> np.ndarray:
        """(n, Ta, Da) actions of windows of the dataset as the model learns them, evenly spread."""
        window, lengths = self._spec.window, self._samples.action_lengths
        episodes = np.repeat(np.arange(len(lengths)), lengths)
        presents = np.concatenate([np.arange(length) for length in lengths])
        every = max(1, len(presents) // _WINDOWS)
        return self._samples.actions(episodes[::every], presents[::every] - window.present, window.action)


def parse_place(text: str) -> tuple[str, int]:
    """`DATASET:EPISODE`.

    Raises:
        UserError: it is something else.
    """
    found = re.fullmatch(r"(.+):(\d{1,9})", text)
    if not found:
        raise UserError(f"--replay={text}: expected DATASET:EPISODE, such as pusht:0.")
    return found[1], int(found[2])


def _first_source(config: Any) -> Any:
    acting = [source for _, source in sorted(config.sources.items()) if source.use_actions]
    return acting[0] if acting else fields.source()


def _open(directory: str, split: str) -> Dataset:
    """The split of a config, or the only one of a dataset that lacks it."""
    there = list(read_manifest(directory)["splits"])
    return Dataset(directory, there[0] if split not in there and len(there) == 1 else split)
