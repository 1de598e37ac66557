"""Wire format of requests and replies: msgpack maps with arrays, as openpi's clients write and read them.

An array is the map `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}`, a numpy scalar
`{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`. A message is one flat map from names to arrays, scalars
and strings.

Nothing in a message is trusted: numpy is shown none of its dtypes, because a dtype of objects takes the bytes of a
message for addresses of memory, which ends the process; a dtype is looked up by its text instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np

from uwm_jax.errors import UserError

Value = np.ndarray | np.generic | str | bool | int | float | None

# Texts of the dtypes that are read, and no others.
DTYPES = {text: np.dtype(text) for text in ("|u1", "|b1", "<i4", "<i8", "<f4", "<f8")}

MOST_ENTRIES = 64  # of a map or a list
MOST_AXES = 8  # of a shape
MOST_CONTAINERS = 3 * MOST_ENTRIES  # maps and lists of a message; an array is one of each
MOST_TEXT = 4096  # bytes of a name or a string

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_FIELDS = {_ARRAY: {_ARRAY, b"data", b"dtype", b"shape"}, _SCALAR: {_SCALAR, b"data", b"dtype"}}


class _Map(dict[str, Any]):
    """A map of a message that is no array: the message itself, or a nested one."""


class _List(list[Any]):
    """A list of a message: a shape, or one that has no place in it."""


class _Count:
    """Ends the reading of a message with too many maps and lists: nested ones could be as many as it has bytes, each of
    which costs a hundred times its byte."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, made: Callable[[Any], Any], values: Any) -> Any:
        self._count += 1
        if self._count > MOST_CONTAINERS:
            raise UserError(f"the message has more than {MOST_CONTAINERS} maps and lists; maps are flat.")
        return made(values)


class _Unfit(str):
    """The fault of an array or a scalar, for the map around it, which knows its name."""


def decode(message: bytes, limit: int) -> dict[str, Value]:
    """The entries of a request.

    Args:
      message: one binary frame.
      limit: bytes that a message may have.

    Returns:
      {name: array, read-only and of a dtype of `DTYPES`, numpy scalar, or string, number, bool or None}. Numbers of
      floating point are finite.

    Raises:
      UserError: the message is longer than `limit`, no msgpack, nested, has too many entries, or one of its arrays has
        another dtype, a number of bytes that does not fit its shape, or values that are not finite.
    """
    if len(message) > limit:
        raise UserError(f"the message has {len(message)} bytes: expected at most {limit} for what is served here.")
    count = _Count()
    try:
        found = msgpack.unpackb(
            message,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=lambda pairs: count(_map, pairs),
            list_hook=lambda values: count(_List, values),
            ext_hook=_no_extension,
            max_str_len=MOST_TEXT,
            max_bin_len=limit,
            max_array_len=MOST_ENTRIES,
            max_map_len=MOST_ENTRIES,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as e:
        reason = str(e) or type(e).__name__
        raise UserError(f"the message is not a msgpack map of arrays, numbers and strings: {reason[:200]}.") from e
    if not isinstance(found, _Map):
        raise UserError(f"the message is {_kind(found)}: expected one msgpack map.")
    for name, value in found.items():
        _check_entry(name, value)
    return dict(found)


def encode(reply: Mapping[str, Any]) -> bytes:
    """A reply as one binary frame: names to arrays of `DTYPES`, numbers, strings, lists and maps of these."""
    packed = msgpack.packb(reply, default=_packed)
    assert isinstance(packed, bytes)
    return packed


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.str in DTYPES:
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.str in DTYPES:
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} has no place in a message")


def _no_extension(code: int, data: bytes) -> Any:
    raise UserError(f"extension type {code} of msgpack: expected maps, arrays, numbers and strings.")


def _map(pairs: list[tuple[Any, Any]]) -> Any:
    """The array, scalar or flat map that a map of a message stands for; called for the innermost maps first."""
    keys = {key for key, _ in pairs}
    if len(keys) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in {k for k, _ in pairs[:i]})
        raise UserError(f"{_shown(twice)} stands twice in one map.")
    for mark, fields in _FIELDS.items():
        if mark in keys:
            values = dict(pairs)
            try:
                if keys != fields or values[mark] is not True:
                    expected = ", ".join(field.decode() for field in sorted(fields))
                    raise UserError(f"the fields {_names(keys)}: expected {expected}, with {mark.decode()} true.")
                return _array(values) if mark == _ARRAY else _scalar(values)
            except UserError as e:
                return _Unfit(e)
    for key, value in pairs:
        if not isinstance(key, str):
            raise UserError(f"the name {_shown(key)} is not a string.")
        if isinstance(value, _Unfit):
            raise UserError(f"{_shown(key)}: {value}")
        if isinstance(value, _Map | _List):
            raise UserError(f"{_shown(key)} is {_kind(value)}: expected an array, a number or a string; maps are flat.")
    return _Map(pairs)


def _dtype(text: Any) -> np.dtype[Any]:
    if not isinstance(text, str) or text not in DTYPES:
        raise UserError(f"dtype {_shown(text)}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[text]


def _array(values: dict[bytes, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(values[b"dtype"]), values[b"data"], values[b"shape"]
    if not isinstance(shape, _List) or len(shape) > MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise UserError(f"shape {_shown(shape)}: expected a list of at most {MOST_AXES} integers, none negative.")
    if not isinstance(data, bytes):
        raise UserError(f"the data of an array are {_kind(data)}: expected bytes.")
    size = math.prod(shape) * dtype.itemsize
    if len(data) != size:
        raise UserError(f"an array {dtype.str} of shape {tuple(shape)} needs {size} bytes, found {len(data)}.")
    try:
        array = np.frombuffer(data, dtype).reshape(tuple(shape))
    except ValueError as e:  # no bytes, but an axis beyond numpy's integers
        raise UserError(f"shape {_shown(shape)}: {e}.") from e
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise UserError("an array |b1 holds bytes other than 0 and 1.")
    return array


def _scalar(values: dict[bytes, Any]) -> np.generic:
    dtype, number = _dtype(values[b"dtype"]), values[b"data"]
    fits = {
        "b": isinstance(number, bool),
        "u": type(number) is int and 0 <= number < 256,
        "i": type(number) is int and -(2 ** (8 * dtype.itemsize - 1)) <= number < 2 ** (8 * dtype.itemsize - 1),
        "f": type(number) in (int, float),
    }[dtype.kind]
    if not fits:
        raise UserError(f"a scalar {dtype.str} is {_shown(number)}: expected a number of this dtype.")
    with np.errstate(over="ignore"):
        return dtype.type(number)


def _check_entry(name: str, value: Any) -> None:
    if isinstance(value, bytes):
        raise UserError(f"{_shown(name)} is bytes: expected an array, a number or a string.")
    number = isinstance(value, float) or isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f"
    if number and not np.isfinite(value).all():
        raise UserError(f"{_shown(name)} holds values that are not finite.")


def _shown(value: Any) -> str:
    """A value of a message for an error: short, and of printable characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _names(keys: set[Any]) -> str:
    return ", ".join(sorted(_shown(key) for key in keys)[:8])


def _kind(value: Any) -> str:
    kinds = {_Map: "a map", _List: "a list", np.ndarray: "an array", bytes: "bytes", str: "a string", type(None): "nil"}
    return kinds.get(type(value), type(value).__name__)
