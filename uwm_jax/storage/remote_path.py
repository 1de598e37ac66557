"""Names of objects in buckets, with the part of `pathlib.Path` that reading needs."""

from __future__ import annotations

import errno
import fnmatch
import functools
import io
import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from uwm_jax.errors import UserError
from uwm_jax.storage import client, environment

SCHEME = "gs://"


@functools.total_ordering
class RemotePath:
    """An object of a bucket, or a folder: the objects whose keys begin with its key and a slash.

    Immutable. It has no `rename`, no `open` for writing and no `__fspath__`: `uwm_jax.files` writes, and what wants a
    local file gets `files.local_copy`. Nothing is cached: each question is one or two requests.

    Args:
      url: `gs://bucket` or `gs://bucket/key`. Double and trailing slashes are dropped.
    """

    __slots__ = ("_path",)
    _path: PurePosixPath

    def __init__(self, url: str):
        if not url.startswith(SCHEME):
            raise ValueError(f"expected gs://bucket/key, found {url!r}")
        parts = [part for part in url[len(SCHEME) :].split("/") if part]
        if not parts or {".", ".."} & set(parts):
            raise ValueError(f"expected gs://bucket/key without . and .., found {url!r}")
        environment.prepare_libraries()
        object.__setattr__(self, "_path", PurePosixPath(*parts))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a RemotePath is immutable")

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (str(self),)

    # --- names ---

    @property
    def bucket(self) -> str:
        return self._parts[0]

    @property
    def key(self) -> str:
        """The object's key; "" for the bucket itself."""
        return "/".join(self._parts[1:])

    @property
    def _parts(self) -> tuple[str, ...]:
        return self._path.parts

    @property
    def parts(self) -> tuple[str, ...]:
        return f"{SCHEME}{self._parts[0]}", *self._parts[1:]

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def stem(self) -> str:
        return self._path.stem

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def parent(self) -> RemotePath:
        return self if len(self._parts) == 1 else _made(self._path.parent)

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        return tuple(_made(path) for path in list(self._path.parents)[:-1])

    def __truediv__(self, other: str | os.PathLike[str]) -> RemotePath:
        return self.joinpath(other)

    def joinpath(self, *others: str | os.PathLike[str]) -> RemotePath:
        path = self._path.joinpath(*others)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self}: cannot be joined with {others}")
        return _made(path)

    def with_name(self, name: str) -> RemotePath:
        return _made(self._path.with_name(name))

    def with_suffix(self, suffix: str) -> RemotePath:
        return _made(self._path.with_suffix(suffix))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return self._path.relative_to(_path_of(other))

    def is_relative_to(self, other: Any) -> bool:
        return isinstance(other, RemotePath) and self._path.is_relative_to(other._path)

    def match(self, pattern: str) -> bool:
        return self._path.match(pattern)

    def absolute(self) -> RemotePath:
        return self

    resolve = expanduser = absolute

    def is_absolute(self) -> bool:
        return True

    def as_posix(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{SCHEME}{self._path}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __hash__(self) -> int:
        return hash((SCHEME, self._path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._path == other._path

    def __lt__(self, other: object) -> bool:
        return self._path < other._path if isinstance(other, RemotePath) else NotImplemented

    # --- questions ---

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return bool(self.key) and client.stat(self.bucket, self.key) is not None

    def is_dir(self) -> bool:
        """Whether there is an object below this name; the bucket itself is a folder even if it is empty."""
        found = client.listing(self.bucket, _below(self), most=1)
        return bool(found.objects or found.prefixes) or not self.key

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> SimpleNamespace:
        """`st_size` in bytes, `generation` and `crc32c` (an integer) of an object.

        Raises:
          FileNotFoundError: there is no object of this name.
        """
        found = client.stat(self.bucket, self.key) if self.key else None
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return _stat(found)

    def iterdir(self) -> Iterator[RemotePath]:
        """The objects and folders right below, in order.

        Raises:
          FileNotFoundError: there are none.
        """
        prefix = _below(self)
        found = client.listing(self.bucket, prefix, "/")
        keys = {entry.key for entry in found.objects if entry.key != prefix}  # which consoles make for a folder
        keys |= {name.removesuffix("/") for name in found.prefixes}
        if not keys and self.key and not found.objects:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return iter(sorted({_listed(self.bucket, key) for key in keys}))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What matches a relative pattern of `*`, `?`, `[...]` and `**`, in order."""
        found, parts = {self}, PurePosixPath(pattern).parts
        for at, part in enumerate(parts):
            found = {match for folder in found for match in folder._matches(part, at == len(parts) - 1)}
        return iter(sorted(p for p in found if p.is_dir()) if pattern.endswith("/") else sorted(found))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """What matches a pattern of one part at any depth, in order."""
        return iter(sorted(p for p in self._everything() if fnmatch.fnmatchcase(p.name, pattern)))

    def _matches(self, part: str, is_last: bool) -> Iterator[RemotePath]:
        if part == "**":
            yield self
            yield from (p for p in self._everything() if is_last or p.is_dir())
        elif any(c in part for c in "*?["):
            try:
                yield from (p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, part))
            except FileNotFoundError:
                return
        elif not is_last or (self / part).exists():
            yield self / part

    def _everything(self) -> set[RemotePath]:
        """All objects and folders below."""
        objects = [path for path, _ in self.objects()]
        return {path for below in objects for path in (below, *below.parents) if len(path.parts) > len(self.parts)}

    def objects(self) -> list[tuple[RemotePath, SimpleNamespace]]:
        """All objects below with what `stat` says of them, in order; one request for each thousand."""
        found = client.listing(self.bucket, _below(self)).objects
        return [(_listed(self.bucket, e.key), _stat(e)) for e in found if not e.key.endswith("/")]

    # --- contents ---

    def read_bytes(self) -> bytes:
        return client.read(self.bucket, self.key)[0]

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        text = self.read_bytes().decode(encoding or "utf-8", errors or "strict")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """The object's contents as a file in memory; `mode` is `r` or `rb`."""
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"{self}: objects are written by uwm_jax.files, not by open(mode={mode!r})")
        data = io.BytesIO(self.read_bytes())
        return data if "b" in mode else io.TextIOWrapper(data, encoding or "utf-8", newline=newline)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: folders are no objects of their own."""

    def unlink(self, missing_ok: bool = False) -> None:
        if not client.delete(self.bucket, self.key) and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))


def _made(path: PurePosixPath) -> RemotePath:
    return RemotePath(f"{SCHEME}{path}")


def check_listed(bucket: str, key: str) -> None:
    """Raises UserError for an object or folder of a listing whose name is no path.

    Joined with a local folder, names such as `folder//etc/passwd` and `folder/../../x` would lead out of it.
    """
    if {"", ".", ".."} & set(key.split("/")):
        raise UserError(
            f"{SCHEME}{bucket}/{key}: an object whose name has an empty part, . or .. is no path. Rename or delete it."
        )


def _listed(bucket: str, key: str) -> RemotePath:
    check_listed(bucket, key)
    return RemotePath(f"{SCHEME}{bucket}/{key}")


def _stat(entry: client.Entry) -> SimpleNamespace:
    return SimpleNamespace(st_size=entry.size, generation=entry.generation, crc32c=entry.crc32c)


def _path_of(other: RemotePath | str) -> PurePosixPath:
    return (other if isinstance(other, RemotePath) else RemotePath(str(other)))._path


def _below(path: RemotePath) -> str:
    """The prefix of the keys below a path."""
    return f"{path.key}/" if path.key else ""
