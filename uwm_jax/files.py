"""User-given paths, and atomic writes of files and folders.

Every path of a flag, a config field or an environment variable goes through `local_path`; every file that a command
writes goes through `replacing`, `writing`, `write_text` or `write_bytes`, every folder that must appear complete
through `new_folder`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from uwm_jax.errors import UserError

READER_SECONDS = 10.0  # how long to wait for a reader of a FIFO

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # `Path` collapses the two slashes to one
_OPEN_FILES = ("/dev/fd/", "/dev/stdout", "/dev/stderr", "/proc/")  # open file descriptors under a path


def local_path(value: str | os.PathLike[str], flag: str) -> Path:
    """A user-given path, with `~` expanded.

    Args:
      flag: the flag, config field or variable that it comes from, for messages: `--output`, `config.init_from`.

    Raises:
      UserError: a URL (`gs://...`), the home directory of an unknown user, or an invalid path.
    """
    text = os.fspath(value)
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


def data_dir() -> Path:
    """$UWM_DATA_DIR, `data/` by default: the directory that relative dataset paths refer to."""
    return local_path(os.environ.get("UWM_DATA_DIR", "data"), "UWM_DATA_DIR")


def _shortened(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def check_output(path: str | os.PathLike[str], flag: str) -> None:
    """Raises UserError if a file or folder could not be created at `path`; creates nothing."""
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{flag}: cannot write {str(path)!r}, because {str(nearest)!r} is not a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: cannot write {str(path)!r}, because {str(nearest)!r} is not writable.")


def check_output_file(path: str | os.PathLike[str], flag: str = "--output") -> None:
    """Like `check_output`, for a file, which may exist already."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return  # a FIFO or a device can be written to in any folder
    check_output(path, flag)
    if os.path.isdir(path):
        raise UserError(f"{flag}: {str(path)!r} is a folder; name a file.")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file, with the suffix of `path`, that replaces `path` if the block succeeds.

    A regular file is replaced by rename, so neither a reader nor a crash sees a partial one. A symbolic link is kept
    and its target replaced; a FIFO or a device is written to. Parent folders are created.

    Raises:
      OSError: names `path`, also if the disk is full.
      UserError: `path` is a folder, or a FIFO without a reader.
    """
    path = Path(path)
    target = _regular_target(path)
    stem, suffix = path.stem[:40], path.suffix[-20:]
    folder = target.parent if target else Path(tempfile.gettempdir())
    temporary = folder / f".{stem}.{secrets.token_hex(4)}.tmp{suffix}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            if target:
                sync(temporary)
                os.replace(temporary, target)
                with contextlib.suppress(OSError):  # a file system that does not sync folders
                    sync(folder)
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
def writing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file open for text in UTF-8 (`w`) or bytes (`wb`) that replaces `path` as in `replacing`."""
    with replacing(path) as temporary, temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.close()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8 atomically, as `replacing` does."""
    with writing(path) as file:
        file.write(text)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically, as `replacing` does."""
    with writing(path, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder next to `path` that is renamed to `path` if the block succeeds; `path` is absent or empty.

    A symbolic link to an empty folder is kept and its target replaced. Parent folders are created.
    """
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


def _lies_in(name: Any, temporary: Path) -> bool:
    """Whether an error's `filename` is absent or inside the temporary file or folder."""
    return name is None or str(name).startswith(str(temporary))
