"""Bounds and the estimate of a step's time, made of facts about the compiled program and the constants of `chips`.

The lower bound is arithmetic about one compiled program: no step of this program is faster than about its products at
the chip's peak, the bytes of its schedule through the chip's memory, or what it sends over its links. Products are
three times those of the forward pass, of which the first layers need a little less; bytes count an operand in full that
a fusion reads in part. Another program of the same config can move less. The estimate is the compiler's own: the cycles
of its schedule, and the transfers that nothing is scheduled next to. Both are predicted; neither was run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from uwm_jax.parallel.collectives import DCN
from uwm_jax.planning.topology import Topology

DAY = 86_400.0


def times(facts: Mapping[str, Any], topology: Topology | None) -> dict[str, float | None]:
    """Seconds of a step: `step_seconds_lower_bound`, the largest of its parts `/{compute,memory,interconnect,dcn}`, and
    `step_seconds_estimate`, the sum of its parts `/{cycles,interconnect,dcn}`; None for what is not known.

    Args:
      facts: of `compiling`.
      topology: None for the devices of this machine, of which GPUs have the bound by compute alone.
    """
    ideal, moved, cycles = facts["seconds_at_peak"], facts["hbm_bytes"], facts["cycles"]
    bound: dict[str, float | None] = {
        "compute": None if ideal is None else ideal / facts["chips"],
        "memory": moved / topology.chip.hbm if topology and moved else None,
    }
    estimate: dict[str, float | None] = {"cycles": None}
    if topology:
        wire = {kind: _wire(facts, dcn=kind == DCN, waiting=False) for kind in ("interconnect", DCN)}
        waited = _wire(facts, dcn=False, waiting=True)
        bound |= {"interconnect": _over(wire["interconnect"], topology.ici), DCN: _over(wire[DCN], topology.chip.dcn)}
        estimate = {
            "cycles": cycles / topology.chip.clock if cycles else None,
            "interconnect": _over(waited, topology.ici),
            DCN: bound[DCN],
        }
    known = [x for x in bound.values() if x is not None]
    whole = None if None in estimate.values() else math.fsum(x or 0.0 for x in estimate.values())
    return {
        "step_seconds_lower_bound": max(known) if known else None,
        **{f"step_seconds_lower_bound/{name}": x for name, x in bound.items()},
        "step_seconds_estimate": whole,
        **{f"step_seconds_estimate/{name}": x for name, x in estimate.items()},
    }


def _over(moved: float, rate: float) -> float:
    return moved / rate if moved else 0.0


def _wire(facts: Mapping[str, Any], *, dcn: bool, waiting: bool) -> float:
    """Bytes that a chip sends in a step, between slices or within one; if `waiting`, while nothing else is done."""
    return math.fsum(
        c["sent_bytes"]
        for c in facts["collectives"]
        if (list(c["axes"]) == [DCN]) == dcn and not (waiting and c["asynchronous"])
    )


def outlook(
    seconds: float | None, *, rows: int, steps: int, chips: int, price: float | None
) -> dict[str, float | None]:
    """`samples_per_second`, `days` for all steps, and their `cost` at a price for a chip-hour."""
    if not seconds:
        return {"samples_per_second": None, "days": None, "cost": None}
    days = steps * seconds / DAY
    return {
        "samples_per_second": rows / seconds,
        "days": days,
        "cost": None if price is None else days * 24 * chips * price,
    }
