"""Hostile messages, for the benchmark and the tests of the policy server.

Every message is a function of the seed and its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

Fields = dict[Any, Any]

_DTYPES = (
    "O",
    "|O",
    "object",
    "V8",
    "<U4",
    "S4",
    ">f4",
    "<f2",
    "<c8",
    "<M8[ns]",
    "<f4,<f4",
    "",
    "f" * 300,
    b"<f4",
    7,
    None,
)
_SHAPES = ([-1], [2**62, 4], [0], [1] * 40, [True], [1.5], ["4"], [[2]], 4, None, "4")
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**63,
    -(2**63),
    1e308,
    float("nan"),
    "",
    "x" * 3000,
    b"bytes",
    [],
    {},
    [[[]]],
    {"a": {}},
)


def request(metadata: Mapping[str, Any], seed: int = 0) -> Fields:
    """An honest request of a server with these metadata: random frames, vectors of zeros, a seed."""
    draw = np.random.default_rng(seed)
    fields: Fields = {"seed": seed}
    for key, like in metadata["inputs"].items():
        if like["dtype"] == "uint8":
            fields[key] = array(draw.integers(0, 256, like["shape"], np.uint8))
        else:
            fields[key] = array(np.zeros(like["shape"], np.float32))
    return fields


def array(values: np.ndarray) -> Fields:
    """An array as openpi's clients send it."""
    return {b"__ndarray__": True, b"data": values.tobytes(), b"dtype": values.dtype.str, b"shape": list(values.shape)}


def messages(metadata: Mapping[str, Any], count: int, seed: int = 0) -> Iterator[bytes | str]:
    """`count` messages to a server with these metadata; few of them are fit to be answered."""
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        kind = _KINDS[number % len(_KINDS)]
        yield kind(draw, request(metadata, number))


def _pack(fields: Any) -> bytes:
    packed = msgpack.packb(fields)
    assert isinstance(packed, bytes)
    return packed


def _pick(draw: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(draw.integers(len(values)))]


def _key(draw: np.random.Generator, fields: Fields) -> str:
    return _pick(draw, [key for key, value in fields.items() if isinstance(value, dict)])


def _noise(draw: np.random.Generator, fields: Fields) -> bytes:
    return draw.bytes(int(draw.integers(0, 2000)))


def _flipped(draw: np.random.Generator, fields: Fields) -> bytes:
    """A request of which some of the first bytes, which say what follows, are others."""
    message = bytearray(_pack(fields))
    for _ in range(int(draw.integers(1, 9))):
        message[int(draw.integers(min(len(message), 200)))] = int(draw.integers(256))
    return bytes(message)


def _half(draw: np.random.Generator, fields: Fields) -> bytes:
    message = _pack(fields)
    return message[: int(draw.integers(len(message)))]


def _objects(draw: np.random.Generator, fields: Fields) -> bytes:
    """Bytes that numpy would take for addresses."""
    size = int(draw.integers(1, 64))
    objects = {b"data": draw.bytes(8 * size), b"dtype": _pick(draw, ("O", "|O", "<O", "O8")), b"shape": [size]}
    fields[_key(draw, fields)] = {b"__ndarray__": True, **objects}
    return _pack(fields)


def _other_dtype(draw: np.random.Generator, fields: Fields) -> bytes:
    fields[_key(draw, fields)][b"dtype"] = _pick(draw, _DTYPES)
    return _pack(fields)


def _other_shape(draw: np.random.Generator, fields: Fields) -> bytes:
    fields[_key(draw, fields)][b"shape"] = _pick(draw, _SHAPES)
    return _pack(fields)


def _other_field(draw: np.random.Generator, fields: Fields) -> bytes:
    of_array = fields[_key(draw, fields)]
    of_array[_pick(draw, [*of_array, b"more", "text"])] = _pick(draw, _VALUES)
    return _pack(fields)


def _other_value(draw: np.random.Generator, fields: Fields) -> bytes:
    names = [*fields, "mode", "reset", "promised", "request_id", "prompt", "noise/action", "unknown", ""]
    fields[_pick(draw, names)] = _pick(draw, _VALUES)
    return _pack(fields)


def _scalars(draw: np.random.Generator, fields: Fields) -> bytes:
    dtype, value = _pick(draw, (*_DTYPES, "<i4", "<f4", "|b1", "|u1")), _pick(draw, _VALUES)
    fields[_pick(draw, list(fields))] = {b"__npgeneric__": True, b"data": value, b"dtype": dtype}
    return _pack(fields)


def _not_finite(draw: np.random.Generator, fields: Fields) -> bytes:
    key = _pick(draw, [*fields, "promised"])
    values = np.full((2, 2), _pick(draw, (np.nan, np.inf, -np.inf, 1e300)))
    with np.errstate(over="ignore"):
        fields[key] = array(values.astype(_pick(draw, ("<f4", "<f8"))))
    return _pack(fields)


def _nested(draw: np.random.Generator, fields: Fields) -> bytes:
    depth = int(draw.integers(1, 3000))
    start = _pick(draw, (b"\x91", b"\x81\xa1x", b"\x81\xc4\x01x", b"\x92\xc0"))
    return start * depth + _pick(draw, (b"", b"\xc0", b"\x90" * depth))


def _many(draw: np.random.Generator, fields: Fields) -> bytes:
    count = int(draw.integers(60, 5000))
    wide: Fields = {"x": [[{}] * 64] * 64}  # each level has few entries
    return _pick(
        draw, (_pack({f"k{i}": 0 for i in range(count)}), _pack({"x": [0] * count}), _pack([{}] * count), _pack(wide))
    )


def _lengths(draw: np.random.Generator, fields: Fields) -> bytes:
    """A header that announces more than follows."""
    head = _pick(draw, (b"\xdd", b"\xdf", b"\x81\xa1x\xc6", b"\x81\xa1x\xdb", b"\x81\xa1x\xc9", b"\xdb"))
    return head + draw.integers(0, 256, 4, np.uint8).tobytes() + draw.bytes(16)


def _extension(draw: np.random.Generator, fields: Fields) -> bytes:
    value = msgpack.ExtType(int(draw.integers(128)), draw.bytes(int(draw.integers(20))))
    fields[_pick(draw, list(fields))] = _pick(draw, (value, msgpack.Timestamp(int(draw.integers(2**33)))))
    return _pack(fields)


def _twice(draw: np.random.Generator, fields: Fields) -> bytes:
    pairs = [*fields.items()] * 2
    packer = msgpack.Packer()
    return packer.pack_map_header(len(pairs)) + b"".join(packer.pack(x) for pair in pairs for x in pair)


def _text(draw: np.random.Generator, fields: Fields) -> str:
    return "".join(map(chr, draw.integers(32, 0xD7FF, int(draw.integers(0, 300)))))


def _too_long(draw: np.random.Generator, fields: Fields) -> bytes:
    """More than is declared by a little: enough to be refused, too little to be cut off."""
    return _pack(fields | {"more": bytes(70_000)})


def _honest(draw: np.random.Generator, fields: Fields) -> bytes:
    return _pack(fields)


_KINDS: tuple[Callable[[np.random.Generator, Fields], bytes | str], ...] = (
    _noise,
    _flipped,
    _half,
    _objects,
    _other_dtype,
    _other_shape,
    _other_field,
    _other_value,
    _scalars,
    _not_finite,
    _nested,
    _many,
    _lengths,
    _extension,
    _twice,
    _text,
    _too_long,
    _honest,
)
