"""A trained model as a policy: raw observations in, the next action out.

Receding horizon: from the last observations the policy mode samples a chunk of actions, of which the first `execute`
are taken before the next chunk is sampled. What the history's frames and the chunk's actions are relative to the
present follows from the window that the model was trained on (`config.data.window`): the newest observed frame is the
present, and the action of the same step is the next one to take. For the paper's window, obs (0, 1) and action 1 to 16,
the history is the last two frames, and the chunk's first action is taken now.

The model's actions come back as the robot takes them (`DataSpec.robots`): the transforms of `config.data.action` are
inverted. A checkpoint that does not know its robot gives the model's own columns.

It knows no environment, and drives any number of them at once: rollouts use many rows, a server one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import RunError, UserError
from uwm_jax.systems.base import System

Rows = Sequence[int] | np.ndarray | None
Sample = Callable[..., jax.Array]  # as `acting` makes it


class Policy:
    """Acts in as many episodes (rows) at once as `reset` is told of.

    A row's actions are a function of its own observations, its episode's seed and `seed` alone: the network always sees
    `batch_size` rows, of which spare ones are filled up.

    Args:
        system, params, frozen: as `inference.load_for_inference` gives them.
        execute: actions of each chunk that are taken, 1 to as many as the chunk has from the present on.
        seed: of the noise that sampling starts from, with the episode's seed and the number of the decision.
        batch_size: rows of one call of the network.
        sample: `acting(system)`, compiled; None: it is compiled for one device.
        source: of the training data, whose robot acts; "" where all have actions of one convention.
    Raises:
        UserError: `execute` does not fit the window that the model was trained on, or `source` does not tell the robot.
    """

    def __init__(
        self,
        system: System,
        params: Any,
        frozen: Any,
        *,
        execute: int = 8,
        seed: int = 0,
        batch_size: int = 1,
        sample: Sample | None = None,
        source: str = "",
    ):
        self.system, self._params, self._frozen = system, params, frozen
        self.execute, self._batch_size = execute, batch_size
        self._seed = np.uint32(seed)
        self._sample = sample or _compiled(system)
        window = system.spec.window
        present = max(window.obs)
        self._history = [present - i for i in window.obs]  # steps back from the present
        self._chunk = chunk_from_the_present(window, execute)
        self._robot = system.spec.robot(source)
        self.reset((0,))

    def reset(self, seeds: Sequence[int]) -> None:
        """Starts len(seeds) episodes; what was seen before is forgotten.

        Args:
            seeds: of each row's noise, 0 to 2**32 - 1.
        """
        self._seeds = np.array(seeds, np.uint32)
        rows = len(self._seeds)
        self._decisions = np.zeros(rows, np.uint32)
        self._left = np.zeros(rows, np.int64)  # actions of the row's chunk that are still to be taken
        width = self._robot.width if self._robot else self.system.spec.action_dim
        self._chunks = np.zeros((rows, self.execute, width), np.float32)
        self._seen = np.zeros(rows, bool)
        length = max(self._history) + 1
        self._frames = {
            key: np.zeros((rows, length, *like.shape[1:]), like.dtype)
            for key, like in self.system.spec.observation_like(rows, self._robot).items()
        }

    def act(self, observation: Mapping[str, np.ndarray], rows: Rows = None) -> np.ndarray:
        """The next action of each row; called once for every step of the episode.

        Args:
            observation: {camera: (n, H, W, 3) uint8 as the dataset has them; low-dimensional key: (n, D), raw units;
                "text": (n, E) where the model reads text; for relative actions, the state that they refer to: (n, D),
                raw units}. Other keys are ignored.
            rows: (n,) which rows these are of; None: all.

        Returns:
            (n, Dr) float32, the numbers that the robot takes.

        Raises:
            UserError: naming every key that is missing or has an unfit shape, dtype or value.
            RunError: the sampled actions are not finite.
        """
        at = self._rows(rows)
        self.observe(observation, at)
        due = at[self._left[at] == 0]
        if len(due):
            self._chunks[due] = self.plan(due)
            self._left[due] = self.execute
        action = self._chunks[at, self.execute - self._left[at]]
        self._left[at] -= 1
        return action

    def observe(self, observation: Mapping[str, np.ndarray], rows: Rows = None) -> None:
        """Takes in one step's observation, as `act` does; an episode's first one fills its whole history."""
        at = self._rows(rows)
        checked = self.system.spec.check(observation, len(at), self._robot)
        first = at[~self._seen[at]]
        self._seen[at] = True
        for key, value in checked.items():
            frames = self._frames[key]
            frames[at, :-1] = frames[at, 1:]
            frames[at, -1] = value
            frames[first] = frames[first, -1:]

    def inputs(self, rows: Rows = None) -> dict[str, np.ndarray]:
        """The network's inputs for these rows, a batch as `System` takes it: `obs/<camera>` (n, To, H, W, 3) uint8,
        `obs/<low-dim key>` (n, To, D) float32 normalised, `obs/text` (n, E)."""
        at = self._rows(rows)
        batch = {}
        spec = self.system.spec
        for key in spec.observation_like(0):
            frames = self._frames[key]
            if key == "text":
                batch["obs/text"] = frames[at, -1]
                continue
            batch[f"obs/{key}"] = frames[at][:, [-1 - back for back in self._history]]
        return spec.normalized(batch)

    def plan(self, rows: Rows = None) -> np.ndarray:
        """Samples a chunk from what was observed: (n, execute, Dr) float32, the numbers that the robot takes, the first
        action for now. Relative actions refer to the newest observation.

        Raises:
            RunError: the actions are not finite.
        """
        at = self._rows(rows)
        size = self._batch_size
        pieces = []
        for start in range(0, len(at), size):
            part = np.resize(at[start : start + size], size)  # filled up by repetition
            noise = self._seed, self._seeds[part], self._decisions[part]
            pieces.append(self._sample(self._params, self._frozen, self.inputs(part), *noise))
        self._decisions[at] += 1
        chunk = np.concatenate(jax.device_get(pieces))[: len(at)]
        actions = self._acted(chunk[:, self._chunk], at)
        if not (np.isfinite(chunk).all() and np.isfinite(actions).all()):
            raise RunError(
                "the policy's actions are not finite. Check the observations for extreme values, and the checkpoint's "
                "parameters."
            )
        return actions

    def _acted(self, chunk: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Normalised actions (n, T, Da) of the model for rows `at` as the robot takes them."""
        raw = np.asarray(self.system.spec.normalizer.unnormalize("action", chunk), np.float32)
        if self._robot is None:
            return raw
        return self._robot.to_robot(raw, {key: self._frames[key][at, -1] for key in self._robot.states})

    def _rows(self, rows: Rows) -> np.ndarray:
        return np.arange(len(self._seeds)) if rows is None else np.asarray(rows, np.int64)


def acting(system: System) -> Sample:
    """`(params, frozen, batch, seed, seeds, decisions) -> actions`, to be compiled: a chunk for each of B rows.

    Args of the function:
        batch: as `Policy.inputs` gives it.
        seed: () uint32, of all noise; seeds, decisions: (B,) uint32, each row's episode and number of the decision.

    Returns (B, Ta, Da) float32, normalised.
    """

    def sample(
        params: Any, frozen: Any, batch: Mapping[str, Any], seed: jax.Array, seeds: jax.Array, decisions: jax.Array
    ) -> jax.Array:
        key = jax.random.key(seed)

        def noise(seed: jax.Array, decision: jax.Array) -> dict[str, jax.Array]:
            own = jax.random.fold_in(jax.random.fold_in(key, seed), decision)
            return jax.tree.map(lambda x: x[0], system.noise(own, jnp.zeros(1, jnp.int32), system.acting))

        encoded = system.encode(frozen, batch)
        return system.sample(params, encoded, system.acting, jax.vmap(noise)(seeds, decisions))["action"]

    return sample


# Cached, so that policies of one system compile once.
@functools.lru_cache(maxsize=4)
def _compiled(system: System) -> Sample:
    return jax.jit(acting(system))


def chunk_from_the_present(window: WindowSpec, execute: int) -> slice:
    """Places in a window's actions of the `execute` ones that follow the newest observed frame.

    Raises:
        UserError: there are fewer.
    """
    action, present = window.action, max(window.obs)
    first = action.index(present) if present in action else 0
    ready = 0
    while first + ready < len(action) and action[first + ready] == present + ready:
        ready += 1
    if not 1 <= execute <= ready:
        expected = f"expected 1 to {ready}" if ready else "no number will do"
        raise UserError(
            f"execute={execute}: {expected}. The model was trained on config.data.window.action={action}, of which "
            f"{ready} follow each other step by step from the newest observed frame, {present}, on."
        )
    return slice(first, first + execute)
