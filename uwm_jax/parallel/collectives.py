"""Collectives of a compiled program, their bytes and the mesh axes they run over, read from its optimised HLO text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from jax.sharding import AbstractMesh, Mesh

from uwm_jax.parallel import hlo_text, replica_groups
from uwm_jax.parallel.hlo_text import Array, Instruction, Module
from uwm_jax.parallel.mesh import DATA_AXIS

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
DCN = "dcn"  # the axis of transfers between slices, over the data-centre network

# What a chip sends, as a multiple of `Collective.bytes`, in a ring of n.
_RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array on one device: what a reduction or an exchange takes in, what a gather gives out.
      group: devices that take part together; None = all, or (for a permutation) pairs.
      times: how often a run of the program executes it (product of the surrounding loops' trip counts), or None in a
        loop whose trip count cannot be told.
      name: of the instruction.
      source: the `op_name` of its metadata: where in the traced function it comes from.
      axes: mesh axes that it runs over, in the mesh's order; ("dcn",) between slices; () where no mesh was given.
      sent: bytes that a device sends each time, in a ring: `bytes` times 2 (n - 1) / n for an all-reduce of n devices,
        1 for a permutation, (n - 1) / n for the others.
      asynchronous: whether other work of the program runs at the same time.
      activations: whether more of its bytes are of activations than of parameters or gradients. The number of elements
        of an array decides: parameters and gradients have as many as an array of the program's first argument
        (`args[0]`, the train state): as a device holds it, whole, cut along some of the mesh axes alone, or a layer of
        a stack. An activation that happens to have as many passes for one. Scalars decide nothing.
    """

    kind: str
    bytes: int
    group: int | None
    times: int | None
    name: str
    source: str
    axes: tuple[str, ...] = ()
    sent: int = 0
    asynchronous: bool = False
    activations: bool = False


def read(hlo: str, mesh: Mesh | AbstractMesh | None = None) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in the order of the text.

    An asynchronous pair counts once, and so do the pieces of one that TPUs fuse with other work. A fused
    all-reduce-scatter of TPUs is a reduce-scatter. What TPU slices exchange over the data-centre network (`send` and
    `recv` of the Megascale runtime) is the collective that it stands for.

    Args:
      mesh: of the devices that the program was compiled for.
    """
    reader = _Reader(hlo_text.parse(hlo), mesh)
    found: dict[tuple[str, ...], Collective] = {}
    for computation, instructions in reader.module.computations.items():
        for instruction in instructions.values() if reader.module.times[computation] else ():
            collective = reader.collective(computation, instruction)
            if collective is None:
                continue
            chain = re.search(r'\bchain_id="?(\w+)', instruction.attributes)
            key = ("chain", chain[1], collective.kind, collective.source) if chain else (computation, collective.name)
            other = found.get(key)
            if other is None or _or_infinite(collective.times) < _or_infinite(other.times):
                found[key] = collective
    return list(found.values())


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """{kind: bytes of one run of the program on one device}, of the kinds that occur.

    Raises ValueError for a collective in a loop of unknown length.
    """
    totals: dict[str, int] = collections.Counter()
    for c in found:
        if c.times is None:
            raise ValueError(f"{c.name} lies in a loop whose trip count the compiler does not know")
        totals[c.kind] += c.bytes * c.times
    return dict(totals)


def _or_infinite(times: int | None) -> float:
    return math.inf if times is None else times


class _Reader:
    """One program and the mesh that it was compiled for."""

    def __init__(self, module: Module, mesh: Mesh | AbstractMesh | None):
        self.module, self.mesh = module, mesh
        self.partitions = module.partitions or (mesh.size if mesh else 0)
        self.wrapped = {
            name
            for instructions in module.computations.values()
            for instruction in instructions.values()
            if instruction.operation == "async-start"
            for name in instruction.called
        }
        self.parameters = _parameter_sizes(module)

    def collective(self, computation: str, instruction: Instruction) -> Collective | None:
        """What an instruction sends; None where it sends nothing, or where the other one of a pair stands for it."""
        if instruction.operation == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
            return self._between_slices(computation, instruction)
        kind = instruction.operation.removesuffix("-done").removesuffix("-start")
        # of a pair, the end has the plain result, while the start may carry buffers of its own
        if kind not in KINDS or instruction.operation.endswith("-start"):
            return None
        instructions = self.module.computations[computation]
        is_pair = instruction.operation.endswith("-done")
        start = instructions[instruction.operands[0]] if is_pair else instruction
        if computation.startswith("all-reduce-scatter") and kind == "all-reduce":
            kind = "reduce-scatter"
        taken = [a for o in start.operands if o in instructions for a in hlo_text.arrays(instructions[o].shape)]
        whole = max(hlo_text.arrays(instruction.shape), taken, key=_bytes)
        groups = replica_groups.read(start.attributes)
        group = None if groups is None or kind == "collective-permute" else len(groups[0])
        together = group or self.partitions
        return Collective(
            kind=kind,
            bytes=_bytes(whole),
            group=group,
            times=self._times(computation),
            name=instruction.name,
            source=start.op_name,
            axes=self._axes(groups),
            sent=round(_bytes(whole) * _RING[kind](together)) if together else _bytes(whole),
            asynchronous=is_pair or "chain_id=" in start.attributes or computation in self.wrapped,
            activations=self._activations(whole),
        )

    def _between_slices(self, computation: str, send: Instruction) -> Collective:
        """The collective that a transfer to the Megascale runtime stands for."""
        instructions = self.module.computations[computation]
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
        slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', send.attributes)
        kind = _BETWEEN_SLICES[transfer[1]] if transfer else "collective-permute"
        group = len(slices[1].split(",")) if slices else None
        whole = hlo_text.arrays(instructions[send.operands[0]].shape)
        size = _bytes(whole) * (group or 1 if kind == "all-gather" else 1)
        return Collective(
            kind=kind,
            bytes=size,
            group=None if kind == "collective-permute" else group,
            times=self._times(computation),
            name=send.name,
            source=send.op_name,
            axes=(DCN,),
            sent=round(size * _RING[kind](group)) if group else size,
            asynchronous=True,
            # a gradient that the devices of a slice have scattered first
            activations=self._activations(whole, parts=self.partitions),
        )

    def _axes(self, groups: replica_groups.Groups | None) -> tuple[str, ...]:
        if self.mesh is None:
            return ()
        shape = dict(self.mesh.shape)
        shape[DATA_AXIS] //= self.mesh.size // self.partitions  # the numbers are of one slice, which has a part of it
        return replica_groups.axes(groups or (tuple(range(self.partitions)),), shape)

    def _times(self, computation: str) -> int | None:
        times = self.module.times[computation]
        return None if math.isinf(times) else int(times)

    def _activations(self, arrays: Sequence[Array], parts: int = 1) -> bool:
        """Whether more bytes are of activations than of parameters or gradients.

        Args:
          parts: a parameter may be cut further into as many parts, or into a divisor of it.
        """
        cuts = [n for n in range(1, parts + 1) if parts % n == 0]
        unknown = sum(
            a.bytes if not any(a.elements * n in self.parameters for n in cuts) else -a.bytes
            for a in arrays
            if a.elements > 1
        )
        return unknown > 0


_TILES = (8, 16, 128)  # rows of float32 and of bfloat16 in a TPU's tile, and its columns


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(a.bytes for a in arrays)


def _parameter_sizes(module: Module) -> frozenset[int]:
    """Elements of the parameters of a program (its first argument): as each device holds them, whole, cut along some of
    the mesh axes alone, and of a layer of those that are stacked, as in a sweep its members are, too. In gradients that
    are scattered, compilers pad what a device holds along a cut axis to whole tiles."""
    sizes: set[int] = set()
    for instruction in module.computations[module.entry].values():
        if instruction.operation != "parameter" or not instruction.op_name.startswith("args[0]"):
            continue
        (array, *_) = hlo_text.arrays(instruction.shape)
        tiles = re.search(r"sharding=\{devices=\[([\d,]+)\]", instruction.attributes)
        factors = [int(n) for n in tiles[1].split(",")][: len(array.dims)] if tiles else []
        cut = {array.elements}
        for held, factor in zip(array.dims, factors, strict=False):
            padded = {-(-held // tile) * tile for tile in _TILES} if factor > 1 else set()
            cut |= {elements // held * length for elements in cut for length in padded}
            cut |= {elements * factor for elements in cut}
        stacks = [math.prod(array.dims[:n]) for n in range(max(1, len(array.dims) - 1))]
        sizes |= cut | {elements // stacked for elements in cut for stacked in stacks[:3]}
    return frozenset(sizes)
