"""The hand-written wire format against protobuf's own messages."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from uwm_jax.data import example


def _message() -> tf_example_pb2.Example:
    rng = np.random.default_rng(0)
    message = tf_example_pb2.Example()
    f = message.features.feature
    f["floats"].float_list.value.extend(rng.normal(size=300))
    f["ints"].int64_list.value.extend([0, 1, 127, 128, -1, -(1 << 63), (1 << 63) - 1, 300, 1 << 35])
    f["bytes"].bytes_list.value.extend([b"", b"a", bytes(range(256)) * 3, b"\xff" * 20_000])
    f["none"].bytes_list.SetInParent()
    f["unset"].SetInParent()
    return message


def test_reads_what_protobuf_wrote() -> None:
    message = _message()
    record = message.SerializeToString()
    for view in (record, memoryview(record)):
        fields = example.scan(view)
        f = message.features.feature
        assert set(fields) == {k.encode() for k in f}
        np.testing.assert_array_equal(example.floats(view, fields[b"floats"]), np.float32(f["floats"].float_list.value))
        np.testing.assert_array_equal(example.ints(view, fields[b"ints"]), f["ints"].int64_list.value)
        spans = example.bytes_spans(view, fields[b"bytes"])
        assert [bytes(view[a:b]) for a, b in spans] == list(f["bytes"].bytes_list.value)
        assert example.bytes_spans(view, fields[b"bytes"], 2) == spans[:2]
        counts = {k: example.count(view, field) for k, field in fields.items()}
        assert counts == {b"floats": 300, b"ints": 9, b"bytes": 4, b"none": 0, b"unset": 0}
        assert set(example.scan(view, {b"ints", b"absent"})) == {b"ints"}


def test_unpacked_lists_are_read() -> None:
    # Old writers give every number a field of its own: floats 1.5 and -2 (wire type 5), ints 7 and 300 (0).
    floats = b"\x0d" + np.float32(1.5).tobytes() + b"\x0d" + np.float32(-2).tobytes()
    ints = b"\x08\x07\x08\xac\x02"
    field = example.Field(example.FLOAT, 0, len(floats))
    np.testing.assert_array_equal(example.floats(floats, field), np.float32([1.5, -2]))
    field = example.Field(example.INT64, 0, len(ints))
    np.testing.assert_array_equal(example.ints(ints, field), [7, 300])
    piece = tf_example_pb2.Example.FromString(
        example.serialize([(b"x", example.split_feature(ints, field, [0, 1, 2])[1])])
    )
    assert list(piece.features.feature["x"].int64_list.value) == [300]


def test_split_pieces_are_what_protobuf_reads() -> None:
    message = _message()
    record = message.SerializeToString()
    fields = example.scan(record)
    edges = {b"floats": [0, 7, 7, 300], b"ints": [0, 5, 9], b"bytes": [0, 1, 4], b"none": [0, 0], b"unset": [0, 0]}
    for name, at in edges.items():
        pieces = example.split_feature(record, fields[name], at)
        whole = message.features.feature[name.decode()]
        kind = whole.WhichOneof("kind")
        for piece, a, b in zip(pieces, at, at[1:], strict=False):
            parsed = tf_example_pb2.Example.FromString(example.serialize([(name, piece)]))
            found = parsed.features.feature[name.decode()]
            if kind:
                assert list(getattr(found, kind).value) == list(getattr(whole, kind).value)[a:b]
    copy = example.serialize((name, example.whole_feature(record, field)) for name, field in fields.items())
    assert tf_example_pb2.Example.FromString(copy) == message
    made = tf_example_pb2.Example.FromString(example.serialize([(b"i", example.int_feature([0, 5, 1 << 40]))]))
    assert list(made.features.feature["i"].int64_list.value) == [0, 5, 1 << 40]


def test_damaged_records_raise() -> None:
    record = _message().SerializeToString()
    for broken in (record[:-5], record[:3], b"\x0b" + record, b"\x0a\xff"):
        with pytest.raises(ValueError):
            fields = example.scan(broken)
            raise AssertionError(f"read {fields}")


def test_small_ints_are_the_ints() -> None:
    values = list(np.random.default_rng(0).integers(0, 256, 999)) + [0, 127, 128, 255]
    for wrong in ([], [256], [-1], [1 << 40]):
        message = tf_example_pb2.Example()
        message.features.feature["x"].int64_list.value.extend([*values, *wrong])
        record = message.SerializeToString()
        field = example.scan(record)[b"x"]
        if wrong:
            with pytest.raises(ValueError, match="integers from 0 to 255"):
                example.small_ints(record, field)
        else:
            found = example.small_ints(record, field)
            assert found.dtype == np.uint8 and found.tolist() == values
    assert len(example.small_ints(b"", example.Field(0, 0, 0))) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int8", "uint64", "bool"])
@pytest.mark.parametrize("encoding", ["bytes", "zlib"])
def test_encoded_tensors(dtype: str, encoding: str) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    values = np.arange(6).reshape(2, 3).astype(kind)
    data = values.tobytes() if encoding == "bytes" else zlib.compress(values.tobytes())
    found = example.decode_tensor(data, encoding, dtype, (2, 3))
    assert found.dtype == kind
    np.testing.assert_array_equal(found, values)
    bomb = bytes(50_000_000) if encoding == "bytes" else zlib.compress(bytes(50_000_000))
    for wrong in (data[:-1], data + b"\1" if encoding == "bytes" else data[1:], bomb, b""):
        with pytest.raises(ValueError, match="encoded tensor"):
            example.decode_tensor(wrong, encoding, dtype, (2, 3))


def test_encodings_and_dtypes_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="unknown encoding 'gzip'"):
        example.decode_tensor(b"", "gzip", "float32", ())
    with pytest.raises(ValueError, match="dtype 'qint8'"):
        example.decode_tensor(b"", "bytes", "qint8", ())
