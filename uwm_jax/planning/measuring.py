"""Runs a compiled step on the devices of this machine, and measures its memory and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from uwm_jax import host_memory
from uwm_jax.planning.compiling import Facts, Prepared, memory_of, unused_bytes

STEPS = 3  # timed, after one that is not
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")  # Linux: writing 5 makes the resident memory of now the peak
_RESET = "5"


def measure(prepared: Prepared, step: Any) -> Facts:
    """Runs a step and what it is given, filled with one number.

    Args:
      step: what `prepared.lowered` was compiled to, for devices of this process.

    Returns:
      `planned_bytes` as the compiler planned them, next to `measured_bytes`: on CPUs those of all devices, and the
      growth of this process (None where the system does not tell it); on other devices those of one device, and the
      peak that it reports. `step_seconds`, the median of three.
    """
    mesh = prepared.program.mesh
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    fill = _filling((prepared.state, prepared.frozen, prepared.batch))
    host_memory.give_back()
    before = _reset_peak() if on_cpu else None
    state, frozen, batch = fill()
    state, _ = jax.block_until_ready(step(state, frozen, batch))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, frozen, batch))
        seconds.append(time.perf_counter() - start)
    # what the step does not read, such as the codec's decoder, lies in memory next to it
    planned = memory_of(step)["total"] + unused_bytes(step, prepared.frozen, prepared.batch)["frozen"]
    found: Facts = {"planned_bytes": planned * mesh.size if on_cpu else planned, "measured_bytes": None}
    if on_cpu:
        peak = _resident("VmHWM")
        found["measured_bytes"] = peak - before if before is not None and peak is not None else None
    else:
        stats = [device.memory_stats() or {} for device in mesh.local_devices]
        found["measured_bytes"] = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0) or None
    return {"measured": {**found, "step_seconds": statistics.median(seconds)}}


def _filling(shapes: Any) -> Callable[[], Any]:
    """A compiled function that makes arrays of these shapes and shardings."""

    def make() -> Any:
        return jax.tree.map(lambda x: jnp.full(x.shape, 0.01 if x.dtype == jnp.float32 else 0, x.dtype), shapes)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes)).lower().compile()


def _reset_peak() -> int | None:
    """The resident bytes of now, from which the peak counts on."""
    try:
        _CLEAR.write_text(_RESET)
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
