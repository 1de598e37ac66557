"""Reads and re-frames serialized `tf.train.Example` messages without protobuf or TensorFlow.

An RLDS episode is one `Example`: a map from feature name to a list of bytes, floats or int64s, in
which `steps/<key>` holds the values of all steps, concatenated. Random access needs few of the values of a record of
about a megabyte, so only these are decoded: `scan` finds the byte range of each feature, and the other functions read
one feature.

Wire format: protobuf encoding guide; message numbers: tensorflow/core/example/{example,feature}.proto.
All functions raise `ValueError` for bytes that are not such a message.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

Buffer = bytes | memoryview

# Field number of the list inside a `Feature`.
BYTES, FLOAT, INT64 = 1, 2, 3

_64_BITS = (1 << 64) - 1  # negative integers are stored in two's complement


class Field(NamedTuple):
    """Location of the values of a feature: `kind` (BYTES, FLOAT, INT64, or 0 for an empty feature) and the byte range
    of the list message inside the record."""

    kind: int
    start: int
    stop: int


def scan(record: Buffer, wanted: Collection[bytes] | None = None) -> dict[bytes, Field]:
    """Finds the features of one record (all, or only those named in `wanted`)."""
    fields: dict[bytes, Field] = {}
    try:
        for number, start, stop in _messages(record, 0, len(record)):
            if number != 1:  # Example.features
                continue
            for number, entry, entry_stop in _messages(record, start, stop):
                if number != 1:  # Features.feature, a map of (key, value)
                    continue
                # Writers put the key first, and keys are short: then an unwanted feature costs one comparison.
                if record[entry] == 0x0A and record[entry + 1] < 128:
                    name = bytes(record[entry + 2 : entry + 2 + record[entry + 1]])
                    if wanted is not None and name not in wanted:
                        continue
                name, value = _entry(record, entry, entry_stop)
                if wanted is not None and name not in wanted:
                    continue
                fields[name] = _feature(record, *value)
                if wanted is not None and len(fields) == len(wanted):
                    return fields
    except IndexError:
        raise ValueError("the record ends in the middle of a tf.Example") from None
    return fields


def bytes_spans(record: Buffer, field: Field, stop: int | None = None) -> list[tuple[int, int]]:
    """Byte ranges of the values of a BYTES feature (the first `stop` of them)."""
    if field.kind not in (BYTES, 0):
        raise ValueError("expected a list of bytes")
    spans: list[tuple[int, int]] = []
    at, end = field.start, field.stop
    # `_messages` inlined: this runs once per frame of every record that is read.
    while at < end and (stop is None or len(spans) < stop):
        length = record[at + 1]
        start = at + 2
        if length >= 128:
            second, third = record[start], record[start + 1]
            if second < 128:
                length, start = length & 127 | second << 7, start + 1
            elif third < 128:  # an image of 16 kB to 2 MB
                length, start = length & 127 | (second & 127) << 7 | third << 14, start + 2
            else:
                length, start = read_varint(record, at + 1)
        at = start + length
        if at > end:
            raise ValueError("a list of bytes runs over its end")
        spans.append((start, at))
    return spans


def floats(record: Buffer, field: Field) -> np.ndarray:
    """Values of a FLOAT feature, (n,) float32."""
    if field.kind not in (FLOAT, 0):
        raise ValueError("expected a list of floats")
    parts = []
    for wire, start, stop in _values(record, field):
        # An unpacked list has every value in a field of its own; a packed one is a single run.
        if wire not in (2, 5) or (stop - start) % 4:
            raise ValueError("malformed list of floats")
        parts.append(record[start:stop])
    if len(parts) == 1:
        return np.frombuffer(parts[0], "<f4")
    return np.frombuffer(b"".join(parts), "<f4")


def ints(record: Buffer, field: Field) -> np.ndarray:
    """Values of an INT64 feature, (n,) int64."""
    raw = np.frombuffer(_packed_ints(record, field), np.uint8)
    ends = np.flatnonzero(raw < 128)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    out = np.zeros(len(ends), np.uint64)
    for shift in range(int((ends - starts).max()) + 1 if len(ends) else 0):
        at = starts + shift
        more = at <= ends
        out[more] |= (raw[at[more]] & np.uint64(127)).astype(np.uint64) << np.uint64(7 * shift)
    return out.view(np.int64)


def small_ints(record: Buffer, field: Field) -> np.ndarray:
    """Values of an INT64 feature that all lie in [0, 255], (n,) uint8, in a byte of memory each."""
    raw = np.frombuffer(_packed_ints(record, field), np.uint8)
    more = raw >= 128  # a value of 128 or more is its low byte followed by 1
    second = np.concatenate([[False], more[:-1]]) if len(raw) else more
    if (raw[second] != 1).any() or (len(raw) and more[-1]):
        raise ValueError("expected integers from 0 to 255")
    return raw[~second]


def decode_tensor(data: Buffer, encoding: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that TFDS stored as one string: its bytes (`bytes`), or these compressed (`zlib`)."""
    try:
        kind = np.dtype(dtype if dtype != "bfloat16" else _bfloat16())
    except TypeError:
        raise ValueError(f"an encoded tensor of dtype {dtype!r}, which numpy does not have") from None
    size = kind.itemsize * math.prod(shape)
    if encoding == "zlib":
        try:
            stream = zlib.decompressobj()
            data = stream.decompress(data, size + 1)
        except zlib.error as e:
            raise ValueError(f"an encoded tensor that zlib cannot decompress ({e})") from e
        if not stream.eof:
            raise ValueError(f"an encoded tensor that is truncated or longer than {dtype} of shape {shape}")
    elif encoding != "bytes":
        raise ValueError(f"unknown encoding {encoding!r} of a tensor; expected bytes or zlib")
    if len(data) != size:
        raise ValueError(f"an encoded tensor of {len(data)} bytes; expected {size} for {dtype} of shape {shape}")
    return np.frombuffer(data, kind).reshape(shape)


def count(record: Buffer, field: Field) -> int:
    """Number of values of a feature."""
    if field.kind == FLOAT:
        return len(floats(record, field))
    if field.kind == INT64:
        return int(np.count_nonzero(np.frombuffer(_packed_ints(record, field), np.uint8) < 128))
    return len(bytes_spans(record, field))


def split_feature(record: Buffer, field: Field, edges: Sequence[int]) -> list[bytes]:
    """Cuts a feature into serialized `Feature`s of the values [edges[i], edges[i + 1]); bytes are untouched."""
    if field.kind == BYTES:
        # The list message consists of its values in order, each with its tag.
        at = [field.start, *(end for _, end in bytes_spans(record, field))]
        payloads: list[Buffer] = [record[at[a] : at[b]] for a, b in itertools.pairwise(edges)]
    elif field.kind == FLOAT:
        values = floats(record, field)
        payloads = [_tagged(1, values[a:b].tobytes()) for a, b in itertools.pairwise(edges)]
    elif field.kind == INT64:
        packed = _packed_ints(record, field)
        at_int = np.concatenate([[0], np.flatnonzero(np.frombuffer(packed, np.uint8) < 128) + 1])
        payloads = [_tagged(1, packed[int(at_int[a]) : int(at_int[b])]) for a, b in itertools.pairwise(edges)]
    else:
        return [b""] * (len(edges) - 1)
    return [_tagged(field.kind, payload) for payload in payloads]


def whole_feature(record: Buffer, field: Field) -> bytes:
    """A serialized `Feature` equal to the one in `record`."""
    return _tagged(field.kind, record[field.start : field.stop]) if field.kind else b""


def bytes_feature(values: Iterable[bytes]) -> bytes:
    """A serialized `Feature` with a list of bytes."""
    return _tagged(BYTES, b"".join(_tagged(1, value) for value in values))


def int_feature(values: Iterable[int]) -> bytes:
    """A serialized `Feature` with an int64 list."""
    return _tagged(INT64, _tagged(1, b"".join(varint(v & _64_BITS) for v in values)))


def float_feature(values: np.ndarray) -> bytes:
    """A serialized `Feature` with the values (n,) as a list of float32."""
    return _tagged(FLOAT, _tagged(1, np.ascontiguousarray(values, "<f4").tobytes()))


def serialize(features: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A serialized `Example` from (name, serialized `Feature`) pairs."""
    entries = [_tagged(1, _tagged(1, name) + _tagged(2, feature)) for name, feature in features]
    return _tagged(1, b"".join(entries))


def _bfloat16() -> type:
    import ml_dtypes  # comes with JAX

    return ml_dtypes.bfloat16


def varint(value: int) -> bytes:
    """A number of at least 0 in protobuf's variable length."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tagged(number: int, payload: Buffer) -> bytes:
    return b"".join((bytes((number << 3 | 2,)), varint(len(payload)), payload))


def read_varint(record: Buffer, at: int) -> tuple[int, int]:
    """A number in protobuf's variable length, and the place behind it; IndexError where the record ends within."""
    value = record[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    shift = 7
    while True:
        byte = record[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _messages(record: Buffer, at: int, stop: int):
    """Yields (field number, start, stop) of the length-delimited fields in a byte range."""
    while at < stop:
        tag = record[at]
        at += 1
        if tag >= 128:
            tag, at = read_varint(record, at - 1)
        if tag & 7 != 2:
            raise ValueError(f"unexpected wire type {tag & 7} in a tf.Example")
        length = record[at]
        at += 1
        if length >= 128:
            length, at = read_varint(record, at - 1)
        end = at + length
        if end > stop:
            raise ValueError("a field of the tf.Example runs over its end")
        yield tag >> 3, at, end
        at = end


def _values(record: Buffer, field: Field):
    """Yields (wire type, start, stop) of the runs of a numeric list."""
    at, stop = field.start, field.stop
    while at < stop:
        tag, at = read_varint(record, at)
        wire = tag & 7
        if wire == 2:
            length, at = read_varint(record, at)
            end = at + length
        elif wire == 5:
            end = at + 4
        else:
            _, end = read_varint(record, at)
        if end > stop:
            raise ValueError("a list of the tf.Example runs over its end")
        yield wire, at, end
        at = end


def _packed_ints(record: Buffer, field: Field) -> bytes:
    if field.kind not in (INT64, 0):
        raise ValueError("expected a list of int64")
    parts = []
    for wire, start, stop in _values(record, field):
        if wire not in (0, 2):
            raise ValueError("malformed list of int64")
        parts.append(bytes(record[start:stop]))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _entry(record: Buffer, start: int, stop: int) -> tuple[bytes, tuple[int, int]]:
    name, value = b"", (stop, stop)
    for number, a, b in _messages(record, start, stop):
        if number == 1:
            name = bytes(record[a:b])
        elif number == 2:
            value = (a, b)
    return name, value


def _feature(record: Buffer, start: int, stop: int) -> Field:
    for number, a, b in _messages(record, start, stop):
        if number in (BYTES, FLOAT, INT64):
            return Field(number, a, b)
    return Field(0, stop, stop)
