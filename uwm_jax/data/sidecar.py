"""Sidecars: derived data in a folder inside a dataset, such as latents, text embeddings or ranges of steps.

A sidecar's folder holds its files and `sidecar.json`, which is written last, by rename:

- `format`, `format_version`, and the `kind` of sidecar: that of the command `data_prep.<kind>` that made it;
- `fingerprint` of the dataset that it was made from;
- `fields`: what it was made with, such as the encoder's sha256, resize, crop or seed; `open_sidecar` compares them;
- `facts`: what was found, such as counts; nothing compares them;
- `files`: {name relative to the folder: `bytes` and `crc32c`}.

Until then the folder holds `unfinished.json` with the same header and the command that continues the job, so that an
unfinished sidecar is never taken for a complete one. The dataset's own `manifest.json` stays as it is: a sidecar
changes neither the dataset nor its fingerprint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np

from uwm_jax.data import folder_lock
from uwm_jax.data.columns import npy_header
from uwm_jax.data.folder_lock import LOCK
from uwm_jax.data.names import check_name, not_the_data
from uwm_jax.data.places import local_dataset
from uwm_jax.data.records import checksum, fingerprint, read_manifest
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, Place, as_place, facts_below, is_remote, sync, write_text
from uwm_jax.reading import again, read_json

FORMAT = "uwm_jax/sidecar"
FORMAT_VERSION = 1
KINDS = ("latents", "ranges", "text")

_MANIFEST, _UNFINISHED = "sidecar.json", "unfinished.json"


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """A complete sidecar.

    Attributes:
        directory: its folder.
        kind: one of `KINDS`.
        fields: what it was made with; lists where there were tuples.
        facts: what was found when it was made.
        files: {name: {"bytes", "crc32c"}}.
        digest: sha256 that identifies kind, dataset, fields and the content of all files.
    """

    directory: Place
    kind: str
    fields: Mapping[str, Any]
    facts: Mapping[str, Any]
    files: Mapping[str, Mapping[str, int]]
    digest: str

    def read(self, name: str) -> bytes:
        """The bytes of a file, verified.

        Raises:
            UserError: it is damaged.
        """
        file = self.path(name)
        data = again(file.read_bytes, file)
        if google_crc32c.value(data) != self.files[name]["crc32c"]:
            raise self._damaged(file)
        return data

    def array(self, name: str, *, verify: bool = True) -> np.ndarray:
        """The array of an npy file, memory-mapped and read-only; of a file in a bucket, in memory.

        Args:
            verify: whether to read the file once to compare its checksum.
        Raises:
            UserError: it is damaged.
        """
        file = self.path(name)
        try:
            if not isinstance(file, Path):
                shape, dtype, start = npy_header(data := self.read(name))
                return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
            if verify:
                self._verify(name)
            return again(lambda: np.load(file, mmap_mode="r", allow_pickle=False), file)
        except ValueError as e:
            raise self._damaged(file) from e

    def verify(self) -> None:
        """Compares the checksum of every file.

        Raises:
            UserError: naming the first file that is damaged.
        """
        for name in self.files:
            self._verify(name)

    def path(self, name: str) -> Place:
        """The place of a file.

        Raises:
            UserError: the sidecar does not list it.
        """
        if name not in self.files:
            raise UserError(f"{self.directory}: no file {name!r}; it has {', '.join(sorted(self.files)) or 'none'}.")
        return self.directory / name

    def _verify(self, name: str) -> None:
        file = self.path(name)
        if again(lambda: checksum(file), file) != self.files[name]["crc32c"]:
            raise self._damaged(file)

    def _damaged(self, file: Place) -> UserError:
        return UserError(
            f"{file}: its checksum is not that of {_MANIFEST}, so it is damaged or was overwritten. Copy it again, or "
            f"make it again: python -m data_prep.{self.kind} --overwrite."
        )


def open_sidecar(
    dataset: AnyPath,
    folder: str,
    kind: str,
    expected: Mapping[str, Any] | None = None,
    *,
    command: str = "",
) -> Sidecar:
    """The complete sidecar in a folder of a dataset, with the sizes of its files checked.

    Args:
        dataset: the dataset's directory.
        folder: relative to it, such as `text/clip`.
        kind: one of `KINDS`.
        expected: {field: value} that it must have been made with; fields that are not named are not compared.
        command: that makes one, for messages; by default the one of this kind with `--dataset`.
    Raises:
        UserError: there is none; it is unfinished, of another kind, version or dataset; a field has another value; a
            file is missing or has another size.
    """
    directory = _place(dataset, folder)
    how = command or f"python -m data_prep.{kind} --dataset={dataset}"
    if not (directory / _MANIFEST).exists():
        if (directory / _UNFINISHED).exists():
            raise _unfinished(directory)
        there = [str(file.parent).removeprefix(f"{dataset}/") for file in _manifests(dataset)]
        has = f" The dataset has: {', '.join(there)}." if there else ""
        raise UserError(f"{directory}: no {kind} here (no {_MANIFEST}).{has} Make it with `{how}`.")
    sidecar = _read(directory, dataset)
    if problems := _differences({"kind": kind}, {"kind": sidecar.kind}) or _differences(expected or {}, sidecar.fields):
        raise UserError(
            f"{directory}: this sidecar does not fit:\n  " + "\n  ".join(problems) + "\nUse the settings that it was "
            f"made with, or make another one with `{how}` and these settings (--overwrite replaces this one)."
        )
    return sidecar


def is_complete(dataset: AnyPath, folder: str) -> bool:
    """Whether a folder of a dataset holds a complete sidecar; `open_sidecar` says whether it fits."""
    return (_place(dataset, folder) / _MANIFEST).exists()


def is_begun(dataset: AnyPath, folder: str) -> bool:
    """Whether a folder of a dataset holds an unfinished sidecar."""
    return (_place(dataset, folder) / _UNFINISHED).exists()


def state_of(dataset: AnyPath, folder: str, kind: str, fields: Mapping[str, Any]) -> Literal["complete", "begun", ""]:
    """Whether a folder of a dataset holds a complete or an unfinished sidecar of this kind, made of this dataset with
    these fields; else ""."""
    directory = local_dataset(as_place(dataset)) / _checked(folder, dataset)
    # In this order, since a job that finishes meanwhile writes the one before it removes the other.
    begun, done = (_header(directory / name, overwrite=True) for name in (_UNFINISHED, _MANIFEST))
    there = begun if done is None or (begun or {}).get("clearing") else done
    if there is None or there.get("clearing") or _differences(_new_header(dataset, kind, fields), there):
        return ""
    return "begun" if done is None else "complete"


def find_sidecars(dataset: AnyPath, refused: list[tuple[Place, UserError]] | None = None) -> list[Sidecar]:
    """The complete sidecars of a dataset, sorted by folder; sizes of files are checked as `open_sidecar` does.

    Raises:
        UserError: one is damaged or belongs to another dataset, and `refused` does not take it: (folder, error).
    """
    found = []
    for file in _manifests(dataset):
        try:
            found.append(_read(file.parent, dataset))
        except UserError as e:
            if refused is None:
                raise
            refused.append((file.parent, e))
    return found


class SidecarWriter:
    """A sidecar that is being made, as `writing_sidecar` opens it.

    Attributes:
        directory: the folder, in which the job keeps its parts.
        continued: whether an earlier job with the same settings has begun it; its parts are there.
        complete: None, or the sidecar where an earlier job has already finished it: there is nothing to do.
    """

    def __init__(self, directory: Path, dataset: Path, header: Mapping[str, Any], *, continued: bool, complete: bool):
        self.directory, self.continued = directory, continued
        self._dataset, self._header = dataset, dict(header)
        self.complete = _read(directory, dataset) if complete else None

    def finish(
        self,
        files: Iterable[str],
        facts: Mapping[str, Any] | None = None,
        progress: Callable[[int], Any] = lambda size: None,
    ) -> Sidecar:
        """Writes `sidecar.json`, and removes what the job has left in the folder besides these files.

        Args:
            files: names relative to the folder, in it already.
            facts: results for people, in types of JSON.
            progress: is told the bytes of each file that was read for its checksum.
        """
        listed = {}
        for name in sorted(files):
            check_name(name, "the name of a file", self.directory, nested=True)
            file = self.directory / name
            sync(file)  # after a crash, the manifest must not list what is not there
            listed[name] = {"bytes": file.stat().st_size, "crc32c": checksum(file)}
            progress(listed[name]["bytes"])
        content = {**self._header, "facts": dict(facts or {}), "files": listed}
        write_text(self.directory / _MANIFEST, json.dumps(content, indent=1, sort_keys=True) + "\n")
        _clear(self.directory, {*listed, _MANIFEST, LOCK})
        self.complete = _read(self.directory, self._dataset)
        return self.complete


@contextlib.contextmanager
def writing_sidecar(
    dataset: AnyPath,
    folder: str,
    kind: str,
    fields: Mapping[str, Any],
    command: str,
    *,
    overwrite: bool = False,
    alone: bool = True,
) -> Iterator[SidecarWriter]:
    """A new sidecar, or one that a killed job with the same settings has begun.

    Nothing in the folder counts before `SidecarWriter.finish`. The folder is locked: for this process, or for processes
    with the same settings that do a share of the work each.

    Args:
        folder: relative to the dataset's directory; created.
        fields: what it is made with, in types of JSON.
        command: the command line that continues the job.
        overwrite: whether to remove a sidecar that is there, if it is complete or of other settings; an unfinished one
            of the same settings is continued.
        alone: False for a share of the work, which never calls `finish`: other shares may work here meanwhile. A share
            that is started again after the job was finished leaves the complete sidecar of the same settings, unless a
            file of it is lost.
    Raises:
        UserError: another process writes here; the folder lies inside another sidecar or holds something else, or a
            sidecar of other settings and `overwrite` is not given.
    """
    dataset = local_dataset(as_place(dataset))
    header = _new_header(dataset, kind, fields)
    directory = dataset / _checked(folder, dataset)
    for outer in directory.parents[: len(directory.parts) - len(dataset.parts) - 1]:
        if any((outer / name).exists() for name in (_MANIFEST, _UNFINISHED)):
            raise UserError(
                f"{directory} lies inside the sidecar {outer}, which removes what it does not list: choose another "
                "name."
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock, exclusive = folder_lock.hold(directory, alone)
    except OSError as e:
        raise UserError(f"{directory} cannot be written: {e.strerror}. A sidecar lies inside its dataset.") from e
    try:
        done, begun = (_header(directory / name, overwrite) for name in (_MANIFEST, _UNFINISHED))
        # The lock, and what a job leaves that is killed while it writes a file, are hidden.
        others = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
        if others and done is None and begun is None:
            raise UserError(f"{directory} exists and is no sidecar. Remove it by hand, or choose another name.")
        # A job that overwrites writes first what it will make, so that it is continued if it is killed meanwhile.
        clearing = begun is not None and bool(begun.get("clearing"))
        there = begun if clearing or done is None else done
        problems = [] if there is None else _differences(header, there)
        if there is not None and problems and not overwrite:
            state = "is complete" if there is done else f"is unfinished (`{there.get('command')}` continues it)"
            raise UserError(
                f"{directory} {state}, but was made with other settings:\n  "
                + "\n  ".join(problems)
                + "\nUse the same settings or another name, or replace it with --overwrite."
            )
        kept = not (alone or clearing or problems) and done is not None and _is_whole(directory, dataset)
        replaced = clearing or (overwrite and others and not kept and (done is not None or problems))
        if replaced and not exclusive:
            raise folder_lock.in_use(directory, lock)
        if replaced:
            _write_unfinished(directory, header, command, clearing=True)
            (directory / _MANIFEST).unlink(missing_ok=True)
            _clear(directory, {_UNFINISHED, LOCK})
            done, begun = None, None
        if done is not None and exclusive:
            _clear(directory, {*done["files"], _MANIFEST, LOCK})
        elif done is None and begun is None:
            _write_unfinished(directory, header, command)
        if exclusive and not alone:
            folder_lock.share(lock)
        yield SidecarWriter(directory, dataset, header, continued=begun is not None, complete=done is not None)
    finally:
        if not (directory / _UNFINISHED).exists():
            (directory / LOCK).unlink(missing_ok=True)
        os.close(lock)


def _new_header(dataset: AnyPath, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "fingerprint": fingerprint(read_manifest(dataset)),
        "fields": _plain(fields),
    }


def _manifests(dataset: AnyPath) -> list[Place]:
    found: list[Place] = []
    for kind in KINDS:
        found += sorted((as_place(dataset) / kind).rglob(_MANIFEST), key=str)
    return found


def _place(dataset: AnyPath, folder: str) -> Place:
    return as_place(dataset) / _checked(folder, dataset)


def _checked(folder: str, dataset: AnyPath) -> str:
    return check_name(folder, "the name of a sidecar's folder", dataset, nested=True)


def _write_unfinished(directory: Path, header: Mapping[str, Any], command: str, *, clearing: bool = False) -> None:
    begun = {**header, "command": command} | ({"clearing": True} if clearing else {})
    write_text(directory / _UNFINISHED, json.dumps(begun, indent=1, sort_keys=True) + "\n")


def _unfinished(directory: Place) -> UserError:
    command = read_json(directory / _UNFINISHED).get("command")
    return UserError(
        f"{directory} is unfinished: its job was interrupted, or is still running. Continue it with `{command}`."
    )


def _read(directory: Place, dataset: AnyPath) -> Sidecar:
    """The sidecar of a folder with a manifest."""
    file = directory / _MANIFEST
    content = read_json(file)
    again_with = f"Make it again with `python -m data_prep.{content.get('kind')} --overwrite`"
    version = (content.get("format"), content.get("format_version"))
    if version != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{file}: expected format {(FORMAT, FORMAT_VERSION)}, found {version}: another version of uwm_jax made it. "
            f"{again_with}."
        )
    fields, facts, files = (content.get(name) for name in ("fields", "facts", "files"))
    if not (isinstance(fields, dict) and isinstance(facts, dict) and isinstance(files, dict)):
        raise UserError(f"{file} has been damaged or edited: expected objects `fields`, `facts` and `files`.")
    if content.get("kind") not in KINDS:
        raise UserError(f"{file}: expected a kind of {', '.join(KINDS)}, found {content.get('kind')!r}.")
    found = fingerprint(read_manifest(dataset))
    if content.get("fingerprint") != found:
        raise UserError(
            f"{directory} was made from another dataset: expected fingerprint {found[:12]}, that of this dataset, "
            f"found {str(content.get('fingerprint'))[:12]}. {again_with}."
        )
    for name, entry in files.items():
        check_name(name, "the name of a file", file, nested=True)
        if not isinstance(entry, dict) or not {int} == {type(entry.get(part)) for part in ("bytes", "crc32c")}:
            raise UserError(f"{file} has been damaged or edited: {name} has no `bytes` and `crc32c`.")
    _check_sizes(directory, files)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Sidecar(directory, content["kind"], fields, facts, files, digest)


def _is_whole(directory: Place, dataset: AnyPath) -> bool:
    try:
        _read(directory, dataset)
    except UserError:
        return False
    return True


def _check_sizes(directory: Place, listed: Mapping[str, Mapping[str, int]]) -> None:
    # In a bucket one listing tells all sizes.
    there = facts_below(directory) if is_remote(directory) else None
    for name, entry in listed.items():
        file = directory / name
        try:
            size = there[name].size if there is not None else _size(file)
        except (FileNotFoundError, KeyError) as e:
            raise UserError(f"{file} is missing, though {_MANIFEST} lists it. Copy it again.") from e
        if size != entry["bytes"]:
            if placeholder := not_the_data(file):
                raise UserError(f"{file} {placeholder}.")
            raise UserError(f"{file}: expected {entry['bytes']} bytes, found {size}. Copy it again.")


def _size(file: Place) -> int:
    return again(lambda: int(file.stat().st_size), file)


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any], of: str = "") -> list[str]:
    """A line for each field whose value is not the expected one; objects are compared field by field."""
    lines = []
    for name, value in _plain(expected).items():
        if name in found and isinstance(value, dict) and isinstance(found[name], dict):
            lines += _differences({**dict.fromkeys(found[name]), **value}, found[name], f"{of}{name}.")
        elif name not in found:
            lines.append(f"{of}{name}: expected {_shown(value)}, found none")
        elif found[name] != value:
            lines.append(f"{of}{name}: expected {_shown(value)}, found {_shown(found[name])}")
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _header(file: Path, overwrite: bool) -> dict[str, Any] | None:
    """The content of a sidecar's manifest, or of what an unfinished one has in its place; None if there is none. A
    damaged file raises UserError, or gives {} where it will be overwritten."""
    try:
        content = read_json(file)
        if file.name == _MANIFEST and not isinstance(content.get("files"), dict):
            raise UserError(f"{file} has been damaged or edited: expected an object `files`.")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UserError as e:
        if overwrite:
            return {}
        raise UserError(f"{e} Make the sidecar again with --overwrite.") from e
    return content


def _clear(directory: Path, keep: set[str]) -> None:
    """Removes what a job has left in a folder, except some files."""
    for path in sorted(directory.rglob("*"), reverse=True):  # the content of a folder before it
        name = path.relative_to(directory).as_posix()
        if name in keep or any(kept.startswith(f"{name}/") for kept in keep):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
