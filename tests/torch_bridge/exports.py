"""Tiny models with random parameters as folders that `uwm_torch.load` takes, and what JAX makes of the same inputs."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tests.systems.small import SYSTEMS, small_config
from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.backend import JaxBackend, answering
from uwm_jax.conversion.to_torch import describe
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.robot import RobotActions
from uwm_jax.synthetic import synthetic_batch, synthetic_codec, synthetic_spec
from uwm_jax.systems.base import Promised, System
from uwm_jax.torch_bridge import layout, official_codecs

CAMERAS = {"b": (20, 24), "a": (14, 18)}  # raw (height, width); one axis of the first keeps its size
RESIZE, CROP = (20, 18), (16, 16)

# An arm whose seven numbers become ten: a pose relative to the present one, which no input of the network is.
ARM = {
    "parts": [
        {"columns": "action[:6]", "transform": "relative:pose[:6]:rpy", "width": 6},
        {"columns": "action[6:]", "transform": "gripper_inverted", "width": 1},
    ],
    "states": {"pose": 7},
}


@dataclasses.dataclass(frozen=True)
class Export:
    """A model of ours and the folder of its export."""

    system: System
    params: Any
    frozen: Any
    folder: Path

    def inputs(self, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Of every use, in raw units, with states that the robot's actions are relative to."""
        rng = np.random.default_rng(seed)
        spec = self.system.spec
        made = {}
        for key, x in synthetic_batch(self.system, rows).items():
            value = np.asarray(x)
            if value.dtype == np.uint8:
                value = rng.integers(0, 256, value.shape, np.uint8)
            elif value.dtype == np.float32:
                value = rng.uniform(-1, 1, value.shape).astype(np.float32)
            made[key] = value
        for key, width in (spec.robot() or RobotActions(())).states.items():
            made[f"obs/{key}"] = rng.uniform(-1, 1, (rows, len(spec.window.obs), width)).astype(np.float32)
        return {key: x for key, x in made.items() if key not in ("row", "action_mask")}

    def noise(self, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
        drawn = self.system.noise(jax.random.key(seed), jnp.arange(rows), self.system.acting)
        return {m: np.asarray(x) for m, x in drawn.items()}

    def answers(
        self,
        inputs: dict[str, np.ndarray],
        noise: dict[str, np.ndarray],
        uses: tuple[str, ...] = (),
        promised: tuple[np.ndarray, np.ndarray] | None = None,
        guided: bool = False,
    ) -> dict[str, dict[str, np.ndarray]]:
        """{use: JAX's answers under the keys of `uwm_torch`}, without uint8 frames."""
        system, uses = self.system, uses or tuple(self.system.uses)
        batch = system.spec.normalized({k: x for k, x in inputs.items() if k in system.spec.batch_like(1)})
        known = Promised(*promised) if promised else None
        run = _program(system, uses, guided)
        found = run(self.params, self.frozen, batch, {use: noise for use in uses}, known)
        results = {}
        for use, made in found.items():
            out = results[use] = {key: np.asarray(x) for key, x in made.items() if key != "frames"}
            if "action" in out:
                out["action_normalized"] = out["action"]
                out["action"] = system.spec.normalizer.unnormalize("action", out["action"])
            if "frames" in made:
                frames = np.asarray(made["frames"])
                out |= {f"next_obs_float/{camera}": frames[:, view] for view, camera in enumerate(system.cameras)}
        return results

    def backend(self) -> JaxBackend:
        act = jax.jit(answering(self.system, (self.system.acting,), actions_only=True))
        return JaxBackend(self.system, self.params, self.frozen, act=act)


@functools.cache
def _program(system: System, uses: tuple[str, ...], guided: bool) -> Any:
    answer = answering(system, uses, guided=guided)

    def run(params, frozen, batch, noise, promised):
        made = answer(params, frozen, batch, noise, promised)
        latents = {use: {k: x for k, x in out.items() if k == "next_obs_latent"} for use, out in made.items()}
        return {use: out | ({"frames": system.frames(frozen, latents[use])} if latents[use] else {})
                for use, out in made.items()}  # fmt: skip

    return jax.jit(run)


def export(folder: Path, variant: str, robot: dict[str, Any] | None = None, **fields: Any) -> Export:
    """Writes an export of a tiny model with two cameras, a state and normalisers.

    Args:
      variant: of `tests.systems.small`.
      robot: as `RobotActions.to_json` has it.
      fields: of the config, `model__codec__name="pixels"`.
    """
    config = small_config(variant)
    config.data.update(cameras=tuple(CAMERAS), low_dim=("state",), resize=RESIZE, crop=CROP)
    config_lib.apply_overrides(config, [(name.replace("__", "."), str(value)) for name, value in fields.items()])
    config_lib.validate(config)
    rng = np.random.default_rng(5)

    def pair(width: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.uniform(0.5, 2, width).astype(np.float32), rng.uniform(-1, 1, width).astype(np.float32)

    width = 10 if robot else 3
    spec = dataclasses.replace(
        synthetic_spec(config, width),
        cameras=dict(CAMERAS),
        low_dim={"state": 4},
        text_dim=5 if config.data.text else 0,
        normalizer=Normalizer({"action": pair(width), "state": pair(4)}),
        robots={"arm": RobotActions.from_json(robot)} if robot else {},
    )
    codec, frozen = synthetic_codec(config)
    system = systems.make(config, spec, codec)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.float32(0.2 * rng.normal(size=s.shape)), shapes)
    tensors = layout.to_official(params, systems.official(SYSTEMS[variant]).entry_of(config))
    tensors |= official_codecs.tensors(codec, frozen, folder)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(describe(system, tensors, 0, folder)))
    return Export(system, params, frozen, folder)
