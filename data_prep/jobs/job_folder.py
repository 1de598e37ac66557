"""Folders of jobs that make a dataset: a killed job continues in its folder, and the dataset appears complete or not at
all.

The job that makes `<name>` works in `.<name>.building` beside it:

- `job.json`: the plan, that is the input and the flags by which a later start recognises the job as its own;
- `lock`: the job holds a lock on it, shared among the processes that run a share of the tasks each (`--task=i/n`), and
  lists the hosts it ran on;
- `parts/<task>/`: one finished task each, renamed to that name when it is complete and on disk; a task in progress is
  in a hidden folder beside them, and holds the lock `parts/<task>.lock`;
- `dataset/`: what is published, by one rename, and `assembled` once it is complete;
- `replaced/`: an older dataset on its way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from uwm_jax.errors import UserError
from uwm_jax.files import Place, write_text
from uwm_jax.reading import read_json

PLAN, RESULT = "job.json", "result.json"
MISSING = "missing"  # in a plan: a value that may become known, or unknown, while the job is under way
_LOCK, _ASSEMBLED = "lock", "assembled"
_PATIENCE = 5.0  # seconds that a share waits for another process to leave a folder that it is about to make or remove


@dataclasses.dataclass(frozen=True)
class JobFolder:
    """The folder of a job in progress; `output` is the dataset's future path, with links resolved."""

    path: Path
    output: Path

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def dataset(self) -> Path:
        return self.path / "dataset"

    @property
    def is_assembled(self) -> bool:
        """Whether `dataset` is complete."""
        return (self.path / _ASSEMBLED).exists() and self.dataset.exists()

    def publish(self) -> None:
        """Renames the complete `dataset` to the output, in place of an older one, and removes the folder."""
        write_text(self.path / _ASSEMBLED, "")
        replaced = self.path / "replaced"
        if self.output.exists():
            self.output.rename(replaced)
        try:
            self.dataset.rename(self.output)
        except BaseException:
            if replaced.exists():
                replaced.rename(self.output)
            raise
        _remove(self.path)


@contextlib.contextmanager
def job_folder(output: Path, plan: Mapping[str, Any], *, alone: bool, overwrite: bool) -> Iterator[JobFolder]:
    """The folder of the job that makes `output`: a new one, or that of a killed job with the same plan.

    After a failure it is kept if it holds finished tasks.

    Args:
        plan: input and flags, JSON values; a nested mapping is compared field by field.
        alone: whether no other process may work in it, else any number of other shares may.
        overwrite: remove the folder of a job with another plan.
    Raises:
        UserError: another job is at work, the folder is of another plan, or it cannot be created.
        OSError: of the block (a full disk, say), naming the file as if it were in `output`.
    """
    target = output.resolve()  # a symbolic link is kept and its target replaced
    folder = _folder_of(target)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = _opened(folder, output, json.loads(json.dumps(plan)), alone=alone, overwrite=overwrite)
        except OSError as e:
            raise UserError(f"{output} cannot be created: {e.filename}: {e.strerror}. Choose another --output.") from e
        stack.enter_context(lock)
        job = JobFolder(folder, target)
        try:
            with named_as_in(output, folder):
                yield job
        finally:
            if folder.exists() and sys.exc_info()[0] is not None:
                if has_finished_tasks(folder):
                    print(f"{folder}: the finished tasks are kept; the same command continues.", file=sys.stderr)
                elif alone:
                    _remove(folder)


@contextlib.contextmanager
def named_as_in(output: Path, folder: Path) -> Iterator[None]:
    """Makes errors of files in `folder`, which will be `output`, name them as if they were there already."""
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        name = str(output) if e.filename is None else str(e.filename).replace(str(folder), str(output))
        raise OSError(e.errno, e.strerror, name) from e


def has_finished_tasks(folder: Path) -> bool:
    return next(folder.glob(f"parts/[!.]*/{RESULT}"), None) is not None or (folder / "dataset").exists()


@contextlib.contextmanager
def claimed(part: Place, *, wait: bool) -> Iterator[bool]:
    """Whether the task that makes `part`, a folder or a file, is this process's own for the block, so that no two do
    the same work.

    The remains of a process that was killed in this task are removed.

    Args:
        wait: until another process leaves the task, instead of returning False.
    """
    if not isinstance(part, Path):  # a bucket has no locks
        yield True
        return
    lock_file = part.with_name(part.name + ".lock")
    begun = lock_file.exists()
    with lock_file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: others may be at it too, and the first to finish counts
            yield True
            return
        # A task that nobody has begun left nothing: to look for it, among as many files as there are tasks, takes long.
        if begun and len(part.name) <= 40:  # `new_folder` and `replacing` shorten others
            for left in part.parent.glob(f".{glob.escape(part.name)}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            for left in part.parent.glob(f".{glob.escape(part.stem)}.*.tmp{glob.escape(part.suffix)}"):
                left.unlink(missing_ok=True)
        yield True


def settle(target: Path, output: Path) -> None:
    """Completes or undoes what a job was killed in while it published `target`; a job in progress is left alone."""
    folder = _folder_of(target)
    for left in target.parent.glob(f".{glob.escape(target.name)}.building.*.removed"):
        shutil.rmtree(left, ignore_errors=True)
    if not folder.exists() or is_dead(folder / _LOCK) is False:
        return
    replaced = folder / "replaced"
    if replaced.exists() and not target.exists():
        replaced.rename(target)
        print(f"restored {output} from {replaced}: a killed job had not yet replaced it")
    elif (folder / _ASSEMBLED).exists() and not (folder / "dataset").exists() and target.exists():
        _remove(folder)


def is_dead(lock_file: Path) -> bool | None:
    """Whether the job that locked a file has ended; None if unknown: it ran on another host, or nothing is locked."""
    try:
        with lock_file.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True if set(lock.read().split()) <= {socket.gethostname()} else None
    except BlockingIOError:
        return False
    except OSError:
        return None if lock_file.parent.exists() else False


def size_in_words(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def size_of(folder: Path) -> str:
    """The size of the files in a folder, in words."""
    size = 0
    for path, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # its job removes it meanwhile
                size += os.stat(os.path.join(path, file)).st_size
    return size_in_words(size)


def _folder_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.building")


def _opened(folder: Path, output: Path, plan: dict[str, Any], *, alone: bool, overwrite: bool) -> IO[str]:
    """Makes the folder, or enters one with the same plan; returns its locked file."""
    while True:
        lock, has_locks = _lock(folder, alone=alone)
        try:
            different = _differences(_agreed_plan(folder, plan), plan)
            if not different:
                _add_host(lock)
                return lock
            what = "; ".join(different[:3]) + ("; ..." if len(different) > 3 else "")
            begun = has_finished_tasks(folder)
            if begun and not overwrite:
                raise UserError(
                    f"{folder} ({size_of(folder)}) is of a job for {output} that was begun with another input or other "
                    f"flags: {what}. Continue it with those, choose another --output, or remove it with --overwrite."
                )
            if not has_locks or not _take_alone(lock, alone):
                raise UserError(
                    f"{folder} may be in use by another process or another host, and is of another input or other "
                    f"flags: {what}. If no job is at work there, remove it by hand."
                )
            if begun:
                print(f"removed {folder} ({size_of(folder)}), of a job begun with another input or flags: {what}")
            _remove(folder)
        except BaseException:
            lock.close()
            raise
        lock.close()


def _lock(folder: Path, *, alone: bool) -> tuple[IO[str], bool]:
    """The locked file of a folder, which is made if it is not there, and whether the file system has locks."""
    deadline = time.monotonic() + (0 if alone else _PATIENCE)
    while True:
        with contextlib.suppress(FileNotFoundError):  # it was removed in the meantime
            (folder / "parts").mkdir(parents=True, exist_ok=True)
            lock = (folder / _LOCK).open("a+")
            try:
                fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                if _is_file_of(lock, folder / _LOCK):
                    return lock, True
            except BlockingIOError:
                pass
            except OSError:
                return lock, False
            lock.close()
        if time.monotonic() > deadline:
            hosts = ", ".join((folder / _LOCK).read_text().split()) if (folder / _LOCK).exists() else ""
            raise UserError(
                f"{folder}: another job is at work there{f' (on {hosts})' if hosts else ''}. Wait for it or end it; "
                "processes share the work only if each has its --task=i/n."
            )
        time.sleep(0.05)


def _is_file_of(lock: IO[str], path: Path) -> bool:
    """Whether an open file is still what `path` names, rather than one that was removed or replaced."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False


def _take_alone(lock: IO[str], alone: bool) -> bool:
    """Whether the holder of a lock may remove its folder: no other process holds it, on this host or any other."""
    if not alone:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    lock.seek(0)
    return set(lock.read().split()) <= {socket.gethostname()}


def _add_host(lock: IO[str]) -> None:
    lock.seek(0)
    if socket.gethostname() not in lock.read().split():
        lock.write(socket.gethostname() + "\n")
        lock.flush()


def _agreed_plan(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan of a folder: what is stored, else `plan`, which is then stored."""
    with (folder / (PLAN + ".lock")).open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / PLAN).exists():
            write_text(folder / PLAN, json.dumps(plan))
            return plan
        try:
            stored = read_json(folder / PLAN)
        except UserError:
            return {}
    return stored if isinstance(stored, dict) else {}


def _differences(stored: Mapping[str, Any], plan: Mapping[str, Any], prefix: str = "") -> list[str]:
    """In words, the fields in which two plans differ."""
    found = []
    for name in dict.fromkeys([*stored, *plan]):
        old, new = stored.get(name), plan.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}: ")
        elif old != new and MISSING not in (old, new):
            found.append(f"{prefix}{name} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = "not given" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _remove(folder: Path) -> None:
    """Removes a folder so that nobody sees a part of it."""
    gone = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.removed")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
