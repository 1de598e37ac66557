"""The two clocks of a block of repetitions. Imports nothing, so that both sides of a comparison read the same ones."""

from __future__ import annotations

import time
from collections.abc import Callable


def block(repeat: Callable[[int], object], count: int) -> tuple[float, float]:
    """Seconds of one of `count` repetitions: on the clock, and of CPU, summed over the process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    repeat(count)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def calls(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls, on the clock."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds
