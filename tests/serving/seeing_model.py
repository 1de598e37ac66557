"""A model of numpy whose actions depend on what each camera shows where, in which colour, and on a normalised state;
and episodes of a robot that it drove."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax.actor import Actor
from uwm_jax.backend import Backend, Noise
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.serving.contract import Request
from uwm_jax.serving.recording import Recording
from uwm_jax.systems.base import Use

SIZE, HORIZON, STEPS = (32, 32), 16, 40
NORMALIZER = Normalizer(
    {
        "state": (np.array([40.0], np.float32), np.array([300.0], np.float32)),
        "action": (np.array([20.0, 5.0, 100.0], np.float32), np.array([256.0, -3.0, 0.0], np.float32)),
    }
)
Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class SeeingBackend(Backend):
    """Chunks of equal actions: red at the top left of the left camera, blue at the bottom left of the right one, and
    the state with green at the top right of the left one."""

    system, acting, can_promise, step, parameters = "seeing", "policy", True, 3, "average"
    uses = {"policy": Use(("action",))}

    def __init__(self, normalizer: Normalizer = NORMALIZER, blind: bool = False):
        self.config = base()
        self.config.data.cameras, self.config.data.low_dim = ("left", "right"), ("state",)
        self.spec = DataSpec(
            WindowSpec.from_config(self.config.data.window),
            {"left": SIZE, "right": SIZE},
            {"state": 1},
            3,
            0,
            normalizer,
        )
        self._blind = blind

    def noise(self, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> Noise:
        rows = [
            np.random.default_rng((seed, int(s), int(d))).normal(size=3) for s, d in zip(seeds, decisions, strict=True)
        ]
        return {"action": np.array(rows, np.float32)}

    def sample(
        self, use: str, inputs: Mapping[str, np.ndarray], noise: Noise, *_: Any, **__: Any
    ) -> dict[str, np.ndarray]:
        left, right = (inputs[f"obs/{name}"][:, -1] / 127.5 - 1 for name in ("left", "right"))
        state = self.spec.normalizer.normalize("state", inputs["obs/state"][:, -1])[:, 0]
        made = [left[:, :16, :16, 0].mean((1, 2)), right[:, 16:, :16, 2].mean((1, 2))]
        made.append(0.5 * state + 0.5 * left[:, :16, 16:, 1].mean((1, 2)))
        normal = np.stack(made, -1) + (noise["action"] if self._blind else 0.01 * noise["action"])
        chunk = np.repeat(normal[:, None], HORIZON, 1).astype(np.float32)
        return {"action": np.asarray(self.spec.normalizer.unnormalize("action", chunk), np.float32)}

    def describe_sampling(self) -> dict[str, Any]:
        return {}


def drive(place: Path, change: Change = lambda seen: seen, episodes: int = 3) -> Path:
    """Records episodes of the model; `change` is done to what is recorded, after the model has seen it."""
    backend = SeeingBackend()
    actor = Actor(backend)
    kept = Recording(place, backend.spec, None, width=3)
    for episode in range(episodes):
        rng = np.random.default_rng(episode)
        phases, speeds = rng.uniform(0, 6.28, (2, 2, 2, 3)), rng.uniform(0.05, 0.2, (2, 2, 2, 3))
        for step in range(STEPS):
            colours = np.round(127.5 + 100 * np.sin(phases + speeds * step)).astype(np.uint8)
            frames = np.repeat(np.repeat(colours, 16, 1), 16, 2)
            seen = {"obs/left": frames[0], "obs/right": frames[1]}
            seen["obs/state"] = np.array([300 + 35 * np.sin(phases[0, 0, 0, 0] + 0.1 * step)], np.float32)
            noise = actor.noise(0, np.zeros(1), np.array([step]))
            chunk = actor.chunks({key: np.stack([x, x])[None] for key, x in seen.items()}, noise)
            kept.step(episode, Request("policy", change(seen)), chunk[0, 0])
        kept.end(episode)
    kept.close()
    return place


def without_normalizer() -> SeeingBackend:
    """The same network, served without its normaliser."""
    return SeeingBackend(Normalizer())


def of_frames(change: Callable[[np.ndarray], np.ndarray], *names: str) -> Change:
    """Changes the frames of these cameras."""
    return lambda seen: seen | {f"obs/{name}": np.ascontiguousarray(change(seen[f"obs/{name}"])) for name in names}
