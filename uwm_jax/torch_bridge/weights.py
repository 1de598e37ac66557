"""Files of weights and normalisers: safetensors, official `.pt` checkpoints, and `<key>/scale` npz files."""

from __future__ import annotations

import functools
import os
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from uwm_jax.errors import UserError
from uwm_jax.files import replacing
from uwm_jax.torch_bridge import state_dict
from uwm_jax.torch_bridge.tensor_file import read_safetensors, refuse_other_kinds

# key -> (scale (D,), offset (D,)) float32; raw = normalised * scale + offset
Normalizers = dict[str, tuple[np.ndarray, np.ndarray]]


def read_weights(
    path: str | Path, which: str = state_dict.MODEL
) -> tuple[dict[str, np.ndarray], Normalizers, list[str]]:
    """Tensors by official name, the normalisers that a `.pt` checkpoint stores next to them, and notes for people.

    Args:
      which: `model`, or `ema` for the averaged weights that a file may hold as well.

    Raises UserError for a file that is absent, unreadable, incomplete or of another kind.
    """
    path = Path(path)
    where = f"--input: {path}"
    if not path.is_file():
        raise UserError(f"--input: there is no file {str(path)!r}.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"--input: expected a .safetensors or .pt file, found {str(path)!r}.")
    refuse_other_kinds(path, where)
    tensors, normalizers = _read_pt(path) if path.suffix != ".safetensors" else (read_safetensors(path, where), {})
    chosen, notes = state_dict.choose(tensors, which, where)
    return chosen, normalizers, notes


def write_weights(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, all of it or nothing."""
    with replacing(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, temporary)
            temporary.chmod(mode)  # of any file that a command writes: safetensors makes one that its owner alone reads
        except safetensors.SafetensorError as e:
            failed = re.search(r"os error (\d+)", str(e))  # a full disk comes as text
            if failed is None:
                raise
            raise OSError(int(failed.group(1)), os.strerror(int(failed.group(1)))) from e


class NpzArrays(Mapping[str, np.ndarray]):
    """The arrays of an npz file, each read when it is asked for; use it in a `with`.

    A key that cannot be read, or holds pickled objects, raises UserError when it is asked for, and no earlier.
    """

    def __init__(self, path: str | Path, flag: str):
        """UserError for a file that is absent or no npz; `flag` names it in messages."""
        self.where = f"{flag}: {path}"
        try:
            file = np.load(path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, not an archive of named arrays")
        except FileNotFoundError as e:
            raise UserError(f"{flag}: there is no file {str(path)!r}.") from e
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as e:
            raise UserError(f"{self.where} is not a readable .npz file of plain arrays ({e}).") from e
        self._file = file

    def __enter__(self) -> NpzArrays:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._file.files:
            raise KeyError(key)
        try:
            value = self._file[key]
            if not isinstance(value, np.ndarray):
                raise ValueError("it is not in numpy's format")
        # What zipfile, zlib and numpy raise for damaged, encrypted or pickled contents, or a header that lies.
        except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as e:
            raise UserError(f"{self.where}: {key} is not a readable plain array ({e}).") from e
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.files)

    def __len__(self) -> int:
        return len(self._file.files)

    def __contains__(self, key: object) -> bool:  # without reading it
        return key in self._file.files


def read_normalizers(path: str | Path) -> Normalizers:
    """`<key>/scale` and `<key>/offset` per bare key (`action`, `gripper_position`, ...); at least one pair."""
    with NpzArrays(path, "--normalizer") as file:
        arrays = dict(file)
    if not arrays:
        raise UserError(f"--normalizer: {path} is empty; expected keys such as action/scale and action/offset.")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        key, _, part = name.rpartition("/")
        if part not in ("scale", "offset") or not key:
            raise UserError(f"--normalizer: {path}: expected keys <key>/scale and <key>/offset, found {name!r}.")
        pairs.setdefault(key, {})[part] = value
    for key, pair in pairs.items():
        if missing := {"scale", "offset"} - pair.keys():
            raise UserError(f"--normalizer: {path} has no {key}/{missing.pop()}; a key needs both scale and offset.")
    return {key: _pair(f"--normalizer: {path}", key, p["scale"], p["offset"]) for key, p in sorted(pairs.items())}


def _pair(where: str, key: str, scale: Any, offset: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for part, value in (("scale", scale), ("offset", offset)):
        value = np.asarray(value)
        if value.ndim != 1 or not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise UserError(
                f"{where}: {key}/{part} should be a vector of finite floats, found {value.dtype} {value.shape}."
            )
        arrays.append(value.astype(np.float32))
    if arrays[0].shape != arrays[1].shape:
        raise UserError(f"{where}: {key}/scale has shape {arrays[0].shape}, {key}/offset {arrays[1].shape}.")
    return arrays[0], arrays[1]


# --- official .pt checkpoints -----------------------------------------------------------------------


def _read_pt(path: Path) -> tuple[dict[str, np.ndarray], Normalizers]:
    """{"model": state dict, "action_normalizer": ..., "lowdim_normalizer": ..., ...}, or a bare state dict."""
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"--input: reading {path} needs torch, which is not installed: pip install 'torch>=2.4', or save the "
            "checkpoint's `model` as .safetensors and its normalisers as an .npz for --normalizer."
        ) from e
    # Only what an official checkpoint holds in addition to tensors; anything else in the file is refused, not run.
    torch.serialization.add_safe_globals(_safe_globals())
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as e:
        refused = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it holds {refused[1]}" if refused else f"torch cannot read it ({type(e).__name__})"
        raise UserError(f"--input: {path} is not a checkpoint of tensors and normalisers alone: {reason}.") from e
    found = state_dict.flatten(state_dict.containers(stored), torch.Tensor) if isinstance(stored, dict) else {}
    if not found:
        raise UserError(f"--input: {path} should hold a state dict, alone or under the key 'model'.")
    tensors = {}
    for name, tensor in found.items():
        try:
            tensors[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        except (TypeError, RuntimeError) as e:  # float8 and quantised types
            raise UserError(
                f"--input: {path}: {name} is {tensor.dtype}, which is not converted. Save it as float32."
            ) from e
    normalizers: Normalizers = {}
    if isinstance(stored, dict):
        where = f"--input: {path}"
        for key, leaf in _linear_normalizers(stored.get("action_normalizer"), "action"):
            normalizers[key] = _pair(where, key, leaf.scale, leaf.offset)
        for key, leaf in _linear_normalizers(stored.get("lowdim_normalizer"), ""):
            normalizers[key] = _pair(where, key, leaf.scale, leaf.offset)
    return tensors, dict(sorted(normalizers.items()))


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

    def reconstruct() -> Callable[..., np.ndarray]:
        # What numpy pickles: an empty array, which then receives shape, dtype and bytes.
        return lambda subtype, shape, typecode: np.ndarray.__new__(np.ndarray, shape, typecode)

    def scalar() -> Callable[..., Any]:
        return lambda dtype, data: np.frombuffer(data, dtype)[0]

    normalizer = "datasets.utils.normalizer"
    allowed: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?"))]
    allowed += [named(normalizer, "LinearNormalizer", linear())]
    allowed += [named(normalizer, "NestedDictLinearNormalizer", nested())]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        allowed += [named(module, "_reconstruct", reconstruct()), named(module, "scalar", scalar())]
    return allowed
