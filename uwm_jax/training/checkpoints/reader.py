"""One finished checkpoint on disk: read piece by piece, and compared with what was saved.

Files can be cut short or change after they were written, and most of such damage would restore without an error.
So every checkpoint carries, in its `assets`, a digest of each array and of each JSON item. The digest of an array
depends on its values and their positions alone, not on how it is spread over devices: it is taken from the arrays
when saving and again after restoring, on any mesh.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from uwm_jax.errors import RunError, UserError
from uwm_jax.files import Place
from uwm_jax.parallel import distributed
from uwm_jax.reading import again, cause_of, reason_of
from uwm_jax.training.checkpoints.steps import folder_of

# Signs that reading failed for another reason than what the files hold: such a checkpoint is left where it is.
_PASSING = (
    *("permission", "unauthenticated", "forbidden", "credentials", "401"),
    *("resource_exhausted", "out of memory", "too many open files", "unavailable", "timed out"),
)

_SMALL_BYTES = 2**16  # arrays up to this size are fetched faster than a program for their shape is compiled

_Value = TypeVar("_Value")

_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32"}  # by bytes; the state of a run holds no wider numbers


class CorruptCheckpoint(UserError):
    """A checkpoint that is incomplete, cannot be read, or differs from what was saved."""


class CheckpointReader:
    """A checkpoint `<directory>/<step>`; its properties are read once and verified.

    Reading raises CorruptCheckpoint for a damaged piece, UserError for one that does not fit, and RunError where
    reading failed for a reason that may pass (permissions, memory).
    """

    def __init__(self, directory: Place, step: int):
        self.step = step
        self.workdir = directory.parent
        self._directory = directory

    @functools.cached_property
    def path(self) -> Place:
        """The folder of its items."""
        return folder_of(self._directory, self.step)

    @functools.cached_property
    def items(self) -> frozenset[str]:
        """The names of the items that it holds."""
        found = _reading(self.path, lambda: frozenset(p.name for p in self.path.iterdir() if p.is_dir()))
        if "assets" not in found:
            raise CorruptCheckpoint(f"{self.path / 'assets'} is missing")
        return found

    @functools.cached_property
    def assets(self) -> dict[str, Any]:
        """The assets of `make_assets`, with the `digests` of all items (absent in checkpoints of early versions)."""
        assets = self._json("assets")
        if not isinstance(assets, dict) or not {"config", "data_spec"} <= assets.keys():
            raise CorruptCheckpoint(f"{self.path / 'assets'} is not what was saved")
        digests = assets.get("digests")
        if digests is not None:
            if not isinstance(digests, dict) or digests.get("assets") != _seal(assets):
                raise CorruptCheckpoint(f"{self.path / 'assets'} is not what was saved (its digest differs)")
        return assets

    @functools.cached_property
    def data_iter(self) -> dict[str, Any]:
        """The position in the data order."""
        value = self._json("data_iter")
        recorded = self._digests()["json"].get("data_iter")
        if not isinstance(value, dict) or recorded not in (None, json_digest(value)):
            raise CorruptCheckpoint(f"{self.path / 'data_iter'} is not what was saved (its digest differs)")
        return value

    @functools.cached_property
    def codec(self) -> Any:
        """Arrays of a codec fitted on data, on this process's first device; None where it is kept elsewhere."""
        return self.arrays("codec") if self.holds("codec") else None

    def holds(self, item: str) -> bool:
        """Whether an item of arrays was saved; it may be missing nevertheless."""
        return item in (self._digests()["arrays"] or self.items)

    def require_train_state(self) -> None:
        """Raises UserError for a checkpoint that was made of parameters alone."""
        if not self.holds("train_state"):
            raise UserError(
                f"{self.path}: holds parameters without a training state (a converted checkpoint); it can be "
                "sampled from, but not continued. Train in a new --workdir, with config.init_from."
            )

    def verify_small(self) -> None:
        """Reads all that is needed to continue a run but its state."""
        _ = self.assets, self.codec
        self.require_train_state()
        _ = self.data_iter

    def arrays(self, item: str, like: Any = None) -> Any:
        """`read` and `verify` in one, for arrays that one process holds."""
        restored = self.read(item, like)
        self.verify(item, restored)
        return restored

    def read(self, item: str, like: Any = None) -> Any:
        """The arrays of an item, of this process's part of them; no process waits for another.

        Args:
          like: shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves); None takes them from the checkpoint
            and puts the arrays on this process's first device.
        """
        stored = self._shapes(item)
        if like is None:
            like = self._structure(item)
        else:
            self._check_fit(item, stored, like)
        handler, place = ocp.StandardCheckpointHandler(), epath.Path(str(self.path / item))
        return _reading(self.path / item, lambda: handler.restore(place, args=ocp.args.StandardRestore(like)))

    def verify(self, item: str, restored: Any) -> None:
        """Raises CorruptCheckpoint that names the first array which is not what was saved.

        All processes that hold parts of the arrays call it. Arrays that were cast while reading are not compared.
        """
        recorded = self._digests()["arrays"].get(item)
        if recorded is None:
            return
        for name, (dtype, shape, digest) in array_digests(restored).items():
            if name not in recorded or (recorded[name][0] == dtype and recorded[name][1:] != [shape, digest]):
                raise CorruptCheckpoint(f"{self.path / item}: {name} is not what was saved (its digest differs)")

    def _json(self, item: str) -> Any:
        if item not in self.items:
            raise CorruptCheckpoint(f"{self.path / item} is missing")
        place = epath.Path(str(self.path / item))
        return _reading(self.path / item, lambda: ocp.JsonCheckpointHandler().restore(place))

    def _digests(self) -> Mapping[str, Any]:
        return self.assets.get("digests", {"arrays": {}, "json": {}})

    def _structure(self, item: str) -> Any:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def shapes() -> Any:
            tree = ocp.StandardCheckpointHandler().metadata(epath.Path(str(self.path / item))).tree
            return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)

        return _reading(self.path / item, shapes)

    def _shapes(self, item: str) -> dict[str, tuple[int, ...]]:
        """{array: shape} of an item, from the digests where there are any: orbax's own files may be damaged."""
        if item not in self.items:
            raise CorruptCheckpoint(f"{self.path / item} is missing")
        recorded = self._digests()["arrays"].get(item)
        if recorded is not None:
            return {name: tuple(shape) for name, (_, shape, _) in recorded.items()}
        return _named_shapes(self._structure(item))

    def _check_fit(self, item: str, stored: Mapping[str, tuple[int, ...]], like: Any) -> None:
        """Raises UserError that names the first array whose presence or shape differs from `like`."""
        wanted = _named_shapes(like)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"{self.path}: {item}/{name} is {stored.get(name, 'absent')} in the checkpoint, but "
                    f"{wanted.get(name, 'absent')} in the model of this config. Undo the override or choose another "
                    "checkpoint."
                )


def with_digests(
    assets: Mapping[str, Any], arrays: Mapping[str, Any], data_iter: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`assets` with the digests of all items of a checkpoint, its own included.

    Args:
      arrays: {item: tree of arrays}. All processes call this when the arrays are spread over several.
    """
    digests: dict[str, Any] = {
        "arrays": {item: array_digests(tree) for item, tree in arrays.items()},
        "json": {} if data_iter is None else {"data_iter": json_digest(data_iter)},
    }
    sealed = {**assets, "digests": digests}
    digests["assets"] = _seal(sealed)
    return sealed


def array_digests(tree: Any) -> dict[str, list[Any]]:
    """{path: [dtype, shape, digest]} of a tree's arrays; costs one pass over them.

    The digest is the sum, modulo 2**32, of each value's bits times an odd number that depends on the value's place
    in the global array. Changing any one value changes it, and no sharding does.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x if isinstance(x, jax.Array) else jax.device_put(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    arrays = list(named.values())
    if not all(x.is_fully_addressable for x in arrays):  # a collective would not wait for long for those who are late
        distributed.barrier("the digests", distributed.LATE_SECONDS)
    # Compiling a small program for each shape takes a CPU longer than the pass itself.
    numbers = digests_on_host(arrays) if on_cpus(arrays) else _digests_by_size(arrays)
    return {name: [str(x.dtype), list(x.shape), int(n)] for (name, x), n in zip(named.items(), numbers, strict=True)}


def on_cpus(tree: Any) -> bool:
    """Whether all arrays lie on CPUs, where digests need no programs."""
    arrays: list[Any] = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return all(device.platform == "cpu" for x in arrays for device in x.sharding.device_set)


def _digests_by_size(arrays: list[jax.Array]) -> list[int]:
    """The digests, each taken where that is quicker; by programs for a small array that lies on several processes."""
    small = [
        i for i, x in enumerate(arrays) if x.nbytes < _SMALL_BYTES and (x.is_fully_addressable or x.is_fully_replicated)
    ]
    large = [i for i in range(len(arrays)) if i not in set(small)]
    whole = jax.device_get([x.addressable_data(0) if x.is_fully_replicated else x for x in (arrays[i] for i in small)])
    numbers = dict(zip(large, digests_on_devices([arrays[i] for i in large]), strict=True))
    numbers |= {i: _digest_of_part(x, [0] * x.ndim, x.shape) for i, x in zip(small, whole, strict=True)}
    return [numbers[i] for i in range(len(arrays))]


def digests_on_devices(arrays: list[jax.Array]) -> list[int]:
    """The digests, by programs that run where the arrays are; one is compiled for each shape and sharding."""
    numbers = []
    for x in arrays:
        named = isinstance(x.sharding, NamedSharding)
        whole = NamedSharding(x.sharding.mesh, PartitionSpec()) if named else None  # type: ignore[attr-defined]
        numbers.append(_compiled_digest(whole)(x))
    return [int(n) for n in jax.device_get(numbers)]


def digests_on_host(arrays: list[jax.Array]) -> list[int]:
    """The same digests by numpy: each process sums over its own shards, then all add up."""
    sums = [
        sum(
            _digest_of_part(np.asarray(shard.data), [s.start or 0 for s in shard.index], x.shape)
            for shard in x.addressable_shards
            if shard.replica_id == 0
        )
        for x in arrays
    ]
    partial = np.array([n % 2**32 for n in sums], np.uint32)
    spread = np.array([not x.is_fully_addressable for x in arrays], bool)
    if spread.any():
        total = np.asarray(distributed.gather(partial.tolist()), np.uint32).sum(axis=0, dtype=np.uint32)
        partial = np.where(spread, total, partial)
    return [int(n) for n in partial]


@functools.cache
def _compiled_digest(out: Sharding | None) -> Any:
    def digest(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
        place = sum(
            (jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride))
            for axis, stride in enumerate(_strides(x.shape))
        )
        return jnp.sum(bits * _factor(jnp.asarray(place, jnp.uint32)), dtype=jnp.uint32)

    return jax.jit(digest, out_shardings=out)


def _digest_of_part(part: np.ndarray, start: list[int], shape: tuple[int, ...]) -> int:
    """The sum over a part of an array of this shape, whose first value lies at `start`; not reduced."""
    if not part.ndim:
        part, start, shape = part.reshape(1), [0], (1,)
    if part.size > 2**22 and len(part) > 1:  # the temporary arrays stay small
        return sum(_digest_of_part(part[i : i + 1], [start[0] + i, *start[1:]], shape) for i in range(len(part)))
    unsigned = np.dtype(_UNSIGNED[part.dtype.itemsize])
    bits = np.ascontiguousarray(part).view(unsigned).astype(np.uint32)
    place = np.zeros((1,) * part.ndim, np.uint32)
    for axis, stride in enumerate(_strides(shape)):
        along = np.arange(start[axis], start[axis] + part.shape[axis], dtype=np.uint32) * np.uint32(stride)
        place = place + along.reshape([-1 if a == axis else 1 for a in range(part.ndim)])
    return int(np.sum(bits * _factor(place), dtype=np.uint32))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]


def _factor(place: Any) -> Any:
    """Odd numbers that differ from place to place, uint32."""
    mixed = place * np.uint32(0x9E3779B1) + np.uint32(0x85EBCA6B)
    return (mixed ^ (mixed >> np.uint32(16))) | np.uint32(1)


def json_digest(value: Any) -> str:
    """Of a JSON value as it comes back from a file: tuples are lists, keys are texts."""
    canonical = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _seal(assets: Mapping[str, Any]) -> str:
    """The digest of the assets, of all in them but this digest itself."""
    digests = {name: value for name, value in assets["digests"].items() if name != "assets"}
    return json_digest({**assets, "digests": digests})


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}


def _reading(path: Place, read: Callable[[], _Value]) -> _Value:
    """`read()`, of what lies at `path`; any exception that a damaged file causes becomes CorruptCheckpoint."""
    try:
        return again(read, str(path))
    except (UserError, RunError):
        raise
    except Exception as e:
        if isinstance(e, MemoryError) or any(sign in reason_of(e, str(path.parent)) for sign in _PASSING):
            hint = "Nothing was changed; fix this and rerun the same command."
            raise RunError(f"{path}: cannot be read: {cause_of(e)}. {hint}") from e
        raise CorruptCheckpoint(f"{path}: {cause_of(e)}") from e
