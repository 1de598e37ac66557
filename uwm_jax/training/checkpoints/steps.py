"""Which steps of a workdir have a finished checkpoint. Looking does not import jax: supervisors and pages do it.

Locally a save is renamed to `checkpoints/<step>` when it is complete. Nothing can be renamed in a bucket. There the
objects of a save lie in `checkpoints/<step>-<nonce>/`, and it counts once its marker exists, the object
`checkpoints/<step>-<nonce>.commit`. The nonce is that of the workdir's lock (`lease.py`) when the save began, so no two
holders of the lock share a folder or a marker. The lock also tells up to which step markers of earlier nonces count:
what a process that lost the lock still writes, however late, counts for nothing.

A folder `<step>` that was uploaded as a whole counts in a bucket with a marker `<step>.commit` (`mark`). A folder with
`.corrupt` or `.set_aside` next to it was left out by a run, and is kept. A downloaded workdir is read the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from uwm_jax import files
from uwm_jax.files import AnyPath, Place
from uwm_jax.reading import again

COMMIT, CORRUPT, SET_ASIDE = ".commit", ".corrupt", ".set_aside"
LOCK = ".lock"  # in the workdir

_FOLDER = re.compile(r"(\d+)(?:-([0-9a-f]+))?")


class Folder(NamedTuple):
    """The folder of a save by its name, `<step>` or `<step>-<nonce>`."""

    step: int
    nonce: str
    name: str


class Tenures(NamedTuple):
    """Whose markers count, from the lock of a workdir.

    Attributes:
      nonce: of the last one to take the lock; all its markers count.
      earlier: {nonce: the last step whose marker counts}, in the order in which they held the lock; None: all do.
    """

    nonce: str
    earlier: Mapping[str, int | None]

    def accept(self, folder: Folder) -> bool:
        if folder.nonce in ("", self.nonce):
            return True
        last = self.earlier.get(folder.nonce, -1)
        return last is None or folder.step <= last

    def rank(self, folder: Folder) -> int:
        """Of two folders for one step, the one with the higher rank counts."""
        order = ["", *self.earlier, self.nonce]
        return order.index(folder.nonce) if folder.nonce in order else 0


def latest_step(workdir: AnyPath) -> int | None:
    """The step of the newest finished checkpoint of a workdir, None if there is none; changes nothing."""
    return max(steps_in(files.as_place(workdir) / "checkpoints"), default=None)


def steps_in(directory: AnyPath) -> list[int]:
    """The steps of the finished checkpoints in `<workdir>/checkpoints`, ascending."""
    return sorted(finished_in(directory))


def folder_of(directory: AnyPath, step: int) -> Place:
    """Where the finished checkpoint of a step lies; `<directory>/<step>` if there is none."""
    directory = files.as_place(directory)
    return directory / finished_in(directory).get(step, Folder(step, "", str(step))).name


def finished_in(directory: AnyPath) -> dict[int, Folder]:
    """The folders of the finished checkpoints by step."""
    directory = files.as_place(directory)
    names = names_in(directory)
    found = [folder for folder in folders_among(names) if is_marked(folder, names, files.is_remote(directory))]
    if any(folder.nonce for folder in found):
        tenures = read_tenures(directory.parent)
        if tenures is not None:
            found = sorted(filter(tenures.accept, found), key=tenures.rank)
    return {folder.step: folder for folder in found}


def is_marked(folder: Folder, names: frozenset[str], remote: bool) -> bool:
    """Whether a folder counts as finished, if the lock accepts its nonce; a plain local one needs no marker."""
    if not remote and not folder.nonce:
        return True
    left_out = {f"{folder.name}{CORRUPT}", f"{folder.name}{SET_ASIDE}"} & names
    return f"{folder.name}{COMMIT}" in names and not left_out


def names_in(directory: Place) -> frozenset[str]:
    """The names of files and folders right below; none if there is no such folder."""

    def read() -> frozenset[str]:
        try:
            return frozenset(place.name for place in directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()

    return again(read, str(directory))


def folders_among(names: Iterable[str]) -> list[Folder]:
    matches = ((name, _FOLDER.fullmatch(name)) for name in sorted(names))
    return [Folder(int(match[1]), match[2] or "", name) for name, match in matches if match]


def read_tenures(workdir: Place) -> Tenures | None:
    """From the lock of a workdir; None where no lock of a bucket was ever taken: all markers count."""
    try:
        data = again((workdir / LOCK).read_bytes, str(workdir / LOCK))
    except FileNotFoundError:
        return None
    return parse_tenures(data)


def parse_tenures(data: bytes) -> Tenures | None:
    try:
        record: Any = json.loads(data)
        earlier = record["earlier"]
        if isinstance(record["nonce"], str) and all(type(last) in (int, type(None)) for last in earlier.values()):
            return Tenures(record["nonce"], earlier)
    except (ValueError, KeyError, TypeError, AttributeError):  # a local lock holds words for people
        pass
    return None


def settled(directory: Place, tenures: Tenures) -> dict[str, int | None]:
    """`tenures.earlier` with a last step for every nonce, without those that have no finished checkpoint left.

    Called by the one who has just taken the lock: markers that come later do not count.
    """
    names = names_in(directory)
    found = [f for f in folders_among(names) if f.nonce and is_marked(f, names, True) and tenures.accept(f)]
    last: dict[str, int | None] = {}
    for nonce in tenures.earlier:
        steps = [folder.step for folder in found if folder.nonce == nonce]
        if steps:
            last[nonce] = max(steps)
    return last


def nonces_in(directory: Place) -> list[str]:
    """The nonces of all marked folders, for a workdir without a lock (a copied one)."""
    names = names_in(directory)
    return sorted({f.nonce for f in folders_among(names) if f.nonce and is_marked(f, names, True)})


def mark(workdir: AnyPath) -> list[int]:
    """Marks the checkpoints in folders `<step>` of a workdir that was uploaded to a bucket as a whole; their steps.

    Locally, where these need no marker, it does nothing.
    """
    directory = files.as_place(workdir) / "checkpoints"
    if not files.is_remote(directory):
        return []
    names = names_in(directory)
    plain = [folder for folder in folders_among(names) if not folder.nonce]
    for folder in plain:
        if f"{folder.name}{COMMIT}" not in names:
            files.create(directory / f"{folder.name}{COMMIT}", json.dumps({"step": folder.step}).encode())
    return sorted(folder.step for folder in plain)
