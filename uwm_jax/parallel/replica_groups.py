"""The devices that take part in a collective together, from the notations of HLO text, and the mesh axes they span.

Devices are numbered by their position in the mesh (row-major): that is the order in which jax hands them to XLA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))?(?:\s*\{([^}]*)\})?")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")


def read(attributes: str) -> Groups | None:
    """The groups of a collective, or the (source, target) pairs of a permutation; None for all devices together.

    Notations of `replica_groups`: lists `{{0,1},{2,3}}`; `[2,2]<=[4]` and `[2,2]<=[2,2]T(1,0)`, the numbers 0 to 3 as
    an array of the second shape, its axes permuted, in rows of the first shape; `mesh['a'=2,'b'=2] {'b'}`, a group
    along axis b of an array of devices, which are 0 to 3 or those of `device_ids=(...)`.

    Args:
      attributes: text of the instruction behind its arguments.
    """
    if pairs := _PAIRS.search(attributes):
        return _lists(pairs[1])
    if listed := _LISTS.search(attributes):
        return _lists(listed[1])
    if iota := _IOTA.search(attributes):
        return _rows(_iota(_integers(iota[2]), iota[3]).reshape(_integers(iota[1])))
    if named := _MESH.search(attributes):
        return _named(named[1], named[2], named[3])
    return None


def axes(groups: Groups, shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which devices of one group differ, in the order of the mesh.

    Args:
      groups: of positions in the mesh, as `read` returns them.
      shape: {axis: devices} of the mesh, or of one slice's part of it.
    """
    sizes = tuple(shape.values())
    used: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))  # (axes, devices)
        used |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(name for i, name in enumerate(shape) if i in used)


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _lists(text: str) -> Groups:
    return tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d,]*)\}", text))


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in ids.reshape(-1, ids.shape[-1]).tolist())


def _iota(dims: Sequence[int], permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_integers(permutation)) if permutation else ids


def _named(mesh: str, device_ids: str | None, used: str | None) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
    if device_ids is None:
        ids = np.arange(math.prod(sizes.values()))
    elif shaped := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids):
        ids = _iota(_integers(shaped[1]), shaped[2])
    else:
        ids = np.array(_integers(device_ids))
    # 'axis':(2)4 is a part of an axis: the middle one where the axis is seen as 2 x 4 x the rest
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _used(used, sizes)}
    shape: list[int] = []
    along: list[int] = []
    for name, whole in sizes.items():
        before, size = parts.get(name, (1, 1))
        along.append(len(shape) + 1)
        shape += [before, size, whole // (before * size)]
    ids = ids.reshape(shape)
    others = [i for i in range(len(shape)) if i not in along]
    return _rows(ids.transpose(others + along).reshape(-1, math.prod(ids.shape[i] for i in along)))


def _used(used: str | None, sizes: Iterable[str]) -> list[tuple[str, str, str]]:
    if used is None:
        return [(name, "", "") for name in sizes]
    return re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", used)
