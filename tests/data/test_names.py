"""Names that would lead out of a dataset, and files that are something else."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from uwm_jax.data.names import check_name, not_the_data
from uwm_jax.errors import UserError

BAD = ["..", ".", "", "../x", "/etc", "a/..", "a\\b", "..\\x", "a\x00b", "a\n", "a\ud800", "x" * 300]


@pytest.mark.parametrize("name", [*BAD, "a/b"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"FILE: the split is .*, which cannot name a file inside the dataset"):
        check_name(name, "the split", "FILE")


@pytest.mark.parametrize("name", [*BAD, "a//b", "a/../b", "/a/b", "a/b/", "./a", "a/.", "a/b\\c"])
def test_nested_names_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="which cannot name a file"):
        check_name(name, "the step key", "FILE", nested=True)


@pytest.mark.parametrize("name", ["a", "a.b", "a..b", "...", "träume", ".hidden", "x" * 240])
def test_names_that_are_kept(name: str) -> None:
    assert check_name(name, "the split", "FILE") == name
    assert check_name(f"a/{name}"[:240], "the step key", "FILE", nested=True)


def test_a_name_that_is_no_string() -> None:
    with pytest.raises(UserError, match="FILE: the split is 3; expected a string"):
        check_name(3, "the split", "FILE")


def test_files_that_are_not_the_data(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    assert "is a Git LFS pointer" in not_the_data(file) and "git lfs pull" in not_the_data(file)
    file.write_bytes(gzip.compress(b"records"))
    assert "is a directory" in not_the_data(tmp_path)
    assert "is compressed by gzip" in not_the_data(file)
    for data in (b"", b"version", b"\x10\0\0\0\0\0\0\0"):
        file.write_bytes(data)
        assert not_the_data(file) == ""
