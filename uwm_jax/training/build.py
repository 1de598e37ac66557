"""The program of a run, made of (config, data, codec, mesh), shapes first: nothing is allocated before it is known
where it lives.

The trainer, benchmarks and all else that needs the real step call `build` and compile what they use.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uwm_jax import systems
from uwm_jax.codecs import Codec
from uwm_jax.data.spec import DataSpec
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel import sharding
from uwm_jax.parallel.compiling import compile_lowered
from uwm_jax.parallel.sharding import Rules
from uwm_jax.systems.base import System
from uwm_jax.training import state as state_lib
from uwm_jax.training.state import TrainState
from uwm_jax.training.step import compile_for, lower_for, make_train_step

INIT_STREAM = 2**31 - 1  # folded into the seed for the parameters; no step has this number


@dataclasses.dataclass(frozen=True)
class Program:
    """A run before it has arrays.

    Attributes:
      system: the model.
      optimizer: without its learning rate, as `state.make_optimizer`.
      mesh, rules: of the devices, and which array lies where.
      shapes: a `TrainState` of `jax.ShapeDtypeStruct`s with shardings, blocks stacked, as checkpoints have it.
      batch_like: {key: shape with sharding} of a global batch.
    """

    system: System
    optimizer: optax.GradientTransformation
    mesh: Mesh
    rules: Rules
    shapes: TrainState
    batch_like: dict[str, jax.ShapeDtypeStruct]

    @property
    def config(self) -> ConfigDict:
        return self.system.config

    @property
    def shardings(self) -> TrainState:
        """The sharding of each array of `shapes`."""
        return jax.tree.map(lambda x: x.sharding, self.shapes)

    @functools.cached_property
    def like(self) -> TrainState:
        """`shapes` in the form that the step takes (`System.held`)."""
        return self.system.held(self.shapes)

    def compile_init(self) -> Callable[..., TrainState]:
        """A function that makes the fresh state of a seed (by default `config.seed`), as `shapes`, each array where it
        lies."""
        seed = np.uint32(self.config.seed)
        make = functools.partial(_fresh, self.config, self.system, self.optimizer)
        program = jax.jit(make, out_shardings=self.shardings).lower(seed).compile()
        return lambda of=seed: program(np.uint32(of))

    def compile_step(self, frozen: Any) -> Callable[..., Any]:
        """The compiled train step, `(state, frozen, batch) -> (state, metrics)`, which reuses the state's buffers.

        Args:
          frozen: arrays, or shapes with shardings, of the codec.
        """
        return compile_lowered(self.mesh, self.lower_step(frozen, self.batch_like))

    def lower_step(self, frozen: Any, batch: Any) -> jax.stages.Lowered:
        """The step that `compile_step` compiles, lowered; `batch` as `batch_like`."""
        step = make_train_step(self.config, self.system, self.optimizer, self.mesh)
        return lower_for(self.mesh, self.rules, step, self.like, frozen, batch, updates_state=True)

    def compile(self, function: Callable[..., Any], *inputs: Any, updates_state: bool = False) -> Any:
        """Any function of arrays, compiled for the mesh as `step.compile_for` does."""
        return compile_for(self.mesh, self.rules, function, *inputs, updates_state=updates_state)

    def table(self) -> str:
        """The parameters by sharding rule, for people."""
        return sharding.table(self.mesh, self.rules, self.shapes, self.shardings)


def build(config: ConfigDict, spec: DataSpec, codec: Codec | None, mesh: Mesh) -> Program:
    """The program of a run.

    Args:
      config: validated.
      spec: of its training batches, with the normaliser that it trains with. The system's own is of frames, which is
        what evaluations and policies give it.
      codec: between frames and latents; None for systems without one.
      mesh: of its devices.

    Raises:
      UserError: config and data do not fit each other, or a table of sharding rules is malformed.
    """
    frames = dataclasses.replace(spec, cached=None)
    system, optimizer = systems.make(config, frames, codec), state_lib.make_optimizer(config)
    rules = rules_of(system)
    make = functools.partial(_fresh, config, system, optimizer)
    shapes = jax.eval_shape(make, np.uint32(config.seed))
    shapes = mesh_lib.with_sharding(shapes, sharding.state_sharding(mesh, rules, shapes))
    batch_like = mesh_lib.with_sharding(spec.batch_like(config.batch_size), mesh_lib.batch_sharding(mesh))
    return Program(system, optimizer, mesh, rules, shapes, batch_like)


def rules_of(system: System) -> Rules:
    """The sharding rules of a system: its own table, or the one that its config names."""
    return sharding.load_rules(system.config.mesh.rules, system.config.system, system.tree.mesh_rules)


def _fresh(config: ConfigDict, system: System, optimizer: optax.GradientTransformation, seed: jax.Array) -> TrainState:
    key = jax.random.fold_in(jax.random.key(seed), INIT_STREAM)
    return state_lib.create(config, system.init(key), optimizer, system.tree.untrained)
