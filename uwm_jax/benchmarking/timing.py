"""Wall time and CPU time of what a benchmark repeats, in blocks that alternate between ours and its counterpart."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

BLOCK_SECONDS = 0.2  # what is timed is repeated within a block until about this long
SETTLE_SECONDS = 0.05  # before a block: torch's idle threads (OpenMP) spin for 10 ms, which is not the other side's


@dataclasses.dataclass
class Runner:
    """What a row repeats: `call` starts one repetition and returns its results, which need not be there yet."""

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

    def block(self, repeat: Callable[[int], None], count: int) -> None:
        time.sleep(SETTLE_SECONDS)
        wall, cpu = time.perf_counter(), time.process_time()
        repeat(count)
        self.wall.append((time.perf_counter() - wall) / count)
        self.cpu.append((time.process_time() - cpu) / count)


@dataclasses.dataclass
class Timing:
    """The blocks of a row; `torch` is empty where it has no counterpart. `first` is the first call of ours."""

    runner: Runner
    first: float
    ours: Side
    torch: Side


def measure(runner: Runner, torch_call: Callable[[], Any] | None, blocks: int) -> Timing:
    """Warms up, then times blocks of ours and of torch in turns."""

    def torch_repeat(count: int) -> None:
        assert torch_call is not None
        for _ in range(count):
            torch_call()

    first = _seconds(runner.repeat, 1)
    timing = Timing(runner, first, Side(), Side())
    sides = [(runner.repeat, timing.ours)] + ([(torch_repeat, timing.torch)] if torch_call else [])
    if torch_call:
        torch_call()  # allocates its buffers
    counts = [max(1, min(100, math.ceil(BLOCK_SECONDS / _seconds(repeat, 1)))) for repeat, _ in sides]
    for _ in range(blocks):
        for (repeat, side), count in zip(sides, counts, strict=True):
            side.block(repeat, count)
    return timing


def _seconds(run: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start
