"""The step of a run, compiled for a topology, and facts about it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from uwm_jax import codecs
from uwm_jax import config as config_lib
from uwm_jax.data.held_out import windows_like
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import UserError
from uwm_jax.evaluation import in_training
from uwm_jax.models import target
from uwm_jax.parallel import collectives
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.compiling import compile_lowered
from uwm_jax.planning import schedule
from uwm_jax.sweeps.program import SweepProgram
from uwm_jax.training import cached_latents, flops
from uwm_jax.training.build import Program, build
from uwm_jax.training.patterns import split
from uwm_jax.training.state import TrainState

Facts = dict[str, Any]

NO_EVALUATION: Facts = {"evaluation": None, "evaluation_failure": None, "evaluation_failure_kind": None}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A step before it is compiled.

    Attributes:
      program: of the run, or of one member of a sweep.
      state: shapes of what the step changes, with shardings: a `TrainState`, or the `SweepState` of `members`.
      frozen: shapes of the codec's arrays, with shardings.
      batch: as `Program.batch_like`.
      lowered: the step.
    """

    program: Program
    state: Any
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    lowered: jax.stages.Lowered
    members: int = 0


def prepare(request: Mapping[str, Any]) -> Prepared:
    """The step of a run, lowered.

    Args:
      request: `config` and `spec`, as JSON has them; `arrays`, the shapes of a fitted codec's arrays, or None;
        `members` of a sweep that train in one program, 0 for a run; `description` of a TPU topology, None for the
        devices of this process.

    Raises:
      UserError: the config does not fit the data, the devices, or the evaluations in training.
    """
    config = config_lib.from_dict(request["config"], "--config")
    in_training.check_config(config)
    members = request["members"]
    mesh = mesh_lib.make_mesh(config, _devices(request["description"]), members)
    with _traced_for(mesh):
        program, frozen = program_of(config, DataSpec.from_json(request["spec"]), request["arrays"], mesh)
        batch = program.batch_like
        if not members:
            return Prepared(program, program.like, frozen, batch, program.lower_step(frozen, batch))
        sweep = SweepProgram(program, members)
        return Prepared(program, sweep.like, frozen, batch, sweep.lower_step(frozen, batch), members)


def compiled(mesh: Mesh, lowered: jax.stages.Lowered) -> Any:
    """A lowered program, compiled.

    Raises:
      MemoryError: the compiler's verdict that it does not fit into the devices' memory.
    """
    with _verdict():
        return compile_lowered(mesh, lowered)


def facts_before(prepared: Prepared) -> Facts:
    """Facts about a step that need no compiler: devices, arrays and operations."""
    program = prepared.program
    return {
        **_about_devices(program.mesh),
        **_about_arrays(prepared),
        **_about_flops(program, prepared.members or 1),
    }


def facts_of(prepared: Prepared, step: Any) -> Facts:
    """Facts about a step; `step` is what `prepared.lowered` was compiled to."""
    program, frozen, batch = prepared.program, prepared.frozen, prepared.batch
    return {
        **facts_before(prepared),
        **about_program(step.as_text(), program.mesh),
        "memory": memory_of(step),
        "metrics_bytes": _metrics_bytes(prepared),
        "unused_bytes": unused_bytes(step, frozen, batch),
        "lowered_sha256": hashlib.sha256(prepared.lowered.as_text().encode()).hexdigest(),
    }


def evaluations(prepared: Prepared) -> Facts:
    """What the programs of evaluations in training need next to the state, the codec and the batches: the bytes of the
    largest, and those of the code of all; or why there are none: the compiler's verdict that one of them does not fit,
    a missing package, an error of their own, with the kinds of failures of `rows`. The facts of the step stay."""
    program, frozen = prepared.program, prepared.frozen
    data = cast(RunData, WithoutData(program.system.spec))
    try:
        with _traced_for(program.mesh), _verdict():
            programs = in_training.InTraining(program, data, frozen, command=(), draw=lambda *_: {}).programs
    except MemoryError as e:
        return _failed("memory", verdict(str(e))["message"])
    except UserError as e:
        return _failed("config", str(e))
    except Exception as e:
        return _failed("process", f"{type(e).__name__}: {e}")
    peak = "peak" if program.mesh.devices.flat[0].platform == "tpu" else "total"
    own = [memory_of(p)[peak] - _shared_bytes(p, program.like.eval_params, frozen) for p in programs]
    code = sum(memory_of(p)["code"] for p in programs)
    return NO_EVALUATION | {"evaluation": {"peak": max(own), "code": code} if programs else None}


def _failed(kind: str, message: str) -> Facts:
    return NO_EVALUATION | {"evaluation_failure_kind": kind, "evaluation_failure": message}


class WithoutData:
    """What evaluations in training ask of `RunData` before they run: shapes."""

    sources: Mapping[str, Any] = {}

    def __init__(self, spec: DataSpec):
        self.spec = spec

    def held_out(self, num_windows: int) -> Any:
        return _Windows(self.spec, num_windows)


class _Windows:
    """Shapes of held-out windows; there are none to be read."""

    def __init__(self, spec: DataSpec, count: int):
        self.spec, self._count = spec, count
        self.episodes = np.zeros((count,), np.int64)

    def __len__(self) -> int:
        return self._count

    def batch_like(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        return windows_like(self.spec, rows)

    def batches(self, rows: int) -> Iterator[Any]:
        return iter(())


def _shared_bytes(program: Any, params: Any, frozen: Any) -> int:
    """Bytes on one device of the parameters and the codec's arrays that an evaluation's program reads."""
    shared = {jax.tree.structure(params), jax.tree.structure(frozen)}
    total = 0
    for avals, shardings in zip(program.in_avals[0], program.input_shardings[0], strict=True):
        if jax.tree.structure(avals) in shared:
            pairs = zip(jax.tree.leaves(avals), _with_none(shardings), strict=True)
            total += sum(_size(x.shape, x.dtype, s) for x, s in pairs if s is not None)
    return total


@contextlib.contextmanager
def _verdict() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise MemoryError(str(e)) from e


def _traced_for(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    return target.tracing_for(mesh.devices.flat[0].platform, mesh.size)


def program_of(
    config: Any, spec: DataSpec, arrays: Mapping[str, Any] | None, mesh: Mesh
) -> tuple[Program, dict[str, Any]]:
    """The program that a run of a config builds, and shapes of its codec's arrays, which lie whole on every device."""
    kind = codecs.of_config(config)
    if kind is not None and arrays is not None:
        frozen: Any = {name: jax.ShapeDtypeStruct(tuple(shape), np.float32) for name, shape in arrays.items()}
        codec: codecs.Codec | None = kind.from_arrays(frozen)
    else:
        codec = usual = codecs.from_config(config)
        views, crop = len(config.data.cameras), config.data.crop
        frozen = {} if usual is None else jax.eval_shape(lambda: usual.synthetic_arrays(views, *crop))
    frozen = mesh_lib.with_sharding(frozen, mesh_lib.replicated(mesh))
    return build(config, cached_latents.with_latents(config, spec, codec), codec, mesh), frozen


def _devices(description: Mapping[str, Any] | None) -> list[Any]:
    if description is None:
        return jax.devices()
    options: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in description.items()}
    return list(topologies.get_topology_desc(platform="tpu", **options).devices)


# --- facts -------------------------------------------------------------------------------------------


def memory_of(compiled: Any) -> dict[str, int]:
    """The compiler's plan of one device's memory, in bytes: its parts, their `total` (what is aliased counts once), and
    the `peak`, which TPUs' compilers reckon with what of it is alive at a time, and that of CPUs without temporaries.
    """
    plan = compiled.memory_analysis()
    arguments, outputs = plan.argument_size_in_bytes, plan.output_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "code": plan.generated_code_size_in_bytes,
        "total": arguments + outputs - plan.alias_size_in_bytes + plan.temp_size_in_bytes,
        "peak": plan.peak_memory_in_bytes,
    }


def _about_devices(mesh: Mesh) -> Facts:
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "limit_bytes": limit_of(device) if isinstance(device, jax.Device) and device.platform == "gpu" else None,
    }


def _about_arrays(prepared: Prepared) -> Facts:
    """Bytes on one device, of all members of a sweep, and numbers of parameters, of one."""
    program = prepared.program
    state: TrainState = prepared.state.members if prepared.members else prepared.state
    shapes, config = program.shapes, program.config
    trained, _ = split(shapes.params, (*config.optimizer.freeze, *program.system.tree.untrained))
    count = {"parameters": shapes.params, "trained_parameters": trained}
    parts = {
        "parameters": state.params,
        "average": state.ema_params,
        "optimizer": state.opt_state,
        "counters": (state.step, state.hparams),
        "frozen": prepared.frozen,
        "batch": prepared.batch,
    }
    return {
        "members": prepared.members,
        **{name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in count.items()},
        "bytes": {name: sum(map(bytes_on_device, jax.tree.leaves(tree))) for name, tree in parts.items()},
    }


def bytes_on_device(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of the part of an array that one device holds."""
    return _size(x.shape, x.dtype, x.sharding)


def _size(shape: tuple[int, ...], dtype: Any, sharding: Any) -> int:
    return math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize


def _with_none(shardings: Any) -> list[Any]:
    """The leaves of shardings of a program's inputs; None for inputs that it is not given."""
    return jax.tree.leaves(shardings, is_leaf=lambda x: x is None)


def _metrics_bytes(prepared: Prepared) -> int:
    """Bytes of the sums over rows that are reduced over `data` together with the gradients: the loss, its parts, and a
    sum and a count of each bucket (`training.step`)."""
    _, metrics = prepared.lowered.out_info
    losses = [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]
    parts = [name for name in losses if name in prepared.program.config.loss.weights]
    return 4 * (1 + len(parts) + 2 * (len(losses) - len(parts)))


def unused_bytes(compiled: Any, frozen: Any, batch: Any) -> dict[str, int]:
    """Bytes on one device of the inputs that the program is not given, because it does not read them."""
    _, of_frozen, of_batch = compiled.input_shardings[0]

    def dropped(tree: Any, shardings: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), _with_none(shardings), strict=True)
        return sum(bytes_on_device(x) for x, sharding in pairs if sharding is None)

    return {"frozen": dropped(frozen, of_frozen), "batch": dropped(batch, of_batch)}


def about_program(text: str, mesh: Mesh) -> Facts:
    """Collectives of a step, equal ones put together, the cycles that the compiler expects, and the bytes that its
    schedule moves through a chip's memory; None, and `schedule_failure` says why, where a loop's length cannot be told.
    Collectives in such a loop are counted once and say so."""
    together: dict[tuple[Any, ...], list[int]] = {}
    for c in collectives.read(text, mesh):
        key = (c.kind, c.axes, c.asynchronous, c.activations, c.source, c.times is None)
        sums = together.setdefault(key, [0, 0, 0])
        for i, value in enumerate((c.bytes, c.sent, 1)):
            sums[i] += value * (c.times or 1)
    names = ("kind", "axes", "asynchronous", "activations", "source", "in_unknown_loop")
    found = [
        {
            **dict(zip(names, key, strict=True)),
            **dict(zip(("bytes", "sent_bytes", "times"), sums, strict=True)),
        }
        for key, sums in sorted(together.items(), key=lambda item: -item[1][1])
    ]
    cycles = moved = failure = None
    if mesh.devices.flat[0].platform == "tpu":
        try:
            cycles, moved = schedule.cycles(text), schedule.hbm_bytes(text)
        except ValueError as e:
            failure = str(e)
    return {"collectives": found, "cycles": cycles, "hbm_bytes": moved, "schedule_failure": failure}


def limit_of(device: Any) -> int | None:
    """Bytes of a device's memory that a process may use, where the device tells."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _about_flops(program: Program, members: int) -> Facts:
    """Analytic operations of a step of all devices, and the seconds that one device would take for them at its peak."""
    rows, sample = program.config.batch_size, program.system.flops()
    trained, frozen = members * rows * (sample.training - sample.frozen), rows * sample.frozen
    kind = program.mesh.devices.flat[0].device_kind
    return {
        "flops": {"trained": trained, "frozen": frozen},
        "seconds_at_peak": flops.seconds_at_peak(program.system, trained, frozen, kind),
    }


_VERDICTS = (  # with two sizes: of what the program needs, and of what there is
    re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm[^\n]*", re.IGNORECASE),
    re.compile(
        r"the total memory required for HLO temporaries \(([\d.]+[KMGT]?)\) exceeds [^\n]*\(([\d.]+[KMGT]?)\)[^\n]*"
    ),
)


def verdict(message: str) -> Facts:
    """The compiler's verdict that a program does not fit, read from its message: its sentence, `peak_bytes`, or
    `temporary_bytes` where it speaks of these alone, and `limit_bytes`, as far as it names them."""
    for pattern, name in zip(_VERDICTS, ("peak_bytes", "temporary_bytes"), strict=True):
        if found := pattern.search(message):
            needed, limit = map(_bytes, found.groups())
            return {"message": " ".join(found[0].split()), name: needed, "limit_bytes": limit}
    return {"message": message.strip().splitlines()[0]}


def _bytes(text: str) -> int:
    """The bytes of a text such as `15.75G`."""
    unit = text[-1] if text[-1] in "KMGT" else ""
    return int(float(text.removesuffix(unit)) * 2 ** (10 * " KMGT".index(unit or " ")))
