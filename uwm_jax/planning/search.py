"""A search for the mesh, remat policy, accumulation and batch size of a config on a topology.

Arithmetic comes first: what a chip holds of the state decides which meshes can fit at all, and the products and the
bytes that a mesh has to send rank them. The best few are compiled, in that order; one that does not fit makes way for
the same mesh with more rematerialisation, then with smaller parts of a batch. The compiler's estimate ranks the rest.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from uwm_jax.errors import UserError
from uwm_jax.models import target
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel import sharding
from uwm_jax.planning import compiling, topology
from uwm_jax.planning.children import Say
from uwm_jax.planning.rows import Question, Row, row, with_slices
from uwm_jax.planning.topology import Topology
from uwm_jax.training import flops
from uwm_jax.training.build import Program

REMAT = ("none", "dots", "full")
# Products of a trained part with a remat policy, over those without.
_RECOMPUTED = {"none": 1.0, "dots": 1.0, "full": 4 / 3}
# Seconds of trained encoders over those at the chip's peak: convolutions of 64 channels fill half of a TPU's lanes, and
# the compiler's estimate for DROID's ResNet-18 on v5e is 37.6 ms where the products alone take 3.0.
_OFF_PEAK = 12.5
_MOST_PARTS = 16  # of a batch
_MOST_TENSOR = 8


@dataclasses.dataclass(frozen=True, order=True)
class Candidate:
    """A way to run a config.

    Attributes:
      seconds: of a row, by arithmetic; the order of candidates.
      tensor, fsdp, data: the mesh.
      parts: of a batch.
      remat: an index into `REMAT`.
      batch: rows of a step.
      held: bytes of one chip that hold the state, the codec and the batches.
    """

    seconds: float
    tensor: int
    fsdp: int
    data: int
    parts: int
    remat: int
    batch: int
    held: int = dataclasses.field(compare=False, default=0)

    def applied(self, config: ConfigDict) -> ConfigDict:
        """A config with the choices of the candidate."""
        config = config.copy_and_resolve_references()
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = self.data, self.fsdp, self.tensor
        config.accumulation_steps, config.batch_size = self.parts, self.batch
        if "remat" in config.model:
            config.model.remat = REMAT[self.remat]
        return config

    @property
    def choice(self) -> tuple[int, ...]:
        """What tells candidates apart."""
        return self.data, self.fsdp, self.tensor, self.parts, self.remat, self.batch


def search(name: str, config: ConfigDict, question: Question, *, best: int, say: Say) -> list[Row]:
    """Rows of a topology, the best first and what does not fit last; at most `best` programs are compiled.

    Half of them are meshes with the config's own remat policy, the others are other policies on the best of these. A
    batch is in one part at first, whatever `config.accumulation_steps` is: parts cost time and save memory, and come
    where a program does not fit. Rows of another batch than the config's warn why.

    Raises:
      UserError: no mesh can fit by arithmetic.
    """
    place = topology.find(name)
    config = with_slices(config, place)
    in_one = config.copy_and_resolve_references()
    in_one.accumulation_steps = 1
    remark = ""
    try:
        mesh_lib.find_sizes(in_one, place.chips, "TPU")
    except UserError as e:  # the search goes on with other meshes, and the nearest batches
        remark = str(e)
        say(f"{name}: {remark}")
    waiting = _fitting(name, config, question, place)
    say(f"{name}: {len(waiting)} meshes fit by arithmetic; compiling at most {best} programs")
    heapq.heapify(waiting)
    known = {candidate.choice for candidate in waiting}
    found: list[tuple[Candidate, Row]] = []

    def add(others: Iterator[Candidate]) -> None:
        for other in others:
            if other.choice not in known:
                known.add(other.choice)
                heapq.heappush(waiting, other)

    while waiting and len(found) < best:
        candidate = heapq.heappop(waiting)
        made = row(name, candidate.applied(config), question, _telling(candidate, say))
        made["by_arithmetic"] = {"held_bytes": candidate.held, "step_seconds": candidate.seconds * candidate.batch}
        if remark and candidate.batch != config.batch_size:
            made["warnings"] = [remark, *made.get("warnings", [])]
        found.append((candidate, made))
        if made["fits"] is False:
            add(_smaller(candidate, config))
        if len(found) == -(-best // 2):
            first, there = min(found, key=lambda pair: _rank(pair[1]))
            add(_recomputing(first, config) if there["fits"] else iter(()))
    return sorted((made for _, made in found), key=_rank)


def _telling(candidate: Candidate, say: Say) -> Say:
    mesh = f"{candidate.data}x{candidate.fsdp}x{candidate.tensor}"
    return lambda line: say(f"{mesh}, {candidate.parts} part(s), remat {REMAT[candidate.remat]}: {line}")


def _rank(made: Row) -> tuple[bool, float]:
    """The estimated seconds of a row of the batch; what does not fit comes last."""
    seconds = made["step_seconds_estimate"]
    return not (made["fits"] and seconds), (seconds or math.inf) / made["batch_size"]


def _fitting(name: str, config: ConfigDict, question: Question, place: Topology) -> list[Candidate]:
    """Candidates whose state, codec and batches leave room on a chip.

    Raises:
      UserError: there are none.
    """
    every = list(_candidates(config, question, place))
    fitting = [c for c in every if c.held < place.chip.hbm_limit]
    if not fitting:
        raise UserError(
            f"--search: state, codec and batches take at least {min(c.held for c in every) / 1e9:.1f} GB of a chip of "
            f"{name}, which has {place.chip.hbm_limit / 1e9:.1f} GB: choose more chips, or larger ones."
        )
    return fitting


def _candidates(config: ConfigDict, question: Question, place: Topology) -> Iterator[Candidate]:
    """All meshes with the batches that they divide, in one part and with the config's remat policy."""
    with target.tracing_for("tpu", place.chips):
        one = Candidate(0.0, 1, 1, 1, 1, 0, config.batch_size).applied(config)
        program, frozen = compiling.program_of(one, question.data.spec, question.data.arrays, _mesh(1, 1, 1))
    work = _Work.of(program, place)
    remat = REMAT.index(config.model.get("remat", "none"))
    row_bytes = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in program.batch_like.values())
    for data, fsdp, tensor in _meshes(config, place):
        placed = sharding.state_sharding(_mesh(data, fsdp, tensor), program.rules, program.shapes)
        placed = mesh_lib.with_sharding(program.shapes, placed)
        state = sum(map(compiling.bytes_on_device, jax.tree.leaves((placed, frozen))))
        for batch in mesh_lib.nearest_batches(config.batch_size, data * fsdp):
            rows = batch // (data * fsdp)
            held = state + (1 + max(config.data.prefetch, 1)) * row_bytes * rows
            seconds = work.seconds(batch, data, fsdp, tensor, REMAT[remat]) / batch
            yield Candidate(seconds, tensor, fsdp, data, 1, remat, batch, held)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a step has to do, for arithmetic.

    Attributes:
      network, others, frozen: seconds of one chip at its peak for a row: of the network, of other trained parts, which
        chips along `tensor` repeat, and of the codec.
      parameters: their number.
      layer: bytes of the activations of a row between layers, in two bytes a number; layers: their number.
      ici: bytes a second that a chip can send.
    """

    network: float
    others: float
    frozen: float
    parameters: int
    layer: float
    layers: int
    ici: float

    @classmethod
    def of(cls, program: Program, place: Topology) -> _Work:
        sample, model = program.system.flops(), program.config.model
        network = sample.trained.get("network", 0.0)
        trained, kind = sum(sample.trained.values()), place.chip.kind

        def seconds(trained: float, frozen: float) -> float:
            return flops.seconds_at_peak(program.system, trained, frozen, kind) or 0.0

        width, layers = model.get("embed_dim", 0), model.get("depth", 0)
        # A token costs 24 width^2 in a layer: 8 for attention, 16 for an MLP four times as wide.
        return cls(
            network=seconds(3 * network, 0.0),
            others=seconds(3 * (trained - network), 0.0),
            frozen=seconds(0.0, sample.frozen),
            parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(program.shapes.params)),
            layer=2 * network / (24 * width * layers) if width and layers else 0.0,
            layers=layers,
            ici=place.ici,
        )

    def seconds(self, batch: int, data: int, fsdp: int, tensor: int, remat: str) -> float:
        """Seconds of a step, by which meshes are ranked: products, and bytes that a chip has to send.

        Gradients are summed over `data` in four bytes; over `fsdp` parameters are gathered for both passes and
        gradients scattered, in two; over `tensor` a layer sums its activations twice in each pass.
        """
        chips, rows = data * fsdp * tensor, batch / (data * fsdp)
        products = self.network * _RECOMPUTED[remat] + _OFF_PEAK * self.others * tensor + self.frozen
        over_data = 2 * (data - 1) / data * 4 * self.parameters / (fsdp * tensor)
        over_fsdp = 3 * (fsdp - 1) / fsdp * 2 * self.parameters / tensor
        over_tensor = 2 * (tensor - 1) / tensor * 4 * self.layers * rows * self.layer
        sent = over_data + over_fsdp + over_tensor
        return batch * products / chips + (sent / self.ici if sent else 0.0)


def _mesh(data: int, fsdp: int, tensor: int) -> Any:
    """A mesh without devices."""
    return AbstractMesh((data, fsdp, tensor), mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(mesh_lib.AXES))


def _meshes(config: ConfigDict, place: Topology) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) that use all chips, slices along `data` alone, heads divided by `tensor`."""
    heads = config.model.get("num_heads", 1)
    sizes = [n for n in range(1, place.chips + 1) if place.chips % n == 0]
    for fsdp, tensor in itertools.product(sizes, (n for n in sizes if n <= _MOST_TENSOR and heads % n == 0)):
        data, rest = divmod(place.chips, fsdp * tensor)
        if rest == 0 and data and data % place.slices == 0:
            yield data, fsdp, tensor


def _smaller(candidate: Candidate, config: ConfigDict) -> Iterator[Candidate]:
    """What follows a candidate that does not fit: rematerialisation, then twice as many parts of a batch."""
    if "remat" in config.model and candidate.remat + 1 < len(REMAT):
        yield dataclasses.replace(candidate, remat=candidate.remat + 1)
    parts = 2 * candidate.parts
    if parts <= _MOST_PARTS and candidate.batch % (candidate.data * candidate.fsdp * parts) == 0:
        yield dataclasses.replace(candidate, parts=parts)


def _recomputing(candidate: Candidate, config: ConfigDict) -> Iterator[Candidate]:
    """A candidate with the other remat policies, before all that wait."""
    for remat in range(len(REMAT)) if "remat" in config.model else ():
        yield dataclasses.replace(candidate, remat=remat, seconds=0.0)
