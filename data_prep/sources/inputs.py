"""Sources of episodes: all that the engine of the training layout knows of what a converter reads.

A converter describes its input as a `Corpus` and hands it to `training_layout.run`, which makes a dataset in the
training layout of it: it cuts episodes into records, writes index, columns, statistics, the PCA codec and the manifest,
counts what is skipped, and ends the job beyond `--max_skipped`. The converter writes two things:

- an `Input`, one task of the job, usually one file: what a worker process needs to read it, and `episodes`, which
  yields its episodes as serialized RLDS `tf.Example` messages (`uwm_jax.data.episodes.serialize_episode` makes one from
  arrays and encoded images) or the reason why one is skipped;
- a function that opens the source and returns the `Corpus`: the feature tree (`uwm_jax.data.episodes.feature_tree`) and
  the inputs of each split, in the order in which their episodes are stored.

A converter of clips, in short:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Clips(Input):
        files: tuple[Path, ...]

        def episodes(self) -> Iterator[Found]:
            for file in self.files:
                size = file.stat().st_size
                frames = decode(file)
                if not frames:
                    yield Found(None, "no frame", str(file), size, name=file.name)
                else:
                    yield Found(serialize_episode(FEATURES, {"steps/observation/image": frames}), size=size)

    def main(call: cli.Call) -> None:
        options = layout_options.from_flags(call)
        path = cli.required_local_path("input")
        run(lambda: corpus(path), layout_options.output(), options, path)

Inputs are pickled into worker processes, so they hold paths and settings, never open files or decoded data. `episodes`
must give the same episodes in the same order whenever it is called: a job that was killed continues with the inputs
that it had not finished, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from uwm_jax.data.chunks import EpisodeError
from uwm_jax.data.features import Feature, flatten


class Found(NamedTuple):
    """One episode of an input, or the reason why it is skipped.

    Attributes:
        record: the serialized `tf.Example`; None if the episode is skipped.
        reason: a short category that is counted in the manifest, for a skipped episode.
        detail: what else there is to say of a skipped episode.
        size: the share of the input's `size` in bytes that is read with it, for the progress bar. An input's shares
            need not sum to its size: the rest counts as read when it ends.
        name: the episode's name in notes, such as a clip's file name; "" for `<input>: record <number>`.
        remarks: categories to count in the manifest of an episode that is kept, such as "rotated".
    """

    record: bytes | None
    reason: str = ""
    detail: str = ""
    size: int = 0
    name: str = ""
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input(abc.ABC):
    """One task of a job: a part of the source that one process reads from its beginning to its end.

    Subclasses are frozen, keyword-only dataclasses at the top level of a module. An input is the unit that is repeated
    when a job was killed: let it take minutes, not hours, and group small files.

    Attributes:
        name: unique within a split; in messages, and in the plan by which a killed job is recognised.
        size: bytes to read, for the progress bar and for recognising a changed file.
        modified: when the newest of its files was modified, in seconds since 1970, for recognising one that changed and
            kept its size; 0 if it has no files.
        promised: number of episodes that the source declares for it; None if it declares none. What is missing is
            counted as skipped.
    """

    name: str
    size: int
    modified: int = 0
    promised: int | None = None

    declared_by: ClassVar[str] = "its metadata"  # where `promised` is from, for messages

    @abc.abstractmethod
    def episodes(self) -> Iterator[Found]:
        """The episodes in stored order.

        Raises:
            RunError, OSError: ends the job. What concerns one episode is a `Found` with a reason.
        """


def modified(files: Iterable[Path]) -> int:
    """When the newest of some files was modified, in seconds since 1970; those that cannot be found do not count."""
    newest = 0
    for file in files:
        with contextlib.suppress(OSError):  # whoever reads it says why
            newest = max(newest, int(file.stat().st_mtime))
    return newest


def storable(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The same numbers, which a record keeps as float32 (rounded) or int64.

    Args:
        dtype: of the feature in the record.
        name: of the key in the source, for messages.
    Raises:
        EpisodeError: one is finite and too large for that: it would become infinite, or wrap.
    """
    if dtype.startswith("float"):
        with np.errstate(over="ignore"):
            beyond = np.isinf(values.astype(np.float32)) & np.isfinite(values)
    elif values.dtype == np.uint64 and dtype != "bool":
        beyond = values > np.iinfo(np.int64).max
    else:
        return values
    if beyond.any():
        largest = "float32" if dtype.startswith("float") else "int64"
        raise EpisodeError("number too large", f"{name}: {values[beyond].flat[0]} is beyond {largest}")
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing(Input):
    """A file that the source lists and lacks, where the user goes without it; the manifest names it."""

    size: int = 0

    def episodes(self) -> Iterator[Found]:
        return iter(())


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A source of episodes that becomes one training dataset.

    Attributes:
        name, version: as in TFDS, such as "bridge" and "1.0.0"; `name` becomes part of file names.
        path: of the source, for messages; the output may not be inside it, nor the other way round.
        tree: the feature tree of a record in the schema of TFDS's `features.json`.
        splits: split -> inputs. Their order is the order of the episodes.
        totals: split -> number of episodes that the source declares for it, if it declares none for its inputs.
        info: other fields of `dataset_info.json`, such as `description` and `citation`.
        source: what the manifest's `source` holds besides the path; no part of the dataset's fingerprint.
        facts: other fields of the manifest, such as `fps`, column names or the orientation of images: part of the
            fingerprint, and carried to where the manifest goes. JSON values.
        options: the converter's own flags that change the episodes, {flag: JSON value}. A killed job is continued only
            with the same.
        output_bytes: expected size of the output, to warn of a full disk; None if unknown.
    """

    name: str
    version: str
    path: Path
    tree: Mapping[str, Any]
    splits: Mapping[str, Sequence[Input]]
    totals: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    output_bytes: int | None = None

    def __post_init__(self) -> None:
        for split, inputs in self.splits.items():
            if len({part.name for part in inputs}) < len(inputs):
                raise ValueError(f"{self.path}: two inputs of split {split!r} have the same name")

    @functools.cached_property
    def features(self) -> dict[str, Feature]:
        """The leaves of `tree` by path, step features under `steps/`."""
        return dict(flatten(dict(self.tree)))

    def promised(self, split: str) -> int | None:
        """Number of episodes that the source declares for the files of a split that are there; None if unknown."""
        present = [part for part in self.splits[split] if not isinstance(part, Missing)]
        if split in self.totals and len(present) == len(self.splits[split]):
            return self.totals[split]
        promised = [part.promised for part in present]
        return None if None in promised else sum(n or 0 for n in promised)
