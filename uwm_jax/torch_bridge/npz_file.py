"""Files of arrays: npz, and in it normalisers as `<key>/scale` and `<key>/offset`."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, local_copy

# key -> (scale (D,), offset (D,)) float32; raw = normalised * scale + offset
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]
Normalizers = dict[str, tuple[np.ndarray, np.ndarray]]


class NpzArrays(Mapping[str, np.ndarray]):
    """The arrays of an npz file, each read when it is asked for; use it in a `with`.

    A key that cannot be read, or holds pickled objects, raises UserError when it is asked for, and no earlier.
    """

    def __init__(self, path: AnyPath, flag: str):
        """UserError for a file that is absent or no npz; `flag` names it in messages."""
        self.where = f"{flag}: {path}"
        try:
            file = np.load(local_copy(path), allow_pickle=False)
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


def read_normalizers(path: AnyPath) -> Normalizers:
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
    return {key: as_pair(f"--normalizer: {path}", key, p["scale"], p["offset"]) for key, p in sorted(pairs.items())}


def as_pair(where: str, key: str, scale: Any, offset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset as float32; UserError, which begins with `where` and `key`, for what is no pair of vectors."""
    arrays = []
    for part, value in (("scale", scale), ("offset", offset)):
        try:
            value = np.asarray(value)
        except (ValueError, TypeError) as e:  # lists of different lengths, or of anything
            raise UserError(f"{where}: {key}/{part} should be a vector of finite floats ({e}).") from e
        if value.ndim != 1 or not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise UserError(
                f"{where}: {key}/{part} should be a vector of finite floats, found {value.dtype} {value.shape}."
            )
        arrays.append(value.astype(np.float32))
    if arrays[0].shape != arrays[1].shape:
        raise UserError(f"{where}: {key}/scale has shape {arrays[0].shape}, {key}/offset {arrays[1].shape}.")
    return arrays[0], arrays[1]
