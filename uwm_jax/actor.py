"""The half of a policy that has no memory: histories of raw observations in, chunks of actions out as the robot takes
them.

Relative times follow from the window that the model was trained on (`config.data.window`): the newest observed frame is
the present, and the action of the same step is the next one to take. For the paper's window, obs (0, 1) and action 1 to
16, the history is the last two frames, and the chunk's first action is taken now.

The model's actions come back as the robot takes them (`DataSpec.robots`): the transforms of `config.data.action` are
inverted. A checkpoint that does not know its robot gives the model's own columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from uwm_jax.backend import Backend, Noise
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.systems.base import Promised

Limits = tuple[object, object]  # lowest and highest action, (Dr,) each or a number for all columns


class Actor:
    """The half of a policy without memory: histories in, chunks of actions out as the robot takes them.

    A row's chunk is a function of its own inputs and noise alone: the network always sees one of `sizes` rows, of which
    spare ones are filled up.

    Args:
        backend: whose acting use it is.
        source: of the training data, whose robot acts; "" where all have actions of one convention.
        limits: (lowest, highest) action that the robot is given, in its own columns and units, each (Dr,) or a number
            for all; None: none. Those of the backend hold as well. What lies beyond is cut, counted in `cut`, and said
            once.
        sizes: rows of a call of the network, rising: a call has the smallest that holds its rows, and more rows than
            the largest make several calls. (): as many as there are.
    Raises:
        UserError: the model acts in no use, `source` does not tell the robot, or limits that do not fit.

    Attributes:
        sizes: as given.
        horizon: rows of a chunk, one for each step from the present on; width: Dr, numbers of the robot's action.
        states: {key of an observation: D} of the states that its relative actions refer to.
        cut: numbers of chunks that the limits have cut.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        source: str = "",
        limits: Limits | None = None,
        sizes: Sequence[int] = (),
    ):
        if not backend.acting:
            raise UserError(
                f"config.system={backend.system!r}: this model, or this export of it, makes no action from an "
                "observation alone."
            )
        self.backend, self.sizes = backend, tuple(sizes)
        window = backend.spec.window
        self._rows = rows_from_the_present(window)
        self._newest = window.obs.index(window.present)
        self._robot = backend.spec.robot(source)
        self.states = dict(self._robot.states) if self._robot else {}
        self.horizon = self._rows.stop - self._rows.start
        self.width = self._robot.width if self._robot else backend.spec.action_dim
        self._low, self._high = (np.full(self.width, end, np.float32) for end in (-np.inf, np.inf))
        for low, high in (self._checked(each) for each in (limits, backend.limits) if each is not None):
            self._low, self._high = np.maximum(low, self._low), np.minimum(high, self._high)
        self.cut = 0

    def inputs_like(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what `chunks` takes, raw: `obs/<camera>` (B, To, H, W, 3) uint8, `obs/<low-dim key>`
        (B, To, D) float32, among them the states that relative actions refer to, and `obs/text` (B, E) float32."""
        frames = len(self.backend.spec.window.obs)
        found = {}
        for key, like in self.observation_like(rows).items():
            shape = like.shape if key == "text" else (rows, frames, *like.shape[1:])
            found[f"obs/{key}"] = jax.ShapeDtypeStruct(shape, like.dtype)
        return found

    def observation_like(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one step's observation, as `DataSpec.observation_like`."""
        return self.backend.spec.observation_like(rows, self._robot)

    def check(self, observation: Mapping[str, object], rows: int) -> dict[str, np.ndarray]:
        """One step's observation of `rows` episodes in the dtypes of `observation_like`; UserError as
        `DataSpec.check`."""
        return self.backend.spec.check(observation, rows, self._robot)

    def noise(self, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> Noise:
        """The noise of chunks, as `Backend.noise` of the acting use."""
        rows = len(seeds)
        at = np.concatenate([part for part, _ in self._calls(rows)])
        drawn = self.backend.noise(self.backend.acting, seed, np.asarray(seeds)[at], np.asarray(decisions)[at])
        return drawn if len(at) == rows else {m: np.asarray(x)[:rows] for m, x in drawn.items()}

    def chunks(
        self,
        inputs: Mapping[str, np.ndarray],
        noise: Noise,
        promised: tuple[np.ndarray, np.ndarray] | None = None,
        *,
        guided: bool = False,
    ) -> np.ndarray:
        """Chunks of actions: (B, horizon, Dr) float32, the numbers that the robot takes, row k for k steps from now.
        Relative actions refer to the newest observation.

        Args:
            inputs: as `inputs_like`.
            noise: {modality: (B, ...)} of the acting use.
            promised: (actions (B, horizon, Dr), count (B,)): the first `count` rows are executed whatever is sampled,
                and are returned as they are given; they need not be finite after these. None for plain sampling.
            guided: whether they also guide the rest.
        Raises:
            UserError: actions are promised to a backend that cannot hold them.
            RunError: the actions are not finite.
        """
        rows = len(next(iter(inputs.values())))
        if promised is not None and not self.backend.can_promise:
            raise UserError(
                f"config.system={self.backend.system!r} does not sample in steps, so it cannot hold promised actions."
            )
        inside = self._inside(inputs, *promised) if promised is not None and np.any(promised[1]) else None
        pieces = []
        for at, used in self._calls(rows):
            whole = len(at) == rows

            def of(x: Any, at: np.ndarray = at, whole: bool = whole) -> Any:
                return x if whole else np.asarray(x)[at]

            made = self.backend.sample(
                self.backend.acting,
                {key: of(x) for key, x in inputs.items() if key in self._read},
                {m: of(x) for m, x in noise.items()},
                None if inside is None else Promised(of(inside.action), of(inside.mask)),
                guided=guided and inside is not None,
                actions_only=True,
            )
            pieces.append(made["action"][:used])
        chunk = np.concatenate(pieces)
        actions = chunk[:, self._rows]
        if self._robot:
            actions = self._robot.to_robot(actions, self._present(inputs))
        if not (np.isfinite(chunk).all() and np.isfinite(actions).all()):
            raise RunError(
                "the policy's actions are not finite. Check the observations for extreme values, and the checkpoint's "
                "parameters."
            )
        if promised is not None:  # they are within the limits, and are not to leave them by rounding
            first = np.arange(self.horizon) < np.asarray(promised[1])[:, None]
            actions = np.where(first[..., None], promised[0], actions).astype(np.float32)
        return self._limited(actions)

    def normalized(self, actions: np.ndarray, states: Mapping[str, np.ndarray]) -> np.ndarray:
        """Actions (B, T, Dr) of the robot as the model has them, (B, T, Da) float32 normalised.

        Args:
            states: {key of `states`: (B, D)} that relative actions refer to, raw.
        """
        if self._robot:
            actions = self._robot.to_model(actions, states)
        return np.asarray(self.backend.spec.normalizer.normalize("action", actions), np.float32)

    def _inside(self, inputs: Mapping[str, np.ndarray], actions: np.ndarray, count: np.ndarray) -> Promised:
        """Promised actions at their places in the model's chunk."""
        count = np.asarray(count)
        first = np.arange(self.horizon) < count[:, None]
        # Rows that are not promised repeat one that is, so that their transforms are finite as well.
        filled = np.where(first[..., None], actions, np.asarray(actions)[:, :1])
        rows, spec = len(count), self.backend.spec
        mask = np.zeros((rows, len(spec.window.action)), bool)
        mask[:, self._rows] = first
        values = np.zeros((*mask.shape, spec.action_dim), np.float32)
        values[:, self._rows] = np.where(first[..., None], self.normalized(filled, self._present(inputs)), 0)
        return Promised(values, mask)  # type: ignore[arg-type]  # numpy's arrays are placed when they are used

    @property
    def _read(self) -> set[str]:
        return {f"obs/{key}" for key in self.backend.spec.observation_like(0)}

    def _present(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The states of the newest observation."""
        return {key: inputs[f"obs/{key}"][:, self._newest] for key in self.states}

    def _calls(self, rows: int) -> list[tuple[np.ndarray, int]]:
        """The rows (size,) of each call, filled up by repetition, and how many of them count."""
        if not self.sizes:
            return [(np.arange(rows), rows)]
        largest, found = self.sizes[-1], []
        for start in range(0, rows, largest):
            part = np.arange(start, min(start + largest, rows))
            size = next(size for size in self.sizes if size >= len(part))
            found.append((np.resize(part, size), len(part)))
        return found

    def _checked(self, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for name, limit in zip(("lowest", "highest"), limits, strict=True):
            try:
                array = np.broadcast_to(np.asarray(limit, np.float32), (self.width,))
            except (TypeError, ValueError) as e:
                raise UserError(
                    f"limits, {name}: expected a number, or {self.width}, one for each column of the robot's action; "
                    f"found {limit!r}."
                ) from e
            found.append(array)
        if not (found[0] <= found[1]).all():
            raise UserError(f"limits: expected lowest <= highest in every column, found {limits!r}.")
        return found[0], found[1]

    def _limited(self, actions: np.ndarray) -> np.ndarray:
        beyond = (actions < self._low) | (actions > self._high)
        if not beyond.any():
            return actions
        if not self.cut:
            row, step, column = np.argwhere(beyond)[0]
            warn(
                f"actions beyond the limits are cut: column {column} of a chunk reached "
                f"{actions[row, step, column]:.4g}, allowed is {self._low[column]:.4g} to {self._high[column]:.4g}."
            )
        self.cut += int(beyond.sum())
        return np.clip(actions, self._low, self._high)


def rows_from_the_present(window: WindowSpec) -> slice:
    """Places in a window's actions of those that follow each other step by step from the newest observed frame on."""
    action, present = window.action, window.present
    first = action.index(present) if present in action else 0
    ready = 0
    while first + ready < len(action) and action[first + ready] == present + ready:
        ready += 1
    return slice(first, first + ready)
