"""User-given paths, local and in buckets, and atomic writes of files and folders.

Every path of a flag, a config field or an environment variable goes through `place`, or through `local_path` where it
must be local; every file that a command writes goes through `replacing`, `writing`, `write_text` or `write_bytes`,
every folder that must appear complete through `new_folder`. A place is a `pathlib.Path` or a `RemotePath`, and this is
the only module that knows which: others ask `is_remote`, and get files for libraries that want them by `local_copy`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from uwm_jax.errors import UserError
from uwm_jax.storage import client, environment, transfers
from uwm_jax.storage.client import Generation
from uwm_jax.storage.remote_path import SCHEME, RemotePath
from uwm_jax.storage.retries import within

__all__ = ["Generation", "Place", "RemotePath", "within"]  # which are defined elsewhere

Place = Path | RemotePath
AnyPath = str | os.PathLike[str] | RemotePath

environment.prepare()  # before tensorstore is imported, which reads some of it only then

READER_SECONDS = 10.0  # how long to wait for a reader of a FIFO

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # `Path` collapses the two slashes to one
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_LONGEST_KEY = 1024  # bytes in UTF-8
_OPEN_FILES = ("/dev/fd/", "/dev/stdout", "/dev/stderr", "/proc/")  # open file descriptors under a path


def place(value: AnyPath, flag: str) -> Place:
    """A user-given path: local, with `~` expanded, or `gs://bucket/key`.

    Args:
      flag: the flag, config field or variable that it comes from, for messages: `--workdir`, `config.init_from`.

    Raises:
      UserError: a URL of another scheme, an invalid name of a bucket or an object, or as `local_path`.
    """
    if isinstance(value, RemotePath):
        return value
    text = os.fspath(value)
    scheme = _SCHEME.match(text)
    if not scheme:
        return local_path(value, flag)
    if scheme.group() != "gs:/":
        raise UserError(f"{flag}={text}: {scheme.group()}/ is not supported. Expected a local path or gs://bucket/key.")
    bucket, *parts = [part for part in text[len("gs:") :].split("/") if part] or [""]
    if not _BUCKET.fullmatch(bucket):
        raise UserError(
            f"{flag}={text}: {bucket!r} is no name of a bucket (3 to 222 of a-z, 0-9, -, _, .). Expected gs://bucket/key."
        )
    key = "/".join(parts)
    if {".", ".."} & set(parts) or len(key.encode(errors="replace")) > _LONGEST_KEY or not key.isprintable():
        raise UserError(
            f"{flag}={_shortened(text)!r}: not a usable name of an object (at most {_LONGEST_KEY} bytes of printable "
            "text, no part . or ..)."
        )
    return RemotePath(f"{SCHEME}{bucket}/{key}")


def as_place(value: AnyPath) -> Place:
    """A path that is not user-given (it was checked, or made from one that was), as `pathlib.Path(value)` is."""
    if isinstance(value, RemotePath):
        return value
    text = os.fspath(value)
    return RemotePath(text) if text.startswith(SCHEME) else Path(text)


def is_remote(value: AnyPath) -> bool:
    """Whether a path lies in a bucket."""
    return isinstance(as_place(value), RemotePath)


def local_path(value: AnyPath, flag: str) -> Path:
    """A user-given path that must be local, with `~` expanded.

    Args:
      flag: the flag, config field or variable that it comes from, for messages: `--output`, `config.init_from`.

    Raises:
      UserError: a URL (`gs://...`), the home directory of an unknown user, or an invalid path.
    """
    text = str(value) if isinstance(value, RemotePath) else os.fspath(value)
    scheme = _SCHEME.match(text)
    if scheme:
        raise UserError(
            f"{flag}={text}: {scheme.group()}/ is not supported. Expected a path on a local or mounted file system."
        )
    try:
        path = Path(text).expanduser()
    except RuntimeError as e:
        raise UserError(f"{flag}={text}: the home directory of {text.split('/')[0]!r} is unknown.") from e
    try:
        os.lstat(path)
    except ValueError as e:
        raise UserError(f"{flag}={text!r}: not a valid path ({e}).") from e
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{flag}={_shortened(text)}: not a usable path: {e.strerror}.") from e
    return path


def data_dir() -> Place:
    """$UWM_DATA_DIR, `data/` by default: the directory that relative dataset paths refer to."""
    return place(os.environ.get("UWM_DATA_DIR", "data"), "UWM_DATA_DIR")


def _shortened(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def check_output(path: AnyPath, flag: str) -> None:
    """Raises UserError if a file or folder could not be created at `path`; creates nothing.

    Of a bucket it asks whether it exists and this login may write there (else StorageError).
    """
    if isinstance(path := as_place(path), RemotePath):
        client.check_writable(path.bucket, path.key)
        return
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{flag}: cannot write {str(path)!r}, because {str(nearest)!r} is not a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: cannot write {str(path)!r}, because {str(nearest)!r} is not writable.")


def check_output_file(path: AnyPath, flag: str = "--output") -> None:
    """Like `check_output`, for a file, which may exist already."""
    if isinstance(path := as_place(path), RemotePath):
        if not path.key or path.is_dir():
            raise UserError(f"{flag}: {str(path)!r} is a folder; name an object.")
        client.check_writable(path.bucket, path.key)
        return
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return  # a FIFO or a device can be written to in any folder
    check_output(path, flag)
    if os.path.isdir(path):
        raise UserError(f"{flag}: {str(path)!r} is a folder; name a file.")


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """A temporary local file, with the suffix of `path`, that replaces `path` if the block succeeds.

    A regular file is replaced by rename, so neither a reader nor a crash sees a partial one. A symbolic link is kept
    and its target replaced; a FIFO or a device is written to. Parent folders are created. An object of a bucket is
    uploaded; until then readers see the old one.

    Raises:
      OSError: names `path`, also if the disk is full.
      UserError: `path` is a folder, or a FIFO without a reader.
    """
    if isinstance(path := as_place(path), RemotePath):
        with tempfile.TemporaryDirectory(prefix="uwm_upload_") as folder:
            temporary = Path(folder) / path.name
            temporary.touch()
            yield temporary
            transfers.upload(temporary, path)
        return
    target = _regular_target(path)
    stem, suffix = path.stem[:40], path.suffix[-20:]
    parent = target.parent if target else Path(tempfile.gettempdir())
    temporary = parent / f".{stem}.{secrets.token_hex(4)}.tmp{suffix}"
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            if target:
                sync(temporary)
                os.replace(temporary, target)
                with contextlib.suppress(OSError):  # a file system that does not sync folders
                    sync(parent)
            else:
                _copy_into(path, temporary)
        except OSError as e:
            if e.errno is None or not _lies_in(e.filename, temporary):
                raise
            raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Waits until what was written to a file or folder is on disk: after a crash, a rename must not lead to less."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular_target(path: Path) -> Path | None:
    """The regular file that `path` is or links to, which need not exist; None for a FIFO, a device or a descriptor."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder; expected a file name.")
    if not stat.S_ISREG(mode) or os.path.abspath(path).startswith(_OPEN_FILES):
        return None
    return Path(os.path.realpath(path))


def _copy_into(path: Path, source: Path) -> None:
    deadline = time.monotonic() + READER_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_TRUNC)
            break
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise UserError(f"{path}: this FIFO has no reader; start one, or name a file.") from e
        time.sleep(0.1)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as out, source.open("rb") as file:
        shutil.copyfileobj(file, out)


@contextlib.contextmanager
def writing(path: AnyPath, mode: str = "w") -> Iterator[IO[Any]]:
    """A file open for text in UTF-8 (`w`) or bytes (`wb`) that replaces `path` as in `replacing`."""
    with replacing(path) as temporary, temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.close()


def write_text(path: AnyPath, text: str) -> None:
    """Writes a text file in UTF-8 atomically, as `replacing` does."""
    write_bytes(path, text.encode())


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Writes a file atomically, as `replacing` does."""
    if isinstance(path := as_place(path), RemotePath) and len(data) <= client.ONE_REQUEST:
        client.write(path.bucket, path.key, data)
        return
    with writing(path, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def new_folder(path: AnyPath, last: str | None = None) -> Iterator[Path]:
    """A temporary local folder that becomes `path` if the block succeeds; `path` is absent or empty.

    A local one lies next to `path` and is renamed. A symbolic link to an empty folder is kept and its target replaced.
    Parent folders are created. In a bucket, files are uploaded one by one, `last` at the end.

    Args:
      last: the file, relative to the folder, whose presence tells readers of a bucket that the folder is complete.
    """
    if isinstance(path := as_place(path), RemotePath):
        if path.is_dir():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        with tempfile.TemporaryDirectory(prefix="uwm_upload_") as folder:
            yield Path(folder)
            transfers.upload_tree(Path(folder), path, last)
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rmdir()  # fails if it is no longer empty
        for file in temporary.rglob("*"):
            sync(file)
        os.replace(temporary, target)
    except OSError as e:
        if e.errno is None or not _lies_in(e.filename, temporary):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(new: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Puts the folder `new` in the place of `target`, and what was there in the place of `new`.

    Nobody sees neither where the kernel can exchange two names (Linux, on most file systems); elsewhere there is a
    moment without `target`.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD: paths are relative to the current directory
    names = os.fsencode(new), os.fsencode(target)
    if rename is not None and rename(here, names[0], here, names[1], 2) == 0:  # RENAME_EXCHANGE
        return
    aside = f"{os.fspath(new)}.aside"
    os.rename(target, aside)
    os.rename(new, target)
    os.rename(aside, new)


def remove(path: AnyPath, missing_ok: bool = False) -> None:
    """Deletes a file or a folder with all that is in it.

    Raises:
      FileNotFoundError: there is neither, unless `missing_ok`.
    """
    if isinstance(path := as_place(path), RemotePath):
        below = transfers.objects_below(path)
        transfers.delete_objects(path.bucket, below)
        path.unlink(missing_ok=missing_ok or bool(below))
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=missing_ok)


def move(path: AnyPath, to: AnyPath) -> None:
    """Renames a file or folder; in a bucket, or to and from one, it is copied and then deleted, which is not atomic.

    An existing file `to` is replaced.
    """
    path, to = as_place(path), as_place(to)
    if isinstance(path, Path) and isinstance(to, Path):
        os.replace(path, to)
        return
    if path.is_dir():
        copy_tree(path, to)
    else:
        copy_file(path, to)
    remove(path)


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copies a file or an object, atomically as `replacing` does."""
    source, target = as_place(source), as_place(target)
    if isinstance(source, RemotePath) and isinstance(target, RemotePath):
        client.copy((source.bucket, source.key), (target.bucket, target.key))
    elif isinstance(target, RemotePath):
        transfers.upload(Path(str(source)), target)
    else:
        with replacing(target) as temporary:
            if isinstance(source, RemotePath):
                client.download(source.bucket, source.key, temporary)
            else:
                shutil.copyfile(source, temporary)


class Facts(NamedTuple):
    """What a listing tells of a file: its size in bytes, and in a bucket its CRC-32C."""

    size: int
    crc32c: int | None


def facts_below(folder: AnyPath) -> dict[str, Facts]:
    """{name relative to a folder: its facts} of all files below it, which in a bucket one listing tells."""
    found = as_place(folder)
    if isinstance(found, RemotePath):
        entries, skipped = transfers.objects_below(found), len(found.key) + 1 if found.key else 0
        return {entry.key[skipped:]: Facts(entry.size, entry.crc32c) for entry in entries}
    there = (file for file in found.rglob("*") if file.is_file())
    return {file.relative_to(found).as_posix(): Facts(file.stat().st_size, None) for file in there}


def stated_checksum(file: AnyPath) -> int | None:
    """The CRC-32C that a bucket states of an object; None for a local file, and where it states none.

    Raises:
      FileNotFoundError: there is no such object.
    """
    found = as_place(file)
    return found.stat().crc32c if isinstance(found, RemotePath) else None


def copy_tree(source: AnyPath, target: AnyPath, last: str | None = None) -> None:
    """Copies all files of a folder into another, which may exist; 16 at a time where one of them is in a bucket.

    Args:
      last: a file, relative to the folder, that is copied after all others, as in `new_folder`.

    Raises:
      FileNotFoundError: `source` does not exist.
    """
    source, target = as_place(source), as_place(target)
    if isinstance(source, RemotePath):
        transfers.copy_objects(source, target, last)
    elif isinstance(target, RemotePath):
        os.stat(source)
        transfers.upload_tree(source, target, last)
    else:
        shutil.copytree(source, target, dirs_exist_ok=True)


def local_copy(path: AnyPath) -> Path:
    """A file or folder as local files, for libraries that want those: itself, or what was downloaded.

    Downloads are kept until this process ends, and used again while the objects have the same generations.

    Raises:
      FileNotFoundError: it does not exist.
    """
    if isinstance(path := as_place(path), Path):
        return path
    found = client.stat(path.bucket, path.key) if path.key else None
    entries = transfers.objects_below(path) if found is None else [found]
    state = repr([(entry.key, entry.generation) for entry in entries])
    folder = _download_folder() / hashlib.sha256(f"{path}\n{state}".encode()).hexdigest()[:24]
    if not (folder / path.name).exists():
        with new_folder(folder) as temporary:
            if found is None:
                transfers.download_objects(path, temporary / path.name, entries)
            else:
                client.download(path.bucket, path.key, temporary / path.name)
    return folder / path.name


@functools.cache
def _download_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="uwm_download_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# --- preconditions ---------------------------------------------------------------------------------------------------


def create(path: AnyPath, data: bytes) -> Generation | None:
    """Writes a file that must not exist yet; its generation, or None if it does."""
    if isinstance(path := as_place(path), RemotePath):
        return client.write(path.bucket, path.key, data, generation="0")
    with _alone_in(path.parent):
        if os.path.lexists(path):
            return None
        write_bytes(path, data)
        return _generation(path)


def read_with_generation(path: AnyPath) -> tuple[bytes, Generation] | None:
    """A file's contents with the generation that they are of; None if it does not exist."""
    path = as_place(path)
    try:
        if isinstance(path, RemotePath):
            return client.read(path.bucket, path.key)
        with _alone_in(path.parent):
            return path.read_bytes(), _generation(path)
    except FileNotFoundError:
        return None


def replace_if(path: AnyPath, data: bytes, generation: Generation) -> Generation | None:
    """Writes a file if it still has this generation; its new one, or None if somebody else wrote or deleted it."""
    if isinstance(path := as_place(path), RemotePath):
        return client.write(path.bucket, path.key, data, generation=generation)
    with _alone_in(path.parent):
        if not path.exists() or _generation(path) != generation:
            return None
        write_bytes(path, data)
        return _generation(path)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of the same block for the same folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _generation(path: Path) -> Generation:
    """Of a local file: each write makes a new file, so number and time of the file tell it from the last one."""
    found = path.stat()
    return f"{found.st_ino}-{found.st_mtime_ns}"


def _lies_in(name: Any, temporary: Path) -> bool:
    """Whether an error's `filename` is absent or inside the temporary file or folder."""
    return name is None or str(name).startswith(str(temporary))
