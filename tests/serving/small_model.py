"""A model of numpy alone behind the server's classes: actions that tell what it was shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uwm_jax.actor import Actor
from uwm_jax.backend import Backend, Noise
from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.serving.batching import SIZES, Engine
from uwm_jax.serving.connections import Server
from uwm_jax.serving.contract import Contract
from uwm_jax.systems.base import Use

HORIZON, WIDTH, FRAME = 16, 3, (4, 5)
SCALE = {"state": (np.array([2.0, 2.0], np.float32), np.array([10.0, 10.0], np.float32))}


class StubBackend(Backend):
    """Its actions (B, 16, 3) are (oldest state, newest state, mean of the newest frame + noise); `inverse` tells
    whether it was given latents."""

    system, acting, can_promise, step, parameters = "stub", "policy", True, 7, "raw"
    uses = {
        "policy": Use(("action",)),
        "forward": Use(("next_obs",), ("action",)),
        "inverse": Use(("action",), ("next_obs",)),
    }

    def __init__(self, text_dim: int = 0):
        self.config = base()
        self.spec = DataSpec(
            WindowSpec.from_config(self.config.data.window),
            {"front": FRAME},
            {"state": 2},
            WIDTH,
            text_dim,
            Normalizer({**SCALE, "action": (np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32))}),
        )
        self.batches: list[int] = []

    def noise(self, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> Noise:
        rows = [np.random.default_rng((seed, int(s), int(d))).random() for s, d in zip(seeds, decisions, strict=True)]
        noise = np.array(rows, np.float32)[:, None]
        return {"action": noise, "next_obs": np.repeat(noise, 6, 1).reshape(-1, 1, 2, 1, 1, 3)}

    def sample(
        self, use: str, inputs: Mapping[str, np.ndarray], noise: Noise, promised: Any = None, **_: Any
    ) -> dict[str, np.ndarray]:
        states, frames = inputs["obs/state"], inputs["obs/front"]
        self.batches.append(len(states))
        if use == "forward":
            return {"next_obs/front": np.broadcast_to(frames[:, -1:], frames.shape).copy(), "next_obs_latent": states}
        if use == "inverse":
            latents = np.full((len(states), HORIZON, WIDTH), "next_obs_latent" in inputs, np.float32)
            return {"action": latents, "action_normalized": latents}
        shown = frames[:, -1].mean((1, 2, 3)) + noise["action"][:, 0]
        action = np.stack([states[:, 0, 0], states[:, -1, 0], shown], -1).astype(np.float32)
        action = np.repeat(action[:, None], HORIZON, 1)
        if promised is not None:
            action = np.where(np.asarray(promised.mask)[..., None], promised.action, action)
        return {"action": action, "action_normalized": action}

    def describe_sampling(self) -> dict[str, Any]:
        return {}


def make_contract(text_dim: int = 0, **options: Any) -> Contract:
    return Contract(Actor(StubBackend(text_dim), sizes=SIZES), **options)


def make_server(contract: Contract | None = None, **options: Any) -> Server:
    """On a free port of loopback, warm."""
    contract = contract or make_contract()
    server = Server(contract, Engine(contract.actor), port=0, **options)
    server.warm()
    return server


def observation(state: float = 10.0, pixel: int = 7, frames: int = 0) -> dict[str, np.ndarray]:
    """The inputs of a request, all frames and numbers equal; `frames` 0: single ones."""
    lead = (frames,) if frames else ()
    return {
        "obs/front": np.full((*lead, *FRAME, 3), pixel, np.uint8),
        "obs/state": np.full((*lead, 2), state, np.float32),
    }
