"""Files of weights and normalisers: safetensors, official `.pt` checkpoints, and `<key>/scale` npz files."""

from __future__ import annotations

import functools
import os
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from uwm_jax.errors import UserError

# key -> (scale (D,), offset (D,)) float32; raw = normalised * scale + offset
Normalizers = dict[str, tuple[np.ndarray, np.ndarray]]


def read_weights(path: str | Path) -> tuple[dict[str, np.ndarray], Normalizers]:
    """Tensors by name, and the normalisers that a `.pt` checkpoint stores beside them.

    Raises UserError for a file that is absent, unreadable or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--input: there is no file {str(path)!r}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), {}
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"--input: {path} is not a readable safetensors file ({e}).") from e
    if path.suffix in (".pt", ".pth"):
        return _read_pt(path)
    raise UserError(f"--input: expected a .safetensors or .pt file, found {str(path)!r}.")


def write_weights(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, all of it or nothing."""
    with atomic(path) as temporary:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, temporary)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block succeeds; folders are made."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output: {str(path)!r} is a folder; name a file.")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"--output: cannot write {str(path)!r} ({e.strerror or e}).") from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_npz(path: str | Path, flag: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file; pickled objects are refused."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, not an archive of named arrays")
        with file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as e:
        raise UserError(f"{flag}: there is no file {str(path)!r}.") from e
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as e:
        raise UserError(f"{flag}: {path} is not a readable .npz file of plain arrays ({e}).") from e


def read_normalizers(path: str | Path) -> Normalizers:
    """`<key>/scale` and `<key>/offset` per bare key (`action`, `gripper_position`, ...)."""
    arrays = read_npz(path, "--normalizer")
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
    # Only what an official checkpoint holds beside tensors; anything else in the file is refused, not run.
    torch.serialization.add_safe_globals(_safe_globals())
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as e:
        found = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it holds {found[1]}" if found else f"torch cannot read it ({type(e).__name__})"
        raise UserError(f"--input: {path} is not a checkpoint of tensors and normalisers alone: {reason}.") from e
    model = stored.get("model", stored) if isinstance(stored, dict) else None
    if not isinstance(model, dict) or not model or not all(isinstance(t, torch.Tensor) for t in model.values()):
        raise UserError(f"--input: {path} should hold a state dict, alone or under the key 'model'.")
    tensors = {}
    for name, tensor in model.items():
        tensor = tensor.detach().cpu()
        tensors[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    normalizers: Normalizers = {}
    if model is not stored:
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
    """What `torch.load(weights_only=True)` may make beside tensors, each found by its name in the file."""

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
