"""Checks of untrusted names that become paths in a dataset, and of placeholders in place of data files."""

from __future__ import annotations

from pathlib import Path

from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, as_place

_MAX_NAME = 240  # bytes; file systems take 255, and a suffix is added
_SMALL = 1 << 12  # bytes; a pointer has some 130
_LFS, _GZIP = b"version https://git-lfs.github.com/spec", b"\x1f\x8b"


def check_name(name: object, what: str, where: object, *, nested: bool = False) -> str:
    """A name that becomes part of a path and must not lead out of the dataset's directory.

    Args:
        what: description of the named thing ("the split"); where: the file that contains the name.
        nested: whether it may have several parts separated by `/`, like keys of features and files in folders.
    Returns:
        The name.
    Raises:
        UserError: it is not a string, is empty or absolute, has a part `.` or `..`, a `/` (unless nested), a backslash,
            a control character or an unpaired surrogate, or is too long for a file.
    """
    if not isinstance(name, str):
        raise UserError(f"{where}: {what} is {name!r}; expected a string.")
    parts = name.split("/") if nested else [name]
    bad = "\\" in name or any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in name)
    bad = bad or not {"", ".", ".."}.isdisjoint(parts) or "/" in parts[0]
    if bad or len(name.encode(errors="replace")) > _MAX_NAME:
        shown = name if len(name) <= 80 else name[:80] + "..."
        raise UserError(
            f"{where}: {what} is {shown!r}, which cannot name a file inside the dataset: expected at most {_MAX_NAME} "
            f"bytes of UTF-8 without `..`, backslashes, control characters{'' if nested else ', `/`'} or empty parts. "
            "Rename it."
        )
    return name


def not_the_data(file: AnyPath) -> str:
    """The kind of placeholder that a file is, with the remedy: a Git LFS pointer, a gzip file, a directory; else ""."""
    place = as_place(file)
    if not isinstance(place, Path) and place.stat().st_size > _SMALL:  # an object comes whole
        return ""
    try:
        with place.open("rb") as f:
            head = f.read(len(_LFS))
    except IsADirectoryError:
        return "is a directory, not a file: remove it and copy the file again"
    if head == _LFS:
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    if head[:2] == _GZIP:
        return "is compressed by gzip: decompress it with `gunzip`"
    return ""
