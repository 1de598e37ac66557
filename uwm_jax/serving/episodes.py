"""The history of one connection where the server keeps it (`--stepwise`): single steps in, one action out of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from uwm_jax.serving.contract import TEXT, Arrays, Request


@dataclasses.dataclass(frozen=True)
class Episode:
    """The state of an episode; every step makes a new one, so that a step that fails changes nothing.

    Attributes:
      history: steps back from the present of each frame that the model sees, oldest first.
      execute: actions of a chunk that are taken.
      frames: {key: (longest history + 1, ...)}, oldest first; {} before the first step.
      chunk: (execute, Dr), of which the last `left` actions are still to be taken.
      decisions: chunks so far.
      seed: of the noise, the first request's.
    """

    history: Sequence[int]
    execute: int
    frames: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    chunk: np.ndarray | None = None
    left: int = 0
    decisions: int = 0
    seed: int = 0

    def seen(self, request: Request) -> Episode:
        """After a step's observation; the first one fills the whole history. `reset` starts over."""
        if request.reset or not self.frames:
            fresh = Episode(self.history, self.execute, seed=request.seed or 0)
            length = max(self.history) + 1
            frames = {key: np.repeat(x[None], length, axis=0) for key, x in request.inputs.items() if key != TEXT}
            return dataclasses.replace(fresh, frames=frames)
        frames = {key: np.concatenate([x[1:], request.inputs[key][None]]) for key, x in self.frames.items()}
        return dataclasses.replace(self, frames=frames)

    def inputs(self, request: Request) -> Arrays:
        """The model's inputs after `seen`: {`obs/<key>`: (To, ...)} and the text of the step."""
        places = [-1 - back for back in self.history]
        inputs = {key: frames[places] for key, frames in self.frames.items()}
        return inputs | {key: x for key, x in request.inputs.items() if key == TEXT}

    def planned(self, chunk: np.ndarray) -> Episode:
        """With a new chunk (at least `execute`, Dr), whose first action is for now."""
        taken = chunk[: self.execute]
        return dataclasses.replace(self, chunk=taken, left=self.execute, decisions=self.decisions + 1)

    def stepped(self) -> tuple[np.ndarray, Episode]:
        """The action for now, (1, Dr), and the episode after it."""
        assert self.chunk is not None and self.left
        at = self.execute - self.left
        return self.chunk[at : at + 1], dataclasses.replace(self, left=self.left - 1)
