"""Topologies by the names under which TPUs are rented: `v5e-16`, `v5p-128`, `2xv5e-16`."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from uwm_jax.errors import UserError, suggest
from uwm_jax.planning.chips import CHIPS, Chip

HERE = "here"  # the devices of this machine

# The grids of chips that can be rented; v4 and v5p are named by their cores, two of each chip.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)),
    *((8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16)),
)
_NAME = re.compile(r"(?:(\d+)x)?(v\d\w?)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of a TPU pod.

    Attributes:
      name: `2xv5e-16`.
      chip: of which kind.
      shape: sides of the grid of chips of one slice.
      slices: how many of them the data-centre network connects.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def cores(self) -> int:
        return self.chips * self.chip.cores

    @property
    def ici(self) -> float:
        """Bytes a second that a chip sends over the interconnect, all its links together: the mean over the chips,
        since those at the edge of a grid that is no ring have fewer."""
        links = 0.0
        whole_cubes = len(self.shape) == 2 or all(side % self.chip.wraps_at == 0 for side in self.shape)
        for side in self.shape:
            ring = side >= self.chip.wraps_at and whole_cubes
            links += (2.0 if ring else 2 * (side - 1) / side) * (side > 1)
        return links * self.chip.link

    def description(self) -> dict[str, Any]:
        """Arguments of `jax.experimental.topologies.get_topology_desc`."""
        found: dict[str, Any] = {"topology_name": f"{self.chip.name}:{'x'.join(map(str, self.shape))}"}
        if self.slices > 1 or self.chip.cores > 1:
            found["num_slices"] = self.slices
        if self.chip.cores > 1:  # a device is a chip, not a core
            found |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
        if math.prod(self.shape) == 1:
            found["chips_per_host_bounds"] = (1, 1, 1)
        return found


def known() -> list[str]:
    """All names, without slices."""
    flat = [f"{chip}-{count}" for chip in ("v5e", "v6e") for count in _FLAT]
    return [*(f"{chip}-{2 * math.prod(shape)}" for chip in ("v4", "v5p") for shape in _CUBES), *flat]


def find(name: str) -> Topology:
    """The topology of a name.

    Raises:
      UserError: there is none of this name.
    """
    match = _NAME.fullmatch(name)
    plain = match[0].rpartition("x")[2] if match and match[1] else name
    if match is None or plain not in known() or int(match[1] or 1) < 1:
        raise UserError(
            f"--topology={name}: expected names such as {', '.join(known())}, of several slices such as 2xv5e-16, or "
            f"{HERE}, the devices of this machine; v4 and v5p are named by cores, two a chip.{suggest(plain, known())}"
        )
    chip, count = CHIPS[match[2]], int(match[3])
    shapes = {2 * math.prod(shape): shape for shape in _CUBES} if chip.cores > 1 else _FLAT
    return Topology(name, chip, shapes[count], int(match[1] or 1))
