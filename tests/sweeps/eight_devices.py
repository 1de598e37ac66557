"""Trains four members alone and in one program on several meshes of eight simulated devices, for `test_program`.

Run as a program of its own, because the number of devices is fixed when jax starts:

    python -m tests.sweeps.eight_devices OUTPUT.json
"""

from __future__ import annotations

import json
import math
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["NPROC"] = "32"  # XLA's threads: with few cores' 8, all may wait for devices that have none to run on

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.systems.meshes import formula
from tests.systems.small import small_config
from uwm_jax import synthetic
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.mesh import DATA_AXIS, SWEEP_AXIS
from uwm_jax.sweeps.members import Member, make_members
from uwm_jax.sweeps.program import ALIVE, SweepProgram, _take
from uwm_jax.training import state as state_lib
from uwm_jax.training.build import Program, build

STEPS, ROWS = 20, 8
OVERRIDES = [
    {"loss.weights.action": 1.0, "seed": 0},
    {"loss.weights.action": 5.0, "seed": 1},
    {"optimizer.learning_rate": 3e-4, "seed": 1},
    {"loss.weights.next_obs": 0.0, "seed": 2},
]
# name: (sweep, data, fsdp, tensor), accumulation steps, members at once
MESHES = {
    "one device": ((1, 1, 1, 1), 1, 3),
    "4x2x1x1": ((4, 2, 1, 1), 1, 0),
    "2x2x2x1": ((2, 2, 2, 1), 2, 1),
    "1x4x1x2": ((1, 4, 1, 2), 1, 0),
}
OTHERS = ("dp", "gr1")  # with two members each


def members(variant: str = "uwm") -> list[Member]:
    config = small_config(variant)
    config.batch_size = ROWS
    config.data.cameras, config.data.low_dim = ("left", "right"), ("state",)
    config.optimizer.ema_decay, config.optimizer.clip_norm = 0.9, 1.0
    config.optimizer.eps = 1e-5  # the usual one makes whole steps of gradients that are zero but for rounding
    parts = {f"loss.weights.{name}" for name in config.loss.weights}
    return make_members(
        config, [{k: v for k, v in x.items() if not k.startswith("loss.") or k in parts} for x in OVERRIDES]
    )


def on_mesh(member: Member, sizes: tuple[int, ...], accumulation_steps: int, count: int) -> tuple[Program, dict]:
    config = member.config.copy_and_resolve_references()
    config.accumulation_steps = accumulation_steps
    config.sweep.devices, config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    mesh = mesh_lib.make_mesh(config, jax.devices()[: math.prod(sizes)], count)
    codec, frozen = synthetic.synthetic_codec(config)
    spec = synthetic.synthetic_spec(config, action_dim=5, frame_size=(20, 18))
    return build(config, spec, codec, mesh), jax.device_put(frozen, mesh_lib.replicated(mesh))


def batch_of(program: Program) -> dict:
    batch = synthetic.synthetic_batch(program.system, ROWS)
    batch["action_mask"] = batch["row"] % 5 != 3  # a row without actions
    return jax.device_put(batch, mesh_lib.batch_sharding(program.mesh))


def fresh(program: Program, member: Member):
    """Formula parameters: at initialisation AdaLN and heads are zero, and hide what happens before them."""
    untrained = program.system.tree.untrained
    state = state_lib.create(member.config, formula(program.shapes.params), program.optimizer, untrained)
    return program.system.held(jax.device_put(state, program.shardings))


def numbers(metrics: dict) -> dict[str, list]:
    shown = {name: x for name, x in metrics.items() if name.startswith(("loss", "grad_norm"))}
    return {name: np.asarray(jax.tree.leaves(x)[0]).tolist() for name, x in shown.items()}


def alone(all_members: list[Member], steps: int = STEPS) -> list[list[dict]]:
    program, frozen = on_mesh(all_members[0], (1, 1, 1, 1), 1, 0)
    batch, step = batch_of(program), program.compile_step(frozen)
    found: list[list[dict]] = []
    for member in all_members:
        state = fresh(program, member)
        found.append([])
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            found[-1].append(numbers(metrics))
    return found


def together(
    all_members: list[Member], sizes: tuple[int, ...], accumulation_steps: int, at_once: int, steps: int = STEPS
) -> dict:
    count = len(all_members)
    program, frozen = on_mesh(all_members[0], sizes, accumulation_steps, count)
    program.config.sweep.members_at_once = at_once
    sweep = SweepProgram(program, count)
    state, batch, step = sweep.empty(), batch_of(program), sweep.compile_step(frozen)
    exact = True
    for i, member in enumerate(all_members):
        one = fresh(program, member)
        state = sweep.put(state, i, one, True)
        exact &= same(one, sweep.take(state, i))
    found = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        assert np.asarray(metrics.pop(ALIVE)).all()
        found.append(numbers(metrics))
    for i in range(count):
        one = sweep.take(state, i)
        stacked = state.members.replace(step=())
        exact &= same(one.replace(step=()), jax.tree.map(lambda x, i=i: np.asarray(x)[i], stacked))
    return {"metrics": found, "exact": bool(exact), "frozen": freezes(sweep, step, state, frozen, batch)}


def freezes(sweep: SweepProgram, step, state, frozen, batch) -> dict[str, bool]:
    """What becomes in two steps of a member with a parameter that is not a number, and of the others."""
    last = sweep.count - 1
    before = [sweep.take(state, i) for i in range(sweep.count)]
    leaves, structure = jax.tree.flatten(before[last].params)
    poisoned = before[last].replace(params=jax.tree.unflatten(structure, [leaves[0] + np.nan, *leaves[1:]]))

    def two_steps(one, alive: bool = True) -> tuple[list, list[list[bool]]]:
        nonlocal state
        told = []
        for i, member in enumerate([*before[:-1], one]):
            state = sweep.put(state, i, member, alive or i < last)
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
            told.append(np.asarray(metrics[ALIVE]).tolist())
        return [sweep.take(state, i).replace(step=()) for i in range(sweep.count)], told

    healthy, _ = two_steps(before[last])
    frozen_one, told = two_steps(poisoned)
    finite_again, still = two_steps(before[last], alive=False)
    expected = [[True] * last + [False]] * 2
    return {
        "it is told from the first step on": told == expected,
        "it stays as it was": same(poisoned.replace(step=()), frozen_one[last]),
        "the others train as if it were healthy": same(healthy[:last], frozen_one[:last]),
        "the others train": not same(before[0].params, healthy[0].params),
        "it is not revived when it is finite again": still == expected
        and same(before[last].replace(step=()), finite_again[last]),
    }


def operations(all_members: list[Member], count: int) -> tuple[float, float]:
    """Of the step of some of the members on one device, and of encoding a batch alone: both as they are lowered."""
    program, frozen = on_mesh(all_members[0], (1, 1, 1, 1), 1, count)
    batch = batch_of(program)
    encode = jax.jit(lambda frozen, batch: program.system.encode(frozen, batch, jax.random.key(0)))
    lowered = SweepProgram(program, count).lower_step(frozen, program.batch_like), encode.lower(frozen, batch)
    return tuple(one.cost_analysis()["flops"] for one in lowered)


def bits_stay() -> bool:
    """Whether what is taken out of an array over `sweep` and `data` has its bits: NaN of all kinds, -0.0, 16 bits."""
    mesh = jax.make_mesh((4, 2), (SWEEP_AXIS, DATA_AXIS))
    for dtype, words in (("float32", [0x7FC00001, 0xFFC12345, 1 << 31, 0x7F800000]), ("bfloat16", [0x7FC1, 1 << 15])):
        unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
        stacked = np.stack([np.roll(np.array(words + words, unsigned), i) for i in range(8)]).view(dtype)
        x = jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(SWEEP_AXIS, DATA_AXIS)))
        take = jax.jit(lambda x, i: _take(mesh, x, i, PartitionSpec(DATA_AXIS)))
        if not all(same(take(x, i), stacked[i]) for i in range(8)):
            return False
    return True


def same(one, other) -> bool:
    """Whether two trees are equal bit for bit."""
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


if __name__ == "__main__":
    trained = members()
    results = {"alone": alone(trained)}
    results |= {name: together(trained, *MESHES[name]) for name in sys.argv[2:] or MESHES}
    if not sys.argv[2:]:
        for variant in OTHERS:
            others = members(variant)[:2]
            results[variant] = together(others, (2, 2, 1, 1), 1, 1, steps=3) | {"alone": alone(others, steps=3)}
        counted = [operations(trained, count) for count in (1, 2)]
        results |= {"flops": [step for step, _ in counted], "codec_flops": counted[0][1], "bits": bits_stay()}
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
