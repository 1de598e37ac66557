"""The program of members that train together: their states stacked, data and frozen encoding once for all of them.

Members are runs that differ in scalars alone (`state.Hparams`). Every leaf of their state has a leading axis of
members, which lies over the mesh axis `sweep`; a batch is augmented and encoded once, its rows spread over all
devices, and each member then makes its own loss, gradients and update of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uwm_jax.parallel.accumulate import each_value_and_grad
from uwm_jax.parallel.compiling import compile_lowered
from uwm_jax.parallel.mesh import BATCH_AXES, SWEEP_AXIS, TENSOR_AXIS
from uwm_jax.systems.base import System
from uwm_jax.training.build import Program
from uwm_jax.training.patterns import join
from uwm_jax.training.state import TrainState
from uwm_jax.training.step import divide, finish, lower_for, weighted_loss

ALIVE = "alive"  # the metric (M,) that tells which members were finite up to and with a step


class SweepState(flax.struct.PyTreeNode):
    """The state of M members.

    Attributes:
      members: a `TrainState` whose leaves have a leading axis of M, but for `step` ().
      alive: (M,) bool; False for members whose loss or gradient became infinite or NaN: they stay as they are.
    """

    members: TrainState
    alive: jax.Array

    @property
    def step(self) -> jax.Array:
        return self.members.step


class SweepProgram:
    """M members on a mesh with the axis `sweep`.

    Args:
      program: of one member on that mesh.
      count: M.
    """

    def __init__(self, program: Program, count: int):
        self.program, self.count = program, count
        self.mesh, self.system = program.mesh, program.system

    @functools.cached_property
    def like(self) -> SweepState:
        """Shapes with shardings."""

        def stacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(self.mesh, PartitionSpec(SWEEP_AXIS, *x.sharding.spec))
            return jax.ShapeDtypeStruct((self.count, *x.shape), x.dtype, sharding=sharding)

        one = self.program.like
        members = jax.tree.map(stacked, one).replace(step=one.step)
        alive: Any = stacked(jax.ShapeDtypeStruct((), jnp.bool_, sharding=one.step.sharding))
        return SweepState(members, alive)

    def compile_step(self, frozen: Any) -> Callable[..., Any]:
        """`(state, frozen, batch) -> (state, metrics)`: as `Program.compile_step`, every metric with a leading axis of
        members; `ALIVE` besides."""
        return compile_lowered(self.mesh, self.lower_step(frozen, self.program.batch_like))

    def lower_step(self, frozen: Any, batch: Any) -> jax.stages.Lowered:
        """The step that `compile_step` compiles, lowered; `batch` as `Program.batch_like`."""
        step = make_sweep_step(self.program, self.program.config.sweep.members_at_once)
        return lower_for(self.mesh, self.program.rules, step, self.like, frozen, batch, updates_state=True)

    def empty(self) -> SweepState:
        """Zeros, all alive; `put` fills them."""
        shardings = jax.tree.map(lambda x: x.sharding, self.like)

        def make() -> SweepState:
            state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.like)
            return state.replace(alive=jnp.ones_like(state.alive))

        return jax.jit(make, out_shardings=shardings)()

    @functools.cached_property
    def put(self) -> Callable[[SweepState, int, TrainState, bool], SweepState]:
        """(state, i, state of one member as `Program.like`, whether it is alive) -> the state with it as member i."""

        def put(state: SweepState, i: jax.Array, one: TrainState, alive: jax.Array) -> SweepState:
            def set_one(x: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), i, 0)

            members = jax.tree.map(set_one, state.members.replace(step=()), one.replace(step=()))
            return SweepState(members.replace(step=one.step), set_one(state.alive, alive))

        shardings = jax.tree.map(lambda x: x.sharding, self.like)
        return jax.jit(put, out_shardings=shardings, donate_argnums=0)

    @functools.cached_property
    def take(self) -> Callable[[SweepState, int], TrainState]:
        """(state, i) -> the state of member i as `Program.like`, bit for bit; compiled when it is asked for."""
        return self._compile_take(lambda state: state)

    @functools.cached_property
    def take_evaluated(self) -> Callable[[SweepState, int], TrainState]:
        """As `take`, of `eval_params` alone; what else a state has is () there, but for `step`."""

        def part(state: TrainState) -> TrainState:
            averaged = state.ema_params is not None
            return state.replace(params=() if averaged else state.params, opt_state=(), hparams=())

        return self._compile_take(part)

    def _compile_take(self, part: Callable[[TrainState], TrainState]) -> Callable[[SweepState, int], TrainState]:
        shardings = jax.tree.map(lambda x: x.sharding, part(self.program.like))

        def take(state: SweepState, i: jax.Array) -> TrainState:
            members, layout = part(state.members).replace(step=()), shardings.replace(step=())
            one = jax.tree.map(lambda x, s: _take(self.mesh, x, i, s.spec), members, layout)
            return one.replace(step=state.step)

        program = jax.jit(take, out_shardings=shardings).lower(self.like, np.int32(0)).compile()
        return lambda state, i: program(state, np.int32(i))


def _take(mesh: Mesh, x: jax.Array, i: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x[i]`, of an array whose first axis lies over `sweep`, on all devices along it.

    The devices that hold it send its bits as integers, whose sum with zeros is exact for NaN and -0.0 too. Along the
    other axes of the mesh it stays cut as `spec` says.
    """
    if mesh.shape[SWEEP_AXIS] == 1:
        return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)

    def local(x: jax.Array, i: jax.Array) -> jax.Array:
        here = jax.lax.axis_index(SWEEP_AXIS) == i // len(x)
        mine = jax.lax.dynamic_index_in_dim(x, i % len(x), 0, keepdims=False)
        bits = jax.lax.bitcast_convert_type(mine, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return jax.lax.bitcast_convert_type(jax.lax.psum(jnp.where(here, bits, 0), SWEEP_AXIS), x.dtype)

    specs = (PartitionSpec(SWEEP_AXIS, *spec), PartitionSpec())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(x, i)


def make_sweep_step(
    program: Program, at_once: int
) -> Callable[[SweepState, Any, Mapping[str, jax.Array]], tuple[SweepState, dict[str, Any]]]:
    """`(state, frozen, batch) -> (state, metrics)`, to be compiled; `at_once` as `each_value_and_grad` takes it."""
    config, system, optimizer, mesh = program.config, program.system, program.optimizer, program.mesh

    def sweep_step(state: SweepState, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[SweepState, dict[str, Any]]:
        members, step = state.members, state.step
        data_key = jax.random.fold_in(jax.random.key(members.hparams.data_seed[0]), step)
        encoded = encode_once(system, mesh, frozen, dict(batch), data_key)
        shares = jax.vmap(lambda seed: system.shares(batch, _key(seed, step)))(members.hparams.seed)
        trained, still = divide(config, system, members.params)

        def loss(trained: Any, own: Any, rows: Any) -> Any:
            still, hparams, place = own
            encoded, row, shares = rows
            draws = system.draws(_key(hparams.seed, step), row)
            mine = {name: jnp.take(share, place, axis=1) for name, share in shares.items()}
            return weighted_loss(system, join(trained, still), hparams.weights, encoded, draws, mine)

        places = jnp.arange(len(state.alive))
        by_row = jax.tree.map(jnp.transpose, shares)
        (losses, sums), grads = each_value_and_grad(
            loss,
            trained,
            (still, members.hparams, places),
            (encoded, batch["row"], by_row),
            mesh=mesh,
            steps=config.accumulation_steps,
            at_once=at_once,
        )

        def update(one: TrainState, *made: Any) -> Any:
            new, metrics = finish(config, system, optimizer, one.replace(step=step), *made)
            return new.replace(step=()), metrics

        new, metrics = jax.vmap(update)(members.replace(step=()), losses, sums, grads, shares)
        alive = state.alive & jnp.isfinite(losses) & jnp.isfinite(metrics["grad_norm"].value)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        kept = jax.tree.map(keep, new, members.replace(step=()))
        return SweepState(kept.replace(step=step + 1), alive), metrics | {ALIVE: alive}

    return sweep_step


def _key(seed: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), step)


def encode_once(system: System, mesh: Mesh, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
    """`System.encode` of a whole batch, its rows spread over as many devices as divide them, then over (data, fsdp).

    Where the rows do not divide over `sweep` or `tensor`, what the codec encodes is spread over that axis.
    """
    if mesh.size == 1:
        return system.encode(frozen, batch, key)
    rows = len(batch["row"])
    axes = list(BATCH_AXES)
    for axis in (SWEEP_AXIS, TENSOR_AXIS):
        if rows % (math.prod(mesh.shape[a] for a in axes) * mesh.shape[axis]) == 0:
            axes.append(axis)
    spread = PartitionSpec(tuple(axes))
    encoded = jax.shard_map(
        system.encode,
        mesh=mesh,
        in_specs=(PartitionSpec(), spread, PartitionSpec()),
        out_specs=spread,
        axis_names=set(axes),
        check_vma=False,
    )(frozen, batch, key)
    return jax.lax.with_sharding_constraint(encoded, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
