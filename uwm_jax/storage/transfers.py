"""Whole folders, up to and down from a bucket, with many requests in flight."""

from __future__ import annotations

import contextvars
import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from uwm_jax.storage import client
from uwm_jax.storage.client import Entry
from uwm_jax.storage.remote_path import RemotePath, check_listed

IN_FLIGHT = 16

_Item = TypeVar("_Item")


def upload_tree(source: Path, target: RemotePath, last: str | None = None) -> None:
    """Writes every file below a local folder.

    Args:
      last: the file, relative to `source`, whose presence says that the folder is complete: it is written after all
        others are.
    """
    names = sorted(f.relative_to(source).as_posix() for f in source.rglob("*") if f.is_file())
    in_parallel(lambda name: upload(source / name, target / name), (name for name in names if name != last))
    if last in names:
        upload(source / last, target / last)


def upload(source: Path, target: RemotePath) -> None:
    client.upload(target.bucket, target.key, source)


def copy_objects(source: RemotePath, target: Path | RemotePath, last: str | None = None) -> None:
    """Copies every object below a folder into a local one or, inside of the service, into another of a bucket.

    Args:
      last: as in `upload_tree`.

    Raises:
      FileNotFoundError: there are no objects below `source`.
    """
    entries = objects_below(source)
    if isinstance(target, Path):
        return download_objects(source, target, entries)
    _check_found(source, entries)

    def copy(entry: Entry) -> None:
        to = target / _name_below(source, entry)
        client.copy((source.bucket, entry.key), (to.bucket, to.key))

    in_parallel(copy, (entry for entry in entries if _name_below(source, entry) != last))
    in_parallel(copy, (entry for entry in entries if _name_below(source, entry) == last))


def download_objects(source: RemotePath, target: Path, entries: list[Entry]) -> None:
    """Writes these objects below `source` into a local folder, which may exist; raises as `copy_objects` does."""
    _check_found(source, entries)

    def fetch(entry: Entry) -> None:
        file = target / _name_below(source, entry)
        file.parent.mkdir(parents=True, exist_ok=True)
        client.download(source.bucket, entry.key, file)

    in_parallel(fetch, entries)


def delete_objects(bucket: str, entries: Iterable[Entry]) -> None:
    in_parallel(lambda entry: client.delete(bucket, entry.key), entries)


def objects_below(place: RemotePath) -> list[Entry]:
    """All objects below a folder; raises UserError where the name of one would lead out of a local copy."""
    found = client.listing(place.bucket, f"{place.key}/" if place.key else "").objects
    entries = [entry for entry in found if not entry.key.endswith("/")]  # consoles make those for empty folders
    for entry in entries:
        check_listed(place.bucket, entry.key)
    return entries


def _name_below(folder: RemotePath, entry: Entry) -> str:
    return entry.key[len(folder.key) + 1 if folder.key else 0 :]


def _check_found(source: RemotePath, entries: list[Entry]) -> None:
    if not entries:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))


def in_parallel(do: Callable[[_Item], Any], items: Iterable[_Item]) -> None:
    """`do(item)` for every item, 16 at a time; the first failure is raised once those under way have ended."""
    items = list(items)
    if len(items) < 2:
        for item in items:
            do(item)
        return
    with ThreadPoolExecutor(min(IN_FLIGHT, len(items)), thread_name_prefix="bucket") as pool:
        # A thread sees the caller's time limit only through a copy of its context.
        futures = [pool.submit(contextvars.copy_context().run, do, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
