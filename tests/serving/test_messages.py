"""The wire format, against messages that are packed by hand, and what it refuses."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from uwm_jax.errors import UserError
from uwm_jax.serving import messages
from uwm_jax.serving.messages import DTYPES, decode, encode

LIMIT = 1 << 20


def array(data: bytes, dtype: object, shape: object, **more: object) -> dict[bytes, object]:
    fields = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    return fields | {key.encode(): value for key, value in more.items()}


def scalar(data: object, dtype: object) -> dict[bytes, object]:
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


def read(**entries: object) -> dict[str, object]:
    return decode(msgpack.packb(entries), LIMIT)


@pytest.mark.parametrize("text", DTYPES)
def test_arrays_of_every_dtype_are_read(text: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(text)
    found = read(x=array(values.tobytes(), text, [2, 3]))["x"]
    assert isinstance(found, np.ndarray) and found.dtype.str == text
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(decode(encode({"x": values}), LIMIT)["x"], values)


def test_scalars_texts_and_numbers_are_read() -> None:
    found = read(a=scalar(3, "<i4"), b=scalar(0.5, "<f4"), c=scalar(True, "|b1"), d="text", e=7, f=0.25, g=True, h=None)
    assert found == {"a": 3, "b": 0.5, "c": True, "d": "text", "e": 7, "f": 0.25, "g": True, "h": None}
    assert isinstance(found["a"], np.int32) and isinstance(found["b"], np.float32) and isinstance(found["c"], np.bool_)


def test_replies_are_what_openpi_unpacks() -> None:
    """By the rule of its unpacker: a map with the mark is `np.ndarray(buffer=data, dtype=dtype, shape=shape)`."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = encode({"actions": values, "server_timing": {"infer_ms": 1.5}, "request_id": "a", "n": np.int32(3)})
    found = msgpack.unpackb(packed)
    assert found["actions"].keys() == {b"__ndarray__", b"data", b"dtype", b"shape"}
    fields = found["actions"]
    back = np.ndarray(buffer=fields[b"data"], dtype=np.dtype(fields[b"dtype"]), shape=fields[b"shape"])
    np.testing.assert_array_equal(back, values)
    assert found["server_timing"] == {"infer_ms": 1.5} and found["request_id"] == "a"
    assert found["n"] == {b"__npgeneric__": True, b"data": 3, b"dtype": "<i4"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"x": array(b"\0" * 16, "O", [2])}, "'x': dtype 'O': expected one of |u1, |b1, <i4, <i8, <f4, <f8"),
        ({"x": array(b"\0" * 16, "|O", [2])}, "dtype '|O'"),
        ({"x": array(b"\0" * 8, ">f4", [2])}, "dtype '>f4'"),
        ({"x": array(b"\0" * 8, "<f4,<f4", [1])}, "dtype '<f4,<f4'"),
        ({"x": array(b"\0" * 8, "<U2", [1])}, "dtype '<U2'"),
        ({"x": array(b"\0" * 8, b"<f4", [2])}, "dtype b'<f4'"),
        ({"x": array(b"\0" * 8, ["<f4"], [2])}, "dtype ['<f4']"),
        ({"x": array(b"\0" * 8, None, [2])}, "dtype None"),
        ({"x": array(b"\0" * 7, "<f4", [2])}, "'x': an array <f4 of shape (2,) needs 8 bytes, found 7"),
        ({"x": array(b"", "<f4", [2**62, 2**62])}, "needs"),
        ({"x": array(b"\0" * 8, "<f4", [-2])}, "shape [-2]: expected a list of at most 8 integers, none negative"),
        ({"x": array(b"\0" * 4, "<f4", [True])}, "shape [True]"),
        ({"x": array(b"\0" * 4, "<f4", [1.0])}, "shape [1.0]"),
        ({"x": array(b"\0" * 4, "<f4", 1)}, "shape 1"),
        ({"x": array(b"\0" * 4, "<f4", [1] * 9)}, "at most 8"),
        ({"x": array(b"", "<f4", [0, 2**63])}, "'x': shape [0, 9223372036854775808]"),
        ({"x": array("text", "|u1", [4])}, "'x': the data of an array are a string: expected bytes"),
        ({"x": array(b"\2", "|b1", [1])}, "'x': an array |b1 holds bytes other than 0 and 1"),
        ({"x": array(b"\0" * 4, "<f4", [1], more=1)}, "'x': the fields b'__ndarray__', b'data'"),
        ({"x": {b"__ndarray__": True}}, "'x': the fields b'__ndarray__': expected"),
        ({"x": {**array(b"\0" * 4, "<f4", [1]), b"__ndarray__": 1}}, "with __ndarray__ true"),
        ({"x": array(np.float32(np.nan).tobytes(), "<f4", [1])}, "'x' holds values that are not finite"),
        ({"x": array(np.float64(np.inf).tobytes(), "<f8", [])}, "'x' holds values that are not finite"),
        ({"x": float("nan")}, "'x' holds values that are not finite"),
        ({"x": scalar(1e300, "<f4")}, "'x' holds values that are not finite"),
        ({"x": scalar(2**31, "<i4")}, "'x': a scalar <i4 is 2147483648"),
        ({"x": scalar(-1, "|u1")}, "'x': a scalar |u1 is -1"),
        ({"x": scalar("1", "<f4")}, "'x': a scalar <f4 is '1'"),
        ({"x": scalar(b"\0" * 8, "O")}, "'x': dtype 'O'"),
        ({"x": b"bytes"}, "'x' is bytes"),
        ({"x": {"y": 1}}, "'x' is a map: expected an array, a number or a string; maps are flat"),
        ({"x": [1, 2]}, "'x' is a list"),
        ({b"x": 1}, "the name b'x' is not a string"),
        ({"x": msgpack.ExtType(5, b"")}, "extension type 5"),
        ({"x": msgpack.ExtType(5, b"data")}, "max_ext_len"),
        ({"x": msgpack.Timestamp(1)}, "max_ext_len"),
        ({"x" * 5000: 1}, "max_str_len"),
        ({f"x{i}": i for i in range(65)}, "max_map_len"),
        ({"x": list(range(65))}, "max_array_len"),
    ],
)
def test_what_is_refused_and_in_which_words(entries: dict[object, object], words: str) -> None:
    with pytest.raises(UserError) as error:
        decode(msgpack.packb(entries), LIMIT)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "not a msgpack map"),
        (b"\xc1", "not a msgpack map"),
        (b"\x81\xa1x", "not a msgpack map"),  # half a map
        (b"\x81\xa1x\x01\x01", "not a msgpack map"),  # more than one
        (b"\x81\xa1\xff\x01", "not a msgpack map"),  # a name that is no UTF-8
        (b"\x81\x01\x01", "not a msgpack map"),  # a name that is a number
        (b"\x82\xa1x\x01\xa1x\x02", "'x' stands twice"),
        (b"\x01", "the message is int: expected one msgpack map"),
        (b"\xc0", "the message is nil"),
        (b"\x90", "the message is a list"),
        (msgpack.packb(array(b"\0" * 4, "<f4", [1])), "the message is"),
        (msgpack.packb(array(b"\0" * 4, "O", [1])), "the message is"),
        (b"\x91" * 100_000, "not a msgpack map"),  # nested without end
        (b"\x81\xa1x" * 100_000, "not a msgpack map"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "max_map_len"),
        (b"\x81\xa1x\xc6\xff\xff\xff\xff", "not a msgpack map"),  # bytes that do not come
        (b"\0" * (LIMIT + 1), f"the message has {LIMIT + 1} bytes: expected at most {LIMIT}"),
    ],
)
def test_what_is_no_message(message: bytes, words: str) -> None:
    with pytest.raises(UserError) as error:
        decode(message, LIMIT)
    assert words in str(error.value)


@pytest.mark.parametrize("leaf", [b"\x80", b"\x90", b"\x81\xa1x\x01"])
def test_nested_containers_end_the_reading_early(leaf: bytes) -> None:
    """Each level has few entries, and all together are as many as the message has bytes."""
    for _ in range(3):
        leaf = b"\xdc\x00\x40" + 64 * leaf
    count = 0

    def counted(pairs: object) -> object:
        nonlocal count
        count += 1
        return pairs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "_map", counted)
        patch.setattr(messages, "_List", counted)
        with pytest.raises(UserError, match=f"more than {messages.MOST_CONTAINERS} maps and lists"):
            decode(b"\x81\xa1x" + leaf, 2 * LIMIT)
    assert count == messages.MOST_CONTAINERS


def test_the_largest_message_of_arrays_is_read() -> None:
    entries = {f"x{i}": array(b"\0" * 4, "<f4", [1]) for i in range(messages.MOST_ENTRIES)}
    assert len(read(**entries)) == messages.MOST_ENTRIES


def test_values_without_a_place_in_a_reply_are_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="no place"):
        encode({"x": np.array(["a"])})
