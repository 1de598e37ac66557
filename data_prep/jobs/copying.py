"""Copies the files of a folder, with many reads in flight, so that each is there whole and verified, or not at all.

A file that is read to a local folder grows as `.<name>.<crc32c or size>.part`, which a later job continues, and is
renamed once its CRC-32C is the one expected: that of the dataset's manifest or the sidecar's, else the one that the
bucket states. What is written to a bucket appears whole, and the CRC-32C that the bucket states afterwards is compared.
`manifest.json` and `sidecar.json` come last, and those that are replaced go first, so that a folder with them has all
that they list.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from uwm_jax import files
from uwm_jax.data.records import read_manifest
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.files import Facts, Place
from uwm_jax.reading import again, read_json
from uwm_jax.storage.ranged import RangedFolder

RANGE = 8 << 20  # bytes of a read
LAST = ("sidecar.json", "manifest.json")  # of the files of a folder, in this order

Watch = Callable[[int], None]  # told of bytes that are copied, or were there


class Copied(NamedTuple):
    """What a copy has done.

    Attributes:
        files, size: all of them, and their bytes.
        kept: files that were there already.
        hidden: files of the source whose names begin with a dot, which were left out.
    """

    files: int
    size: int
    kept: int
    hidden: int


class Copy:
    """A copy of a folder's files to another, of which either may lie in a bucket.

    Args:
        source, target: the folders.
        overwrite: whether files of another content may be replaced in a complete target.
        in_flight: reads, or files that are written, at a time.
    Raises:
        UserError: there is nothing to copy; a file that the dataset lists is missing; the target holds another dataset
            or other files.

    Attributes:
        size: bytes of all files.
    """

    def __init__(self, source: Place, target: Place, *, overwrite: bool = False, in_flight: int = 16):
        self._source, self._target, self._in_flight = source, target, in_flight
        there = files.facts_below(source)
        self._hidden = [name for name in there if _is_hidden(name)]
        self._files = {name: found for name, found in there.items() if not _is_hidden(name)}
        if not self._files:
            raise UserError(f"--input={source}: there are no files below it.")
        self._check_listed()
        self._there = files.facts_below(target)
        if not overwrite:
            self._check_target()
        self.size = sum(found.size for found in self._files.values())

    def run(self, watch: Watch = lambda size: None) -> Copied:
        """Copies what is not there."""
        kept = 0
        for name in self._outdated():  # what is replaced in part must not be taken for what it was
            files.remove(self._target / name)
            del self._there[name]
        for names in self._in_order():
            left = [name for name in names if not self._is_there(name)]
            kept += len(names) - len(left)
            watch(sum(self._files[name].size for name in names) - sum(self._files[name].size for name in left))
            if files.is_remote(self._target):
                self._write(left, watch)
            else:
                self._read(left, watch)
        return Copied(len(self._files), self.size, kept, len(self._hidden))

    def _in_order(self) -> Iterator[list[str]]:
        """The names of the files, in groups of which each is complete before the next is begun."""
        last = {name: LAST.index(name.rpartition("/")[2]) for name in self._files if name.rpartition("/")[2] in LAST}
        yield sorted(name for name in self._files if name not in last)
        for number in range(len(LAST)):
            yield sorted(name for name, found in last.items() if found == number)

    def _check_listed(self) -> None:
        """Takes the checksums that the dataset lists, and checks that all that it lists is there."""
        for name, listed in _listed(self._source, self._files).items():
            found = self._files.get(name)
            if found is None or listed.size not in (-1, found.size):
                what = "is missing" if found is None else f"has {found.size} bytes in place of {listed.size}"
                raise UserError(f"{self._source / name} {what}: the source is damaged. Copy it or make it again.")
            if listed.crc32c is not None:
                self._files[name] = Facts(found.size, listed.crc32c)

    def _check_target(self) -> None:
        ours = {name for name in self._there if not _is_hidden(name)}
        if others := sorted(ours - self._files.keys()):
            raise UserError(
                f"--output={self._target} holds {len(others)} files that the source lacks, such as {others[0]}. Choose "
                "another folder, or leave them there with --overwrite."
            )
        for name in (name for name in self._outdated() if name in LAST):
            raise UserError(
                f"--output={self._target} is complete and has another {name} than the source. Choose another folder, "
                "or replace it with --overwrite."
            )

    def _outdated(self) -> list[str]:
        """The files of the target that say what is complete there, and differ from the source's."""
        finals = [name for name in self._files.keys() & self._there.keys() if name.rpartition("/")[2] in LAST]
        return sorted(
            name for name in finals if (self._target / name).read_bytes() != (self._source / name).read_bytes()
        )

    def _is_there(self, name: str) -> bool:
        """Whether the target has a file already, whole."""
        found = self._there.get(name)
        if found is None or found.size != self._files[name].size:
            return False
        expected = self._expected(name)
        return (found.crc32c if found.crc32c is not None else _checksum(self._target / name)) == expected.crc32c

    def _expected(self, name: str) -> Facts:
        """A file of the source with its checksum, for which it is read where nothing tells it."""
        found = self._files[name]
        if found.crc32c is None:
            found = self._files[name] = Facts(found.size, _checksum(self._source / name))
        return found

    def _write(self, names: list[str], watch: Watch) -> None:
        """Writes files to a bucket, several at a time."""

        def write(name: str) -> None:
            expected = self._expected(name)
            files.copy_file(self._source / name, self._target / name)
            stated = files.stated_checksum(self._target / name)
            if stated != expected.crc32c:
                files.remove(self._target / name)
                raise UserError(f"{self._source / name} {_damaged(expected.crc32c, stated)}")
            watch(expected.size)

        with ThreadPoolExecutor(self._in_flight, thread_name_prefix="copy") as pool:
            try:
                for _ in pool.map(write, names):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _read(self, names: list[str], watch: Watch) -> None:
        """Reads files to a local folder; their ranges come in order, with as many under way as may be in flight."""
        target = Path(os.fspath(self._target))  # type: ignore[arg-type]
        folder = RangedFolder(self._source)
        growing = {name: _Growing(target / name, self._expected(name)) for name in names}
        ranges = ((name, start) for name in names for start in growing[name].starts)
        begun: collections.deque[tuple[str, int]] = collections.deque()

        def begin(some: Iterable[tuple[str, int]]) -> None:
            for name, start in some:
                folder.begin(name, start, min(start + RANGE, self._files[name].size))
                begun.append((name, start))

        try:
            for name in names:
                file = growing[name]
                file.open()
                watch(file.at)
                for start in file.starts:
                    begin(itertools.islice(ranges, self._in_flight - len(begun)))
                    assert begun.popleft() == (name, start)
                    file.add(self._range(folder, name, start))
                    watch(min(RANGE, self._files[name].size - start))
                file.finish()
        finally:
            folder.forget()

    def _range(self, folder: RangedFolder, name: str, start: int) -> bytes:
        stop = min(start + RANGE, self._files[name].size)
        try:
            return again(lambda: folder.read(name, start, stop), self._source / name)
        except (FileNotFoundError, ValueError) as e:
            raise RunError(
                f"{self._source / name} changed while it was copied ({e}). Start the same command again."
            ) from e


class _Growing:
    """A local file that is read in ranges, in order.

    Args:
        file: where it appears when it is whole.
        found: its size, and the checksum that it has to have.

    Attributes:
        at: bytes that an earlier job has read.
        starts: of the ranges that are left.
    """

    def __init__(self, file: Path, found: Facts):
        self._file, self._found = file, found
        mark = f"{found.size:x}" if found.crc32c is None else f"{found.crc32c:08x}"
        self._part = file.with_name(f".{file.name}.{mark}.part")
        size = self._part.stat().st_size if self._part.exists() else 0
        self.at = min(size, found.size) // RANGE * RANGE
        self.starts = range(self.at, found.size, RANGE)
        self._crc32c = 0

    def open(self) -> None:
        """Takes what an earlier job has read."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("ab") as out:
            out.truncate(self.at)
        if self.at:
            self._crc32c = _checksum(self._part)

    def add(self, data: bytes) -> None:
        """Takes the next range."""
        with self._part.open("ab") as out:
            out.write(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)

    def finish(self) -> None:
        """Puts the file in its place.

        Raises:
            UserError: it has another checksum than it has to have.
        """
        if self._found.crc32c not in (None, self._crc32c):
            self._part.unlink()
            raise UserError(f"{self._file} {_damaged(self._found.crc32c, self._crc32c)}")
        files.sync(self._part)
        os.replace(self._part, self._file)


def _damaged(expected: int | None, found: int | None) -> str:
    shown = [f"{value:08x}" if value is not None else "none" for value in (expected, found)]
    return (
        f"was copied with the CRC-32C {shown[1]}, expected {shown[0]}: the source is damaged, or was changed "
        "meanwhile. The copy was removed. Start the same command again, or make the source again."
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _listed(folder: Place, there: Mapping[str, Facts]) -> dict[str, Facts]:
    """The files that a dataset and its sidecars list; sizes are -1 where they are not listed."""
    listed: dict[str, Facts] = {}
    if "manifest.json" in there:
        try:
            manifest = read_manifest(folder)
        except UserError as e:
            warn(f"{e} Its files are copied as they are.")
            manifest = {"splits": {}}
        for info in manifest["splits"].values():
            listed |= {entry["file"]: Facts(entry["bytes"], entry.get("crc32c")) for entry in info["shards"]}
            listed |= {name: Facts(-1, entry["crc32c"]) for name, entry in info["files"].items()}
    for name in there:
        if name.endswith("/sidecar.json"):
            with contextlib.suppress(KeyError, TypeError, AttributeError):  # opening it tells what is wrong
                entries = read_json(folder / name)["files"].items()
                outer = name.removesuffix("sidecar.json")
                listed |= {f"{outer}{file}": Facts(entry["bytes"], entry["crc32c"]) for file, entry in entries}
    return listed


def _checksum(file: Place) -> int:
    crc32c = 0
    with file.open("rb") as stream:
        while block := stream.read(RANGE):
            crc32c = google_crc32c.extend(crc32c, block)
    return crc32c
