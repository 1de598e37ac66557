"""The compiler's schedule of a TPU program: the cycles that it estimated, and the bytes that cross the chip's memory.

Both are read from `compiled.as_text()`. What runs inside a fusion belongs to the fusion; a loop's body counts as often
as the loop runs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from uwm_jax.parallel import hlo_text
from uwm_jax.parallel.collectives import KINDS
from uwm_jax.parallel.hlo_text import Array, Computation, Instruction, Module

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_RUNS_OTHERS = ("while", "conditional", "call", "async-start")
# Operations that move no array: they name one, or stand for others.
_MOVES_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "async-done", "async-update", *_RUNS_OTHERS),
    *("copy-done", "slice-done", "dynamic-slice-done", "send-done", "recv-done", "add-dependency"),
    *(f"{kind}-done" for kind in KINDS),
)
_SLICES = ("dynamic-slice", "slice", "gather")


def cycles(hlo: str) -> int:
    """The sum of the `estimated_cycles` that the TPU compiler wrote to the instructions of its schedule.

    Collectives and asynchronous copies have none: time in which a chip only waits for them is not in it. 0 for programs
    of other devices.

    Raises ValueError for a loop of unknown length.
    """
    total = 0
    for instruction, times, _ in _scheduled(hlo_text.parse(hlo)):
        if (found := _CYCLES.search(instruction.attributes)) and instruction.operation not in KINDS:
            total += times * int(found[1])
    return total


def hbm_bytes(hlo: str) -> int:
    """Bytes that the instructions of the schedule read from and write to the memory of a chip.

    Each operand and each result counts in full, padded to its tiles `T(...)`, unless its layout places it in another
    memory (`S(1)`, the vector memory, and other numbers). Of an operand that is only sliced the slices count, of an
    array that is updated in place the update. A collective that the compiler cut into pieces counts once.

    Raises ValueError for a loop of unknown length.
    """
    module = hlo_text.parse(hlo)
    return sum(times * _moved(module, names, i) for i, times, names in _scheduled(module))


def _scheduled(module: Module) -> Iterator[tuple[Instruction, int, Computation]]:
    """(instruction, how often it runs, its computation) of all instructions outside fusions."""
    reached, open_ = {module.entry}, [module.entry]
    while open_:
        name = open_.pop()
        instructions = module.computations[name]
        times = module.times[name]
        if math.isinf(times):
            raise ValueError(f"{name} lies in a loop whose trip count cannot be told")
        for instruction in instructions.values():
            yield instruction, int(times), instructions
            if instruction.operation in _RUNS_OTHERS:
                new = [called for called in instruction.called if called not in reached]
                reached.update(new)
                open_ += new


# --- bytes -----------------------------------------------------------------------------------------------


def padded_bytes(array: Array) -> int:
    """Bytes of an array padded to its tiles, as `bf16[9,100]{1,0:T(8,128)(2,1)}` lies in memory: 16 x 128 x 2."""
    order = re.match(r"[\d,]*", array.layout)
    minor_to_major = [int(n) for n in order[0].split(",") if n] if order else []
    dims = [array.dims[i] for i in reversed(minor_to_major)] if minor_to_major else list(array.dims)
    if tile := re.search(r":\w*T\(([\d,]+)\)", array.layout):
        sides = [int(n) for n in tile[1].split(",")]
        dims = [1] * (len(sides) - len(dims)) + dims
        for i, side in enumerate(sides, len(dims) - len(sides)):
            dims[i] = -(-dims[i] // side) * side
    return -(-math.prod(dims) * array.bits // 8)


def _in_hbm(array: Array) -> bool:
    return not re.search(r"S\([1-9]\d*\)", array.layout)


def _whole(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the chip's memory."""
    return sum(padded_bytes(array) for array in hlo_text.arrays(shape) if _in_hbm(array))


def _moved(module: Module, names: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction outside fusions reads and writes."""
    operation = instruction.operation
    if operation in _MOVES_NOTHING:
        return 0
    if operation == "fusion":
        return _moved_by_fusion(module, names, instruction)
    taken = [names[o].shape for o in instruction.operands if o in names]
    given = hlo_text.arrays(instruction.shape)
    if operation == "recv":  # (result, counter, token)
        given, taken = given[:1], []
    elif operation == "send":
        given = []
    elif operation == "copy-start":  # (copy, original, counter)
        given = given[:1]
    elif operation.endswith("-start"):  # (operands, results, counters), or the result alone
        operands = sum(len(hlo_text.arrays(shape)) for shape in taken)
        given = given[operands:] if len(given) > operands else given
    written = sum(padded_bytes(array) for array in given if _in_hbm(array))
    if operation == "dynamic-update-slice":
        update = sum(map(padded_bytes, hlo_text.arrays(taken[1])))
        return _whole(taken[1]) + min(written, update)
    if operation.removesuffix("-start") in _SLICES:
        return written + min(_whole(taken[0]), sum(map(padded_bytes, given[:1])))
    return written + sum(map(_whole, taken))


def _moved_by_fusion(module: Module, names: Computation, fusion: Instruction) -> int:
    body = fusion.called[0]
    root = module.root(body)
    results = root.operands if root.operation == "tuple" else (root.name,)
    given = hlo_text.arrays(fusion.shape)
    total = 0
    for number, operand in enumerate(fusion.operands):
        if operand in names and (whole := _whole(names[operand].shape)):
            total += min(whole, _read(module, body, number))
    if root.operation == "custom-call" and "AsyncCollectiveStart" in root.attributes:
        # the first of its results is the operand again
        return total + sum(padded_bytes(array) for array in given[1:] if _in_hbm(array))
    if len(results) != len(given):
        return total + _whole(fusion.shape)
    return total + sum(_written(module, body, n, a) for n, a in zip(results, given, strict=True) if _in_hbm(a))


def _read(module: Module, computation: str, number: int) -> int:
    """Bytes of parameter `number` that a fused computation reads."""
    instructions = module.computations[computation]
    parameter = next(i for i in instructions.values() if i.operation == "parameter" and int(i.argument) == number)
    total, open_ = 0, [parameter]
    while open_:
        value = open_.pop()
        whole = sum(map(padded_bytes, hlo_text.arrays(value.shape)))
        for user in instructions.values():
            if value.name not in user.operands:
                continue
            if user.operation in ("bitcast", "reshape") and not user.is_root:
                open_.append(user)
            elif user.operation in _SLICES and user.operands[0] == value.name:
                total += sum(map(padded_bytes, hlo_text.arrays(user.shape)))
            elif user.operation == "fusion":
                total += min(whole, _read(module, user.called[0], user.operands.index(value.name)))
            elif user.operation == "tuple" or _continues(instructions, user):
                pass  # handed on, neither read nor written here
            elif user.operation != "dynamic-update-slice" or user.operands[0] != value.name:
                total += whole
    return total


def _written(module: Module, computation: str, name: str, array: Array) -> int:
    """Bytes that a fused computation writes of one of its results.

    Args:
      name: of the instruction that makes the result; array: the result.
    """
    instructions = module.computations[computation]
    value = instructions[name]
    while value.operation in ("bitcast", "reshape"):
        value = instructions[value.operands[0]]
    if value.operation == "parameter" or _continues(instructions, value):
        return 0
    if value.operation == "fusion" and "(" not in value.shape:
        inner = value.called[0]
        return _written(module, inner, module.root(inner).name, array)
    if value.operation == "dynamic-update-slice":
        target = instructions[value.operands[0]]
        while target.operation in ("bitcast", "reshape"):
            target = instructions[target.operands[0]]
        if target.operation == "parameter":
            return sum(map(padded_bytes, hlo_text.arrays(instructions[value.operands[1]].shape)))
    return padded_bytes(array)


def _continues(instructions: Computation, instruction: Instruction) -> bool:
    """Whether it is a later piece of a collective that an earlier fusion has started."""
    if "AsyncCollectiveDone" in instruction.attributes:
        return True
    is_start = any("AsyncCollectiveStart" in i.attributes for i in instructions.values())
    return instruction.operation in KINDS and "chain_id=" in instruction.attributes and not is_start
