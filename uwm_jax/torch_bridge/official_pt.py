"""Official `.pt` checkpoints: tensors and normalisers in a pickle.

What is read runs nothing: `torch.load(weights_only=True)` makes tensors, plain values and the types of `_safe_globals`,
and refuses everything else by name. What is written is the dictionary that the official trainers and evaluations load.
Its normalisers are objects of their classes, which this process does not have, so that a pickler of our own writes the
classes' names in place of looking them up.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, replacing
from uwm_jax.torch_bridge import npz_file, state_dict

WRITE_OTHERWISE = "or name a .safetensors file"

_MODULE = "datasets.utils.normalizer"  # of the official classes of normalisers


@dataclass(frozen=True)
class Checkpoint:
    """What an official checkpoint holds.

    Attributes:
      tensors: by the names that the file has, those of `model` in its order.
      normalizers: by bare key.
      optimizer: as it was saved, with numpy arrays for tensors; None where there is none, or it was not asked for.
      step: number of the last finished step, counted from 0; None where there is none.
    """

    tensors: dict[str, np.ndarray]
    normalizers: npz_file.Normalizers
    optimizer: Any
    step: Any


def read(path: Path, *, optimizer: bool = False) -> Checkpoint:
    """{"model": state dict, "action_normalizer": ..., "lowdim_normalizer": ..., ...}, or a bare state dict.

    Args:
      optimizer: whether `optimizer` is taken as well.

    Raises:
      UserError: torch is not installed, or the file holds anything but tensors, plain values and normalisers.
    """
    remedy = "or save the checkpoint's `model` as .safetensors and its normalisers as an .npz for --normalizer"
    torch = import_torch(f"--input: reading {path}", remedy)
    try:  # what an official checkpoint holds in addition to tensors; anything else in the file is refused, not run
        with _only_safe_globals(torch):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged files raise what the unpickler raises
        refused = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it holds {refused[1]}" if refused else f"torch cannot read it ({type(e).__name__})"
        raise UserError(f"--input: {path} is not a checkpoint of tensors and normalisers alone: {reason}.") from e
    try:
        return _read(stored, f"--input: {path}", optimizer)
    except RecursionError as e:
        raise UserError(f"--input: {path} holds a dictionary that is part of itself, or nested too deeply.") from e


def _read(stored: Any, where: str, optimizer: bool) -> Checkpoint:
    import torch

    found = state_dict.flatten(state_dict.containers(stored), torch.Tensor) if isinstance(stored, dict) else {}
    if not found:
        raise UserError(f"{where} should hold a state dict, alone or under the key 'model'.")
    tensors = {name: _array(tensor, f"{where}: {name}") for name, tensor in found.items()}
    pairs: npz_file.Normalizers = {}
    for key, leaf in _linear_normalizers(stored.get("action_normalizer"), "action"):
        pairs[key] = npz_file.as_pair(where, key, _plain(leaf.scale, where), _plain(leaf.offset, where))
    for key, leaf in _linear_normalizers(stored.get("lowdim_normalizer"), ""):
        pairs[key] = npz_file.as_pair(where, key, _plain(leaf.scale, where), _plain(leaf.offset, where))
    taken = _plain(stored.get("optimizer"), f"{where}: optimizer") if optimizer else None
    return Checkpoint(tensors, dict(sorted(pairs.items())), taken, _plain(stored.get("step"), f"{where}: step"))


def write(path: AnyPath, tensors: Mapping[str, np.ndarray], pairs: npz_file.Pairs, steps: int) -> None:
    """Writes {"model", "action_normalizer", "lowdim_normalizer", "step"}, all of it or nothing.

    A normaliser is None where no key has one, as in the official code. `step` is the number of the last finished step,
    counted from 0, so that the official code goes on with the next.

    Args:
      tensors: by official name.
      pairs: by bare key; `action` is the action's, the others are low-dimensional observations.
      steps: finished steps.

    Raises:
      UserError: torch is not installed.
    """
    torch = import_torch(f"--output: writing {path}", WRITE_OTHERWISE)
    linear = {key: _Linear(np.asarray(scale), np.asarray(offset)) for key, (scale, offset) in sorted(pairs.items())}
    action = linear.pop("action", None)
    stored = {
        "model": OrderedDict((name, _tensor(torch, value)) for name, value in tensors.items()),
        "action_normalizer": action,
        "lowdim_normalizer": _NestedDict(linear) if linear else None,
        "step": steps - 1,
    }
    pickler: Any = types.ModuleType("pickler")
    pickler.Pickler = _Pickler
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(stored, file, pickle_module=pickler)


def import_torch(purpose: str, otherwise: str) -> Any:
    """The module torch; UserError that says what needs it, and what can be done without, if it is not installed."""
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{purpose} needs torch, which is not installed: pip install 'uwm-jax[torch]', {otherwise}."
        ) from e
    return torch


class _Linear:
    """Stands for the official `LinearNormalizer`, which has `scale` and `offset`."""

    def __init__(self, scale: np.ndarray, offset: np.ndarray):
        self.scale, self.offset = scale, offset


class _NestedDict(dict[str, _Linear]):
    """Stands for the official `NestedDictLinearNormalizer`, a dictionary of normalisers by bare key."""


_NAMES = {
    _Linear: (_MODULE, "LinearNormalizer"),
    _NestedDict: (_MODULE, "NestedDictLinearNormalizer"),
    np.empty(0).__reduce__()[0]: ("numpy.core.multiarray", "_reconstruct"),  # numpy 1 does not have numpy._core
}


_InPython: Any = pickle._Pickler  # that of C cannot be told how to name a class


class _Pickler(_InPython):
    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj in _NAMES:
            self.write(pickle.GLOBAL + "\n".join(_NAMES[obj]).encode() + b"\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    def save_type(self, obj: type) -> None:
        self.save_global(obj)

    dispatch = {**_InPython.dispatch, type: save_type}


def _tensor(torch: Any, value: np.ndarray) -> Any:
    value = np.array(value, order="C")  # a copy, which torch may keep
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _array(tensor: Any, where: str) -> np.ndarray:
    """A torch tensor as numpy; bfloat16, which numpy does not have, as float32."""
    try:
        return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).detach().numpy()
    except (TypeError, RuntimeError) as e:  # float8 and quantised types
        raise UserError(f"{where} is {tensor.dtype}, which is not converted. Save it as float32.") from e


def _plain(value: Any, where: str) -> Any:
    """A stored value with numpy arrays for tensors and stored arrays, down through dictionaries and lists."""
    import torch

    if isinstance(value, torch.Tensor):
        return _array(value, where)
    if isinstance(value, _StoredArray):
        return value.array
    if isinstance(value, Mapping):
        return {key: _plain(v, f"{where}[{key!r:.40}]") for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    return value


def _linear_normalizers(stored: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every (bare key, object with scale and offset) in a stored normaliser, however it is nested."""
    if hasattr(stored, "scale") and hasattr(stored, "offset"):
        yield key, stored
    elif isinstance(stored, Mapping) or hasattr(stored, "__dict__"):
        inside = {**(stored if isinstance(stored, Mapping) else {}), **getattr(stored, "__dict__", {})}
        for name, value in inside.items():
            bare = str(name).removeprefix("obs.").removeprefix("obs/")
            # Attributes that merely hold the dictionary have no say in the keys.
            yield from _linear_normalizers(value, key if isinstance(value, Mapping) else bare)


# --- what stands for the types that a file names ------------------------------------------------------

_DTYPES = ("f4", "f8", "i4", "i8", "b1")


class _StoredDtype:
    """Stands for `numpy.dtype`, of numbers alone: an array of objects could be made of any bytes."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if code not in _DTYPES:
            raise UnpicklingError(f"dtype {code!r:.20}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":  # all else of the state is void for numbers
            self.dtype = self.dtype.newbyteorder(">")


class _StoredArray:
    """Stands for `numpy.ndarray`, which itself can be called with a buffer that it takes for anything."""

    array = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _from_bytes(dtype, data).reshape(shape, order="F" if is_fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype)


def _from_bytes(dtype: Any, data: Any) -> np.ndarray:
    if not isinstance(dtype, _StoredDtype) or not isinstance(data, bytes):
        raise UnpicklingError("an array that is not made of numbers")
    return np.frombuffer(data, dtype.dtype)


@functools.cache
def _safe_globals() -> list[Any]:
    """Types that `torch.load(weights_only=True)` may make besides tensors, each found by its name in the file."""

    def named(module: str, name: str, value: Any) -> Any:
        value.__module__, value.__name__, value.__qualname__ = module, name, name
        return value

    def linear() -> type:
        return type("LinearNormalizer", (), {})

    def nested() -> type:
        # A dictionary, or an object that holds one: an OrderedDict takes both items and attributes.
        return type("NestedDictLinearNormalizer", (), {"__new__": lambda cls, *args: OrderedDict()})

    def reconstruct() -> Callable[..., _StoredArray]:
        # What numpy pickles: an empty array, which then receives shape, dtype and bytes.
        return lambda subtype, shape, typecode: _StoredArray()

    def scalar() -> Callable[..., Any]:
        return lambda dtype, data: _from_bytes(dtype, data)[0]

    allowed = [named("numpy", "ndarray", _StoredArray), named("numpy", "dtype", _StoredDtype)]
    allowed += [named(_MODULE, "LinearNormalizer", linear())]
    allowed += [named(_MODULE, "NestedDictLinearNormalizer", nested())]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        allowed += [named(module, "_reconstruct", reconstruct()), named(module, "scalar", scalar())]
    return allowed


@contextlib.contextmanager
def _only_safe_globals(torch: Any) -> Iterator[None]:
    """Allows `_safe_globals` in place of what this process allows otherwise."""
    serialization = torch.serialization
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    serialization.add_safe_globals(_safe_globals())
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)
