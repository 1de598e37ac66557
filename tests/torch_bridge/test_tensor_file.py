"""Files that downloads leave in place of tensors are told apart, and incomplete ones counted in bytes."""

from __future__ import annotations

import errno
import gzip
import json
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from uwm_jax import reading
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.tensor_file import read_safetensors, refuse_other_kinds


def safetensors_bytes(dtype: str, size: int) -> bytes:
    header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def test_every_type_that_numpy_and_ml_dtypes_have(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_):
        value = np.arange(8).astype(dtype)
        save_file({"a": value}, path)
        found = read_safetensors(path, "x")["a"]
        assert found.dtype == value.dtype and found.tobytes() == value.tobytes()


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4), ("F8_E8M0", 8)])
def test_quantised_types_are_named(tmp_path: Path, dtype: str, size: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(dtype, size))
    with pytest.raises(UserError, match=f"1 tensors are of type {dtype}, first a. Quantised"):
        read_safetensors(path, "--input: x")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.safetensors", safetensors_bytes("F32", 32)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_safetensors(path, "--input: x")
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{len(whole) - 1} of {len(whole)} bytes, so the download is incomplete"):
        read_safetensors(path, "--input: x")
    path.write_bytes(whole)
    assert not read_safetensors(path, "--input: x")["a"].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"<html>", "a web page"),
        (b"<?xml version='1.0'?><Error/>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-LFS pointer"),
        (gzip.compress(b"tensors", mtime=0), "compressed with gzip"),
        (b'{"error": "Repository not found"}', "JSON text"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_what_downloads_leave(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        refuse_other_kinds(path, f"--input: {path}")
    assert message in str(error.value) and str(path) in str(error.value)


def test_half_of_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "whole.pt", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    refuse_other_kinds(tmp_path / "whole.pt", "x")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="its end is missing, so the download is incomplete"):
        refuse_other_kinds(tmp_path / "half.pt", "x")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), SafetensorError("Stale file handle")])
def test_a_disk_that_fails_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path, failures, slept = tmp_path / "a.safetensors", [error], []
    save_file({"a": np.ones(2)}, path)

    def load(place: Path) -> dict[str, np.ndarray]:
        if failures:
            raise failures.pop()
        return load_file(place)

    monkeypatch.setattr(safetensors.numpy, "load_file", load)
    monkeypatch.setattr(reading.time, "sleep", slept.append)
    assert list(read_safetensors(path, "x")) == ["a"] and slept == [1.0]
