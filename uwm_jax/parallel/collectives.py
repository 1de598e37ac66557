"""Collectives of a compiled program and their bytes, read from its optimised HLO text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

# name = shape operation(operands), attributes
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d\w*|c64|c128)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array on one device: what a reduction or an exchange takes in, what a gather gives out.
      group: devices that take part together; None = all, or (for a permutation) pairs.
      times: how often a run of the program executes it (product of the surrounding loops' trip counts), or None in a
        loop whose trip count the compiler does not know.
      name: of the instruction.
      source: the `op_name` of its metadata: where in the traced function it comes from.
    """

    kind: str
    bytes: int
    group: int | None
    times: int | None
    name: str
    source: str


def read(hlo: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in the order of the text.

    An asynchronous pair counts once. A fused all-reduce-scatter of TPUs is a reduce-scatter.
    """
    computations, entry = _parse(hlo)
    times = _times(computations, entry)
    found = []
    for computation, instructions in computations.items():
        shapes = {name: shape for name, shape, _, _ in instructions}
        for name, shape, operation, rest in instructions:
            kind = operation.removesuffix("-done").removesuffix("-start")
            # of a pair, the end has the plain result, while the start may carry buffers of its own
            if kind not in KINDS or operation.endswith("-start") or not times.get(computation, 0):
                continue
            if operation.endswith("-done"):
                (start,) = _operands(rest)
                rest = next(i[3] for i in instructions if i[0] == start)
            taken = sum(_size(shapes[o]) for o in _operands(rest) if o in shapes)
            if computation.startswith("all-reduce-scatter") and kind == "all-reduce":
                kind = "reduce-scatter"
            source = re.search(r'op_name="([^"]*)"', rest)
            count = times[computation]
            found.append(
                Collective(
                    kind=kind,
                    bytes=max(_size(shape), taken),
                    group=_group(rest),
                    times=None if math.isinf(count) else int(count),
                    name=name,
                    source=source[1] if source else "",
                )
            )
    return found


def _operands(rest: str) -> list[str]:
    """Names in the argument list that `rest` begins with; shapes, which may be printed before them, are skipped."""
    depth = 1
    for end, char in enumerate(rest):
        depth += (char in "({[") - (char in ")}]")
        if depth == 0:
            return re.findall(r"([\w.\-]+)\s*(?:,|$)", re.sub(r"[\[{(][^\[\](){}]*[\])}]", "", rest[:end]))
    return []


def _group(rest: str) -> int | None:
    """Devices in a replica group, in any of the three notations: lists, `[groups,size]<=[...]`, named mesh axes."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:\s*\{([^}]*)\})?", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        # 'axis':(1)2 is a part of an axis, of size 2
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2]) if named[2] else [(a, "") for a in sizes]
        return math.prod(int(part) if part else sizes[axis] for axis, part in used)
    return None


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


_Instruction = tuple[str, str, str, str]  # name, shape, operation, the rest of the line


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append((match[1], match[2], match[3], match[4]))
    return computations, entry


def _times(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, float]:
    """How often each computation that is reachable from the entry runs; infinite in loops of unknown length."""
    callers: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for caller, instructions in computations.items():
        for _, _, operation, rest in instructions:
            trips = _TRIPS.search(rest)
            loop = (float(trips[1]) if trips else math.inf) if operation == "while" else 1.0
            called = [] if operation in ("async-update", "async-done") else _CALLED.findall(rest)
            for branches in _BRANCHES.findall(rest):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            for name in called:
                callers[name].append((caller, loop))
    times = {entry: 1.0}

    def count(name: str) -> float:
        if name not in times:
            times[name] = sum(loop * of for caller, loop in callers[name] if (of := count(caller)))
        return times[name]

    for name in computations:
        count(name)
    return times


def _size(shape: str) -> int:
    """Bytes of all arrays in a shape such as `(f32[8,16]{1,0}, bf16[])`."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(m[0]) if (m := re.search(r"\d+", dtype)) else 0
        elements = math.prod(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d)
        total += -(-bits * elements // 8)
    return total
