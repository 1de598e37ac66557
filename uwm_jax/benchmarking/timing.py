"""Wall time and CPU time of what a benchmark repeats, in blocks that alternate between ours and its counterpart."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from uwm_jax.benchmarking import clock

BLOCK_SECONDS = 0.2  # what is timed is repeated within a block until about this long
SETTLE_SECONDS = 0.05  # before a block: torch's idle threads (OpenMP) spin for 10 ms on the other's cores

Block = Callable[[int], tuple[float, float]]  # as `clock.block` of some repetitions


@dataclasses.dataclass
class Runner:
    """A row's program: `call` starts one repetition and returns its results, which need not be there yet."""

    call: Callable[[], Any]
    compile_seconds: float
    memory_bytes: float | None

    def repeat(self, count: int) -> None:
        result = None
        for _ in range(count):
            result = None  # as a loop drops its gradients: the memory of both would count
            result = self.call()
            # XLA's CPU client would run independent calls side by side.
            if jax.default_backend() == "cpu":
                jax.block_until_ready(result)
        jax.block_until_ready(result)


@dataclasses.dataclass
class Side:
    """Seconds of one repetition, a number per block: on the clock, and of CPU summed over the process's threads."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Timing:
    """The blocks of a row; `torch` is empty where it has no counterpart. `first` is the first call of ours."""

    runner: Runner
    first: float
    ours: Side
    torch: Side


def measure(runner: Runner, torch_block: Block | None, blocks: int) -> Timing:
    """Warms up, then times blocks of ours and of torch in turns."""
    ours_block = functools.partial(clock.block, runner.repeat)
    timing = Timing(runner, ours_block(1)[0], Side(), Side())
    sides = [(ours_block, timing.ours)] + ([(torch_block, timing.torch)] if torch_block else [])
    if torch_block:
        torch_block(1)  # allocates its buffers
    counts = [max(1, min(100, math.ceil(BLOCK_SECONDS / block(1)[0]))) for block, _ in sides]
    for _ in range(blocks):
        for (block, side), count in zip(sides, counts, strict=True):
            time.sleep(SETTLE_SECONDS)
            wall, cpu = block(count)
            side.wall.append(wall)
            side.cpu.append(cpu)
    return timing
