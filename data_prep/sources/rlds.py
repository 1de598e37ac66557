"""Opens RLDS datasets in TFDS layout, without TensorFlow and tfds.

A directory holds `dataset_info.json` (splits and their files), `features.json` (the features of a record) and the
shards, TFRecord or ArrayRecord, one serialized episode per record.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_prep.sources.inputs import Corpus, Found, Input, Missing, modified
from data_prep.sources.source_files import read_records, starts_with_record
from uwm_jax.data.features import STEPS, Feature, flatten, upgrade
from uwm_jax.data.names import check_name, not_the_data
from uwm_jax.errors import UserError
from uwm_jax.files import Place
from uwm_jax.reading import read_json

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_MOST_FILES = 1_000_000  # of a split
_MOST_EPISODES = 1 << 62


@dataclasses.dataclass(frozen=True)
class Source:
    """An RLDS dataset on disk; `features` has flat keys, step features under `steps/`.

    Attributes:
        splits: the files of each split.
        lengths: number of episodes that `dataset_info.json` declares for each file of a split; None if undeclared.
        totals: the same for a split; None if undeclared.
        features_json: the feature tree in the current schema.
    """

    path: Place
    name: str
    version: str
    file_format: str
    splits: dict[str, list[Place]]
    lengths: dict[str, list[int | None]]
    totals: dict[str, int | None]
    info: dict[str, Any]
    features_json: dict[str, Any]
    features: dict[str, Feature]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RldsFile(Input):
    """One shard of an RLDS dataset: TFRecord or ArrayRecord."""

    path: Path
    file_format: str

    declared_by: ClassVar[str] = "dataset_info.json"

    def episodes(self) -> Iterator[Found]:
        for record, reason, size in read_records(self.path, self.file_format):
            yield Found(record, reason, size=size)


def corpus(path: Path, splits: Sequence[str] = (), max_missing: int = 0) -> Corpus:
    """An RLDS dataset as a corpus, each shard an input.

    Args:
        splits: names of the splits to take; all if empty.
        max_missing: how many files may be missing, in all.
    Raises:
        UserError: as `open_source`, or there is no such split.
    """
    if (path / "manifest.json").exists():
        raise UserError(
            f"{path} is already in the training layout. Expected as --input the RLDS dataset it was made from."
        )
    opened = open_source(path, splits, max_missing)
    if unknown := sorted(set(splits) - set(opened.splits)):
        raise UserError(f"{path}: no split {unknown[0]!r}; it has {', '.join(sorted(opened.splits))}.")
    chosen = {
        split: [
            _input(path / file.name, n, opened.file_format)
            for file, n in zip(files, opened.lengths[split], strict=True)
        ]
        for split, files in opened.splits.items()
        if split in splits or not splits
    }
    return Corpus(
        name=opened.name,
        version=opened.version,
        path=path,
        tree=opened.features_json,
        splits=chosen,
        totals=opened.totals,
        info=opened.info,
        source={"file_format": opened.file_format, "splits": sorted(opened.splits)},
        output_bytes=sum(file.size for files in chosen.values() for file in files),
    )


def _input(file: Path, promised: int | None, file_format: str) -> Input:
    if not file.exists():
        return Missing(name=file.name, promised=promised)
    return RldsFile(
        name=file.name,
        size=file.stat().st_size,
        modified=modified([file]),
        promised=promised,
        path=file,
        file_format=file_format,
    )


def open_source(path: Place, only: Iterable[str] = (), max_missing: int = 0) -> Source:
    """Reads the two JSON files and checks the shards that they name.

    Args:
        only: the splits whose files must exist; all if empty.
        max_missing: how many of these may be missing all the same.
    Raises:
        UserError: not an RLDS dataset, a file is missing or a placeholder, or a name leads out of the dataset.
    """
    info_file = path / "dataset_info.json"
    info = _read_json(path, info_file.name)
    features_json, features = _read_features(path)
    file_format = info.get("fileFormat") or "tfrecord"
    if file_format not in ("tfrecord", "array_record"):
        raise UserError(f"{info_file}: fileFormat is {file_format!r}; expected tfrecord or array_record.")
    check_name(info.get("name"), "the dataset's name", info_file)
    splits: dict[str, list[Place]] = {}
    lengths: dict[str, list[int | None]] = {}
    totals: dict[str, int | None] = {}
    only = set(only)
    left = max_missing
    for split in _splits(info, info_file):
        name = check_name(split.get("name"), "the name of a split", info_file)
        if name in splits:
            raise UserError(f"{info_file}: two entries of `splits` have the name {name!r}. Keep the correct one.")
        lengths[name], totals[name] = _declared(split, info_file)
        splits[name] = _shard_files(path, info, split, file_format, len(lengths[name]))
        if not only or name in only:
            left -= _check_files(path, name, splits[name], _name_pattern(info, split, file_format), left)
    if not splits:
        raise UserError(f"{info_file} lists no splits.")
    version = str(info.get("version", ""))
    return Source(path, info["name"], version, file_format, splits, lengths, totals, info, features_json, features)


def _read_features(path: Place) -> tuple[dict[str, Any], dict[str, Feature]]:
    file = path / "features.json"
    tree = _read_json(path, file.name)
    try:
        tree = upgrade(tree)
        features = dict(flatten(tree))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{file} is not in the schema of TFDS ({type(e).__name__}: {str(e)[:200]}).") from e
    if not any(k.startswith(STEPS) for k in features):
        raise UserError(f"{file} has no `steps`: not an RLDS dataset. Its keys: {', '.join(sorted(features))}.")
    for key in features:
        check_name(key, "the name of a feature", file, nested=True)
    return tree, features


def _read_json(path: Place, name: str) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        inside = [p.parent for p in path.glob(f"*/{name}")] if path.is_dir() else []
        hint = f" Did you mean {max(inside, key=_version)}?" if inside else ""
        raise UserError(f"{file} does not exist: --input must be the directory that holds it.{hint}")
    if found := not_the_data(file):
        raise UserError(f"{file} {found}.")
    return read_json(file)


def _version(path: Place) -> tuple[bool, list[int], str]:
    """Sort key of folders: versions by their numbers (1.10.0 after 1.9.0), after all others."""
    numbers = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", path.name)
    return numbers is not None, [int(n) for n in numbers.groups()] if numbers else [], path.name


def _splits(info: dict[str, Any], file: Place) -> list[dict[str, Any]]:
    """The entries of `splits`, which is a list or a dictionary by name."""
    splits = info.get("splits") or []
    if isinstance(splits, dict):
        splits = [{"name": name} | split if isinstance(split, dict) else split for name, split in splits.items()]
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        raise UserError(f"{file}: `splits` is not a list of objects with `name` and `shardLengths`.")
    return splits


def _declared(split: dict[str, Any], file: Place) -> tuple[list[int | None], int | None]:
    """Number of episodes in each file and in the split, by an entry of `splits`; None if undeclared."""
    name = split["name"]
    try:
        stored = split.get("shardLengths") or split.get("shard_lengths") or []
        if not isinstance(stored, list):
            raise TypeError(f"shardLengths is {str(stored)[:60]!r}, not a list")
        lengths: list[int | None] = [_count(n, "shardLengths", _MOST_EPISODES) for n in stored]
        if lengths:
            return lengths, sum(n or 0 for n in lengths)
        # Older versions have no shardLengths, but the number of files, and statistics.
        count = _count(split.get("numShards") or split.get("num_shards") or 0, "numShards", _MOST_FILES)
        examples = (split.get("statistics") or {}).get("numExamples")
        total = None if examples is None else _count(examples, "numExamples", _MOST_EPISODES)
        return [total] if count == 1 else [None] * count, total
    except (TypeError, ValueError, OverflowError, AttributeError) as e:
        raise UserError(
            f"{file}: split {name!r}: expected integers in shardLengths, numShards and numExamples ({e})."
        ) from e


def _count(value: Any, field: str, most: int) -> int:
    """A count, stored as an integer or, in protobuf's JSON, as a string of digits."""
    count = int(value)
    if isinstance(value, bool | float) or not 0 <= count <= most:
        raise ValueError(f"{field} has {str(value)[:60]}; expected 0 to {most}")
    return count


def _shard_files(path: Place, info: dict, split: dict, file_format: str, num_shards: int) -> list[Place]:
    files = []
    where = path / "dataset_info.json"
    for i in range(num_shards):
        name = _named(info, split, file_format)
        shard = {
            "SHARD_X_OF_Y": f"{i:05d}-of-{num_shards:05d}",
            "SHARD_INDEX": f"{i:05d}",
            "NUM_SHARDS": f"{num_shards:05d}",
        }
        for key, value in shard.items():
            name = name.replace("{" + key + "}", value)
        files.append(path / check_name(name, f"the name of a file of split {split['name']!r}", where))
    if len(set(files)) < len(files):
        raise UserError(
            f"{where}: the {len(files)} files of split {split['name']!r} have the same name, {files[0].name!r}. "
            "Expected the number of the file in filepathTemplate, as {SHARD_X_OF_Y} or {SHARD_INDEX}."
        )
    return files


def _name_pattern(info: dict, split: dict, file_format: str) -> re.Pattern[str]:
    """A pattern of the names of a split's files for any number of files; the first group, if any, is that number."""
    pattern = re.escape(_named(info, split, file_format))
    for key, digits in (("SHARD_X_OF_Y", r"\d+-of-(\d+)"), ("NUM_SHARDS", r"(\d+)"), ("SHARD_INDEX", r"\d+")):
        pattern = pattern.replace(re.escape("{" + key + "}"), digits)
    return re.compile(pattern)


def _named(info: dict, split: dict, file_format: str) -> str:
    """The template of a split's file names, with everything but the shard filled in."""
    name = str(split.get("filepathTemplate") or split.get("filepath_template") or _TEMPLATE)
    for key, value in (("DATASET", info["name"]), ("SPLIT", split["name"]), ("FILEFORMAT", file_format)):
        name = name.replace("{" + key + "}", value)
    return name


def _check_files(path: Place, split: str, files: list[Place], pattern: re.Pattern[str], max_missing: int) -> int:
    """Checks that the files of a split exist, but `max_missing`, and are not placeholders; returns how many lack."""
    matches = [m for p in path.iterdir() if (m := pattern.fullmatch(p.name)) and pattern.groups]
    counts = {m[1] for m in matches}
    missing = [f.name for f in files if not f.exists()]
    others = sorted(n for n in counts if int(n) != len(files))
    if others and (missing or not files):
        raise UserError(
            f"{path / 'dataset_info.json'}: split {split!r} has {len(files)} files by its shardLengths (or numShards), "
            f"but files here are named -of-{others[0]}. The JSON belongs to another version of the dataset: take both "
            "from the same version."
        )
    if len(missing) > max_missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(files)} files of split {split!r} are missing, "
            f"the first is {missing[0]}. Complete the download, or go without them: "
            "--max_missing_files=N names them in the manifest."
        )
    # The length of a file's first record may begin with the same bytes as gzip.
    foreign = [(f, found) for f in files if f.exists() and (found := not_the_data(f)) and not starts_with_record(f)]
    if foreign:
        file, found = foreign[0]
        others_too = f" ({len(foreign)} of the {len(files)} files of split {split!r} are)" if len(foreign) > 1 else ""
        raise UserError(f"{file} {found}{others_too}.")
    return len(missing)
