"""Optimised HLO text, as `compiled.as_text()` prints it: instructions, shapes, and how often each computation runs.

Written for the text of XLA's CPU, GPU and TPU compilers. Programs for TPUs do not say how often a loop runs, so that
trip counts are computed from a loop's condition, its step and its start.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

# name = shape operation(operands), attributes
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d\w*|c64|c128)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_PASSES_ON = ("copy", "bitcast", "convert", "reshape", "opt-barrier")  # operations that keep the value of a scalar


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape operation(arguments), attributes`.

    Attributes:
      shape: as printed, with layouts; a tuple's in parentheses.
      rest: all that follows the opening parenthesis of the arguments.
      is_root: whether its value is that of the computation.
    """

    name: str
    shape: str
    operation: str
    rest: str
    is_root: bool

    @functools.cached_property
    def _split(self) -> tuple[str, str]:
        depth = 1
        for match in re.finditer(r"[({\[)}\]]", self.rest):
            depth += 1 if match[0] in "({[" else -1
            if depth == 0:
                return self.rest[: match.start()], self.rest[match.end() :]
        return "", self.rest

    @property
    def argument(self) -> str:
        """The text between the parentheses: operands, or the value of a constant, or the number of a parameter."""
        return self._split[0]

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it takes."""
        if self.operation in ("constant", "parameter", "iota"):
            return ()
        plain = re.sub(r"[\[{(][^\[\](){}]*[\])}]", "", self.argument)  # shapes may be printed before the names
        plain = re.sub(r"[\[{(][^\[\](){}]*[\])}]", "", plain)  # tiles inside layouts
        return tuple(re.findall(r"([\w.\-]+)\s*(?:,|$)", re.sub(r"/\*.*?\*/", "", plain)))

    @property
    def attributes(self) -> str:
        """The text behind the arguments."""
        return self._split[1]

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [b.strip().lstrip("%") for b in branches.split(",")]
        return tuple(names)

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; "" where the compiler does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]  # by name, in the order of the text


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: {name: its instructions}.
      entry: name of the computation that a run of the program executes.
      partitions: devices that execute it together, of one slice; None where the text does not say.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int | None

    @functools.cached_property
    def times(self) -> dict[str, float]:
        """How often a run executes each computation: 0 where nothing calls it, infinite in a loop of unknown length."""
        callers: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
        for caller, instructions in self.computations.items():
            for instruction in instructions.values():
                if instruction.operation in ("async-update", "async-done"):
                    continue  # their start has called it
                loop = self.trips(caller, instruction) if instruction.operation == "while" else 1.0
                for name in instruction.called:
                    callers[name].append((caller, loop))
        times = {self.entry: 1.0}

        def count(name: str) -> float:
            if name not in times:
                times[name] = sum(loop * of for caller, loop in callers[name] if (of := count(caller)))
            return times[name]

        for name in self.computations:
            count(name)
        return times

    def trips(self, caller: str, loop: Instruction) -> float:
        """How often a `while` of the computation `caller` runs its body; infinite where that cannot be told."""
        if known := _TRIPS.search(loop.attributes):
            return float(known[1])
        condition, body = (re.search(rf"\b{word}=%?([\w.\-]+)", loop.attributes) for word in ("condition", "body"))
        if not condition or not body:
            return math.inf
        return _trips(self, caller, loop, condition[1], body[1])

    def root(self, computation: str) -> Instruction:
        """The instruction whose value is that of the computation."""
        return next(i for i in self.computations[computation].values() if i.is_root)


def parse(hlo: str) -> Module:
    """The program that `compiled.as_text()` printed."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", hlo, re.MULTILINE)
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current][match[2]] = Instruction(match[2], match[3], match[4], match[5], bool(match[1]))
    return Module(computations, entry, int(partitions[1]) if partitions else None)


# --- shapes ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: element type, sizes of its axes, and the layout as printed, such as `1,0:T(8,128)S(1)`."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bits(self) -> int:
        """Of an element."""
        return 8 if self.dtype == "pred" else int(m[0]) if (m := re.search(r"\d+", self.dtype)) else 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without padding."""
        return -(-self.bits * self.elements // 8)


def arrays(shape: str) -> list[Array]:
    """The arrays in a shape such as `(f32[8,16]{1,0:T(8,128)}, bf16[])`."""
    return [
        Array(dtype, tuple(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d), layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


# --- loops -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """`offset`, or element `index` of a computation's parameter (tuple) plus `offset`."""

    index: tuple[int, ...] | None  # (number of the parameter, element of it, ...)
    offset: int


def _scalar(module: Module, computation: str, name: str) -> _Scalar | None:
    """What an integer instruction computes, seen from the parameters of its computation; None for all else."""
    instruction = module.computations[computation].get(name)
    if instruction is None:
        return None

    def of(position: int) -> _Scalar | None:
        return _scalar(module, computation, instruction.operands[position])

    operation = instruction.operation
    if operation == "constant":
        return _Scalar(None, int(instruction.argument)) if re.fullmatch(r"-?\d+", instruction.argument) else None
    if operation == "parameter":
        return _Scalar((int(instruction.argument),), 0)
    if operation == "get-tuple-element":
        element = re.search(r"\bindex=(\d+)", instruction.attributes)
        return _element(module, computation, instruction.operands[0], int(element[1])) if element else None
    if operation in _PASSES_ON and len(instruction.operands) == 1:
        return of(0)
    if operation in ("add", "subtract"):
        a, b = of(0), of(1)
        if a and b and operation == "add" and a.index is None:
            a, b = b, a
        if a and b and b.index is None:
            return _Scalar(a.index, a.offset + (b.offset if operation == "add" else -b.offset))
        return None
    if operation in ("fusion", "call") and len(instruction.called) == 1:
        inner = instruction.called[0]
        return _from_caller(module, computation, instruction, _scalar(module, inner, module.root(inner).name))
    return None


def _from_caller(module: Module, computation: str, call: Instruction, value: _Scalar | None) -> _Scalar | None:
    """A value inside a called computation, seen from the parameters of the caller."""
    if value is None or value.index is None:
        return value
    if len(value.index) > 1:
        found = _element(module, computation, call.operands[value.index[0]], value.index[1])
    else:
        found = _scalar(module, computation, call.operands[value.index[0]])
    return found and _Scalar(found.index, found.offset + value.offset)


def _element(module: Module, computation: str, name: str, element: int) -> _Scalar | None:
    """Element `element` of a tuple."""
    source = module.computations[computation].get(name)
    if source is None:
        return None
    if source.operation == "tuple":
        return _scalar(module, computation, source.operands[element])
    if source.operation == "parameter":
        return _Scalar((int(source.argument), element), 0)
    if source.operation in _PASSES_ON:
        return _element(module, computation, source.operands[0], element)
    if source.operation == "fusion":
        inner = source.called[0]
        root = module.root(inner)
        if root.operation == "tuple":
            value = _scalar(module, inner, root.operands[element])
            return _from_caller(module, computation, source, value)
    return None


def _trips(module: Module, caller: str, loop: Instruction, condition: str, body: str) -> float:
    """Turns of a loop that counts an element of its tuple by a constant step and compares it with a constant."""
    compared = _comparison(module, condition)
    if compared is None:
        return math.inf
    direction, left, right = compared
    if left.index is None:
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)

    def start(value: _Scalar) -> _Scalar | None:
        if value.index is None:
            return value
        found = _element(module, caller, loop.operands[0], value.index[-1])
        return found and _Scalar(found.index, found.offset + value.offset)

    def step(value: _Scalar) -> int | None:
        if value.index is None:
            return 0
        found = _element(module, body, module.root(body).name, value.index[-1])
        return found.offset if found and found.index == (0, value.index[-1]) else None

    first, last = start(left), start(right)
    if first is None or last is None or first.index is not None or last.index is not None:
        return math.inf
    by = step(left)
    if not by or step(right) != 0:
        return math.inf
    distance = (last.offset - first.offset) * (1 if by > 0 else -1)
    if direction in ("LE", "GE"):
        distance += 1
    rising = direction in ("LT", "LE")
    if direction == "NE":
        return distance / abs(by) if distance >= 0 and distance % by == 0 else math.inf
    if direction == "EQ" or rising != (by > 0):
        return math.inf
    return float(max(0, -(-distance // abs(by))))


def _comparison(module: Module, condition: str) -> tuple[str, _Scalar, _Scalar] | None:
    """(direction, left, right) of the comparison that a loop's condition is."""
    root = module.root(condition)
    calls: list[tuple[str, Instruction]] = []
    computation = condition
    while root.operation in ("fusion", "call", "copy", "bitcast"):
        if root.called:
            calls.append((computation, root))
            computation = root.called[0]
            root = module.root(computation)
        else:
            root = module.computations[computation][root.operands[0]]
    direction = re.search(r"\bdirection=(\w+)", root.attributes)
    if root.operation != "compare" or not direction:
        return None
    sides = []
    for operand in root.operands:
        value = _scalar(module, computation, operand)
        for outside, call in reversed(calls):
            value = _from_caller(module, outside, call, value)
        if value is None:
            return None
        sides.append(value)
    return direction[1], sides[0], sides[1]
