"""Output directories of jobs: they appear complete or not at all, and only directories of such jobs are ever deleted.

A job that cannot continue builds `.<name>.<id>.building` next to its output and renames it. That directory holds a
file with the name of the host, which the job has locked, so that a later job can distinguish the remains of a killed
job from one in progress. Jobs that continue after they were killed work in a `data_prep.jobs.job_folder`.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from data_prep.jobs.job_folder import is_dead, named_as_in, settle, size_in_words, size_of
from uwm_jax import cli
from uwm_jax.errors import UserError
from uwm_jax.files import Place, is_remote, local_path

_LOCK = ".building.lock"


def local_output(name: str = "output") -> Path:
    """The path of a required flag, in which a job works with links, locks and renames, so that it must be local.

    Raises:
      UserError: it is in a bucket; names the command that brings the result there.
    """
    return local_place(cli.required_path(name), f"--{name}")


def local_place(path: Place, flag: str) -> Path:
    """`path`, if it is local; raises UserError as `local_output`."""
    if is_remote(path):
        raise UserError(
            f"{flag}={path}: this job writes to a local or mounted file system. Write there, then bring the result "
            f"into the bucket: python -m data_prep.copy --input=DIR --output={path}"
        )
    return local_path(path, flag)


def is_vacant(output: Path) -> bool:
    """Whether `output` does not exist or is an empty directory."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


def check_output(
    output: Path, is_ours: Callable[[Path], bool], what: str, *, overwrite: bool, source: Path | None = None
) -> None:
    """Checks that a job may create or replace the directory `output`.

    First removes or restores the remains of killed jobs, as `clear_leftovers` does.

    Args:
        is_ours: whether a directory is of the kind that the job makes, so that `overwrite` may replace it.
        what: the name of that kind, for messages.
        source: the job's input; neither may be inside the other, since replacing one would delete both.

    Raises:
        UserError: `output` cannot be used.
    """
    try:
        output.resolve()
    except RuntimeError as e:  # until Python 3.13
        raise UserError(f"--output={output}: {e}. Choose another --output.") from e
    if source is not None:
        a, b = source.resolve(), output.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise UserError(
                f"--output={output} and the input {source} are the same directory, or one is inside the other. "
                "Choose an --output outside the input."
            )
    clear_leftovers(output)
    if is_vacant(output):
        return
    if not overwrite:
        raise UserError(f"{output} exists. Choose another --output, or replace it with --overwrite.")
    if not output.is_dir() or not is_ours(output):
        raise UserError(
            f"{output} exists and is not {what}, so --overwrite does not replace it. "
            "Choose another --output, or remove it by hand."
        )


def warn_of_space(output: Path, needed: int, what: str) -> None:
    """Warns if the disk of `output` has less free space than `needed` bytes, the size of `what`."""
    there = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        print(
            f"warning: {size_in_words(free)} are free for {output}, but {what} has {size_in_words(needed)}, and the "
            "output is of about the same size. Free some space, or choose another --output."
        )


@contextlib.contextmanager
def building(output: Path) -> Iterator[Path]:
    """A new directory next to `output` that replaces it if the block succeeds.

    Until then, and if the block fails, `output` is unchanged; after a failure the new directory is removed.

    Raises:
        UserError: the directory cannot be created.
        OSError: of the block (a full disk, say), naming the file as if it were in `output`.
    """
    target = output.resolve()  # a symbolic link is kept and its target replaced
    clear_leftovers(output)
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.building")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _make_locked(new)
    except OSError as e:
        raise UserError(f"{output} cannot be created: {e.filename}: {e.strerror}. Choose another --output.") from e
    try:
        with named_as_in(output, new):
            yield new
            _replace(target, new)
    finally:
        lock.close()
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Adds the file's name to errors of writing to it, which those of open files lack."""
    try:
        yield
    except OSError as e:
        if e.errno is None or e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, str(file)) from e


def _make_locked(new: Path) -> IO[str]:
    """Creates a directory that appears with its lock held; returns the locked file."""
    hidden = new.with_suffix(".new")
    hidden.mkdir()
    try:
        lock = (hidden / _LOCK).open("w")
        lock.write(socket.gethostname())
        lock.flush()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (
            OSError
        ):  # a file system without locks: no later job can tell whether this one is alive, so none may delete
            (hidden / _LOCK).unlink()
        hidden.rename(new)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return lock


def clear_leftovers(output: Path) -> None:
    """Removes the remains of killed jobs next to `output`, restores a directory that one had moved away, and prints it.

    The directory of a running job is kept; that of a job on another host, or without a lock, is kept with a note.
    """
    target = output.resolve()
    settle(target, output)
    names = glob.escape(f".{target.name}.") + "[0-9a-f]" * 8
    for left in sorted(target.parent.glob(names + ".building")):
        dead = is_dead(left / _LOCK)
        size = size_of(left) if dead is not False else ""
        if dead:
            shutil.rmtree(left, ignore_errors=True)
            print(f"removed {left} ({size}), left behind by a killed job")
        elif dead is None:
            print(f"note: {left} ({size}) may be left behind by a killed job; if none is running, remove it")
    for old in sorted(target.parent.glob(names + ".replaced")):
        if old.with_suffix(".building").exists():
            continue  # a job is replacing it
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            print(f"removed {old}, which a killed job had replaced by {output}")
        else:
            old.rename(target)
            print(f"restored {output} from {old}: a killed job had not yet replaced it")


def _replace(target: Path, new: Path) -> None:
    lock = new / _LOCK
    if not target.exists():
        lock.unlink(missing_ok=True)
        new.rename(target)
        return
    old = new.with_suffix(".replaced")
    target.rename(old)
    try:
        lock.unlink(missing_ok=True)
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
