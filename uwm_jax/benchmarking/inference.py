"""A model of `benchmark_inference`: random weights, synthetic inputs, its uses in JAX, and its export for PyTorch."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax import codecs, files, systems, torch_bridge
from uwm_jax import config as config_lib
from uwm_jax.backend import Arrays, JaxBackend, answering
from uwm_jax.benchmarking.latency import JAX
from uwm_jax.benchmarking.torch_inference import GRAPHS, OFFICIAL
from uwm_jax.conversion.to_torch import describe
from uwm_jax.data.normalize import Normalizer
from uwm_jax.errors import UserError
from uwm_jax.synthetic import synthetic_arrays, synthetic_spec
from uwm_jax.systems.base import System
from uwm_jax.torch_bridge import layout, weights
from uwm_jax.torch_bridge.description import DESCRIPTION, PROGRAM, WEIGHTS

STD = 0.02  # of all parameters: none is zero, as those of a new network's heads are


class Model:
    """One observation's answers, from numpy arrays on the host to numpy arrays on the host.

    Frames come as uint8. What a use makes is actions in raw units, or latents of frames, which no codec decodes;
    latents stand for frames that it is given.

    Args:
      config: of the run.
      views: cameras, the first ones of the config.
      action_dim: columns of the actions.
      frame_size: (height, width) of the raw frames; None for the size that they are resized to.
      folder: an existing one, that gets the export; None for none.

    Raises:
      UserError: the config has fewer cameras, or does not fit.
    """

    def __init__(
        self,
        config: ConfigDict,
        views: int,
        action_dim: int,
        frame_size: tuple[int, int] | None = None,
        folder: Path | None = None,
    ):
        self.config = c = config.copy_and_resolve_references()
        if len(c.data.cameras) < views:
            raise UserError(f"--views={views}: config.data.cameras has {len(c.data.cameras)}: {c.data.cameras}.")
        c.data.cameras, c.data.latents = tuple(c.data.cameras[:views]), ""
        self._folder = folder
        rng = np.random.default_rng(0)
        spec = synthetic_spec(c, action_dim, frame_size)
        scales = {key: rng.uniform(0.5, 2, (2, width)) for key, width in {"action": action_dim, **spec.low_dim}.items()}
        normalizer = Normalizer({key: (x[0].astype(np.float32), x[1].astype(np.float32)) for key, x in scales.items()})
        self._spec, self._codec = dataclasses.replace(spec, normalizer=normalizer), codecs.from_config(c)
        self.system = self._system(c)
        reads_latents = "obs" in systems.get(c.system).latents
        self._frozen = synthetic_arrays(c, self._codec) if reads_latents else {}
        shapes = jax.eval_shape(self.system.init, jax.random.key(0))
        params = jax.tree.map(lambda s: STD * rng.standard_normal(s.shape, np.float32), shapes)
        if folder:
            tensors = layout.to_official(params, systems.official(c.system).entry_of(c))
            weights.write_weights(folder / WEIGHTS, dict(sorted(tensors.items())))
            (folder / PROGRAM).write_bytes((Path(torch_bridge.__file__).parent / PROGRAM).read_bytes())
            self._described = describe(self.system, tensors, 0, None)
        self._params = self.system.held(jax.tree.map(jnp.asarray, params))

    def _system(self, config: ConfigDict) -> System:
        return systems.make(config, self._spec, self._codec)

    def with_steps(self, steps: int) -> System:
        """The system with another number of network evaluations; 0 leaves it as it is. The export follows.

        Raises:
          UserError: the schedule does not have as many.
        """
        config = self.config.copy_and_resolve_references()
        if steps:
            config.diffusion.num_inference_steps = steps
            config_lib.validate(config)
        self.system = self._system(config)
        if self._folder:
            told = {"config": config.to_dict(), **systems.official(config.system).describe(self.system)}
            files.write_text(self._folder / DESCRIPTION, json.dumps(self._described | told))
        return self.system

    def inputs(self, use: str) -> Arrays:
        """What a use is given, one row, raw."""
        rng, asked = np.random.default_rng(1), self.system.uses[use]
        shape = {key: like.shape for key, like in self._spec.batch_like(1).items()}
        frames = {f"obs/{camera}" for camera in self._spec.cameras}
        found: Arrays = {}
        for key in shape:
            if key in frames:
                found[key] = rng.integers(0, 256, shape[key], np.uint8)
            elif key.startswith("obs/") or (key == "action" and "action" in asked.given):
                found[key] = rng.uniform(-1, 1, shape[key]).astype(np.float32)
        if "next_obs" in asked.given:
            found["next_obs_latent"] = self.noise(use)["next_obs"][::-1] / 3
        return found

    def noise(self, use: str) -> Arrays:
        """Where sampling starts."""
        drawn = self.system.noise(jax.random.key(2), jnp.zeros(1, jnp.int32), use)
        return {m: np.asarray(x) for m, x in drawn.items()}

    def caller(self, use: str) -> Callable[[], Arrays]:
        """Answers a use with its inputs; the first call compiles it."""
        inputs, noise = self.inputs(use), self.noise(use)
        if self.system.uses[use].makes == ("action",):
            backend = JaxBackend(self.system, self._params, self._frozen)
            return lambda: backend.sample(use, inputs, noise, actions_only=True)
        program = jax.jit(answering(self.system, (use,)))

        def call() -> Arrays:
            made = program(self._params, self._frozen, self._spec.normalized(inputs), {use: noise}, None)[use]
            out = {key: np.asarray(x) for key, x in made.items()}
            if "action" in out:
                out["action"] = np.asarray(self._spec.normalizer.unnormalize("action", out["action"]), np.float32)
            return out

        return call


def obstacle(side: str, config: ConfigDict, device: str) -> str:
    """Why a side cannot run here; "" if it can."""
    if side == JAX:
        return ""
    if device not in ("cpu", "gpu"):
        return f"PyTorch does not run on devices of kind {device!r} here"
    if side == GRAPHS and device != "gpu":
        return "CUDA graphs need an NVIDIA GPU"
    official = systems.get(config.system).official
    runs = official is not None and official.runs
    if side == OFFICIAL and config.system != "uwm":
        return f"there is no eager loop of a {config.system} network"
    if side != OFFICIAL and not runs:
        return f"uwm_torch.py does not run {config.system}"
    if (adaln := config.model.get("adaln", "official")) != "official":
        return f"config.model.adaln={adaln!r} is not in the official code"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'uwm-jax[torch]'"
    return ""
