"""The probe of an export: inputs, noise, and what JAX makes of them, so that any program can be held against JAX.

Arrays of `probe.npz`: `inputs/<key>` with the keys and raw units of `sample`'s inputs, `noise/<modality>`, and for each
use `<use>/<key>` with the keys of `sample`'s outputs. JAX computes them in float32, whatever the run trained in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax import systems
from uwm_jax.backend import JaxBackend
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.evaluation.data import open_raw
from uwm_jax.files import Place
from uwm_jax.systems.base import System

ROWS = 2
USE = 1e-4  # largest difference to JAX in float32, in normalised units


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe.

    Attributes:
      arrays: of `probe.npz`.
      source: where its inputs are from, in words.
      why: the data could not be used, in words; "" where it was.
    """

    arrays: Mapping[str, np.ndarray]
    source: str
    why: str = ""

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values())))

    def describe(self) -> dict[str, Any]:
        return {"rows": self.rows, "source": self.source, "dtype": "float32", "largest_difference": USE}


def needs_codec(system: System, use: str) -> bool:
    """Whether a use encodes or decodes frames with the system's codec."""
    asked = system.uses[use]
    return system.codec is not None and "next_obs" in (*asked.makes, *asked.given)


def make(system: System, params: Any, frozen: Any, uses: Sequence[str], workdir: Place, step: int) -> Probe:
    """Runs the uses on a few held-out windows of the run, or on synthetic ones where its data is not at hand."""
    why = ""
    try:
        inputs, source = held_out_inputs(system, workdir, step), "held-out windows of the run"
    except (UserError, RunError, OSError) as e:
        inputs, source, why = synthetic_inputs(system), "synthetic", re.split(r"\.\s", str(e))[0]
    given = {m for use in uses for m in system.uses[use].given}
    inputs = {key: x for key, x in inputs.items() if key.partition("/")[0] in ("obs", *given)}
    exact = in_float32(system)
    backend = JaxBackend(exact, params, frozen, step=step)
    rows = jnp.arange(ROWS)
    noise = {m: np.asarray(x) for use in uses for m, x in exact.noise(jax.random.key(0), rows, use).items()}
    arrays = {f"inputs/{key}": x for key, x in inputs.items()} | {f"noise/{m}": x for m, x in noise.items()}
    for use, made in backend.answers(uses, inputs, dict.fromkeys(uses, noise)).items():
        arrays |= {f"{use}/{key}": np.asarray(x) for key, x in made.items()}
    if bad := sorted(key for key, x in arrays.items() if not np.isfinite(x).all()):
        warn(f"the probe's outputs {', '.join(bad)} are not finite. Check the checkpoint's parameters.")
    return Probe(arrays, source, why)


def in_float32(system: System) -> System:
    """The same system, whose networks compute in float32."""
    config = system.config.copy_and_resolve_references()
    config.model.dtype = "float32"
    return systems.make(config, system.spec, system.codec)


def held_out_inputs(system: System, workdir: Place, step: int) -> dict[str, np.ndarray]:
    """`ROWS` held-out windows of a run in raw units, evenly spread.

    Raises:
      UserError: its data is not there, is another, is not known to be its own, or holds nothing out.
    """
    data = open_raw(system, workdir, step)
    try:
        if data.own is not True:
            raise UserError("the checkpoint does not know its data, such as a converted one")
        windows = data.evaluated.held_out(ROWS, whole=data.whole)
        if len(windows) < ROWS:
            raise UserError(f"there are fewer than {ROWS} held-out windows")
        batch = windows.batch(0, ROWS)
    finally:
        data.evaluated.close()
    return {key: batch[key] for key in windows.spec.batch_like(1) if key not in ("action_mask", "row")}


def synthetic_inputs(system: System) -> dict[str, np.ndarray]:
    """`ROWS` windows of smooth frames, and of actions and low-dimensional values within the normaliser's range."""
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {}
    for key, like in system.spec.batch_like(ROWS).items():
        if like.dtype == np.uint8:
            batch[key] = smooth_frames(rng, like.shape)
        elif key not in ("action_mask", "row"):
            batch[key] = rng.uniform(-1, 1, like.shape).astype(np.float32)
    normalizer = system.spec.normalizer
    keys = {"action": "action"} | {f"obs/{key}": key for key in system.spec.low_dim}
    return {
        key: np.asarray(normalizer.unnormalize(keys[key], x), np.float32) if key in keys else x
        for key, x in batch.items()
    }


def smooth_frames(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Frames (..., H, W, 3) uint8 of a few waves in each colour."""
    *lead, height, width, _ = shape
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[:, None]
    down, across, phase = rng.uniform(-9, 9, (3, *lead, 1, 1, 3))
    return np.round(127.5 + 120 * np.sin(down * y + across * x + phase)).astype(np.uint8)
