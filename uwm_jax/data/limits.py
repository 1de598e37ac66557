"""Conditions on windows: where their present frame may lie, and how large their actions may be."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import shlex
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from uwm_jax.data.intervals import Intervals, pieces
from uwm_jax.data.records import Dataset
from uwm_jax.data.selection import steps_where
from uwm_jax.data.sidecar import Sidecar, open_sidecar
from uwm_jax.data.transforms import Columns
from uwm_jax.data.windows import Layout
from uwm_jax.errors import UserError
from uwm_jax.files import Place, place
from uwm_jax.reading import read_json

NO_RANGES = "none"  # of a source, where config.data.ranges names some
KEYS = ("recording_folderpath", "file_path")  # texts of an episode that openpi's JSON names it by

_FAR = 1 << 40  # beyond the steps of any episode


@dataclasses.dataclass(frozen=True)
class StepRanges:
    """A limit: ranges [start, stop) of steps of the episodes of a split at which a window's present frame may lie.

    Attributes:
        ends: (E,) int64, how many ranges episodes 0 .. e have together.
        starts, stops: (R,) int32, the ranges of one episode after another, rising, neither empty nor touching.
        where: what they are called, for people.
        remarks: what did not fit when they were read, for people.
    """

    ends: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    where: str = "ranges"
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        episodes: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        lengths: np.ndarray,
        where: str = "ranges",
        remarks: tuple[str, ...] = (),
    ) -> StepRanges:
        """Ranges (m,) of any episodes in any order; what overlaps is joined, what is empty or lies beyond an episode's
        end left out.

        Args:
            lengths: (E,) of all episodes.
        """
        bases = np.cumsum(lengths + 1) - lengths - 1  # with a gap, so that ranges of two episodes do not touch
        limit = lengths[episodes]
        found = Intervals.union(bases[episodes] + np.clip(starts, 0, limit), bases[episodes] + np.clip(stops, 0, limit))
        at = np.searchsorted(bases, found.starts, side="right") - 1
        ends = np.cumsum(np.bincount(at, minlength=len(lengths)))
        first, stop = ((x - bases[at]).astype(np.int32) for x in (found.starts, found.stops))
        return cls(ends.astype(np.int64), first, stop, where, remarks)

    @property
    def episodes(self) -> np.ndarray:
        """(R,) the episode of each range."""
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))

    @property
    def steps(self) -> int:
        """Steps in all ranges."""
        return int((self.stops.astype(np.int64) - self.starts).sum())

    @property
    def rule(self) -> str:
        digest = hashlib.sha256()
        for array, dtype in ((self.ends, "<i8"), (self.starts, "<i4"), (self.stops, "<i4")):
            digest.update(np.ascontiguousarray(array, dtype).tobytes())
        return f"present frames in ranges of {self.steps} steps ({digest.hexdigest()[:12]})"

    @property
    def name(self) -> str:
        return self.where

    def left_out(self, layout: Layout) -> Intervals:
        """The windows whose present frame lies in none of the ranges."""
        present = layout.spec.present
        return layout.numbers(self.episodes, self.starts - present, self.stops - present).complement(layout.size)

    def to_bytes(self) -> bytes:
        """The content of a sidecar's file."""
        out = io.BytesIO()
        np.savez_compressed(out, ends=self.ends, starts=self.starts, stops=self.stops)
        return out.getvalue()


@dataclasses.dataclass(frozen=True)
class ActionBound:
    """A limit: no action of a window is larger, in absolute value, than a bound.

    Attributes:
        key: of the actions, or columns of it, before their transform; bound: in their units.
        episodes, steps: (n,) those at which one of the numbers is larger.
    """

    key: str
    bound: float
    episodes: np.ndarray
    steps: np.ndarray

    @property
    def rule(self) -> str:
        return f"{self.key} within {self._bound}"

    @property
    def name(self) -> str:
        return f"{self.key} beyond {self._bound} (at {len(self.steps)} steps)"

    @property
    def _bound(self) -> str:
        """All digits, as they tell bounds apart."""
        return repr(self.bound).removesuffix(".0")

    def left_out(self, layout: Layout) -> Intervals:
        """The windows with such a step among those of their actions."""
        at = np.clip(np.searchsorted(layout.episodes, self.episodes), 0, len(layout.episodes) - 1)
        is_first, is_last = self.steps == 0, self.steps == layout.actions[at] - 1
        found = []
        for first, last in pieces(layout.spec.action):
            # Steps before the first action mean the first, those after the last one mean the last (`WindowSpec.steps`).
            begin = np.where(is_first, -_FAR, self.steps - last)
            stop = np.where(is_last, _FAR, self.steps - first + 1)
            found.append(layout.numbers(self.episodes, begin, stop))
        return Intervals.joined(*found)


Limit = StepRanges | ActionBound


def find_limits(
    dataset: Dataset, config: Any, fields: Any, name: str, action_keys: Sequence[str], counted: np.ndarray
) -> list[Limit]:
    """The limits of the windows of a source.

    Args:
        config: `config.data`; fields: those of `uwm_jax.config.source`; name: of the source.
        action_keys: step keys that it reads as actions.
        counted: (E,) how many steps of each episode, from the first on, have an action that it uses.
    Raises:
        UserError: ranges that are not there or do not fit the dataset, a bound of the source for a key that is none of
            `action_keys`, or for columns that the key does not have.
    """
    own = f"config.data.sources.{name}"
    limits: list[Limit] = []
    ranges = fields.ranges or config.ranges
    if ranges and ranges != NO_RANGES:
        exempt = f" {own}.ranges='{NO_RANGES}' exempts this source." if name in config.sources else ""
        try:
            limits.append(open_ranges(dataset, ranges, f"{own if fields.ranges else 'config.data'}.ranges"))
        except UserError as e:
            raise UserError(f"{e}{exempt}") from e
    field = f"{own if fields.max_action else 'config.data'}.max_action"
    for name, bound in fields.max_action or config.max_action:
        columns = bounded(name, action_keys, field)
        if columns:
            columns.width(int(np.prod(dataset.step_shape(columns.key), dtype=np.int64)), field)
            beyond = functools.partial(_is_beyond, columns, bound)
            at = steps_where(beyond, dataset.column(columns.key), dataset.episode_lengths, counted)
            limits.append(ActionBound(str(columns), float(bound), *at))
        elif fields.max_action:
            raise UserError(
                f"{field}: {name!r} is none of the keys of this source's action: {', '.join(action_keys) or 'none'}."
            )
    return limits


def _is_beyond(columns: Columns, bound: float, rows: np.ndarray) -> np.ndarray:
    values = columns.of(rows)  # of any type: the smallest integer has no absolute value
    return np.any((values > bound) | (values < -bound), axis=1)


def bounded(name: str, action_keys: Sequence[str], field: str = "config.data.max_action") -> Columns | None:
    """The columns of a bound, whose name is `key` or `key[start:stop]`, the key in full or without `observation/`; None
    if it is none of the step keys of an action."""
    columns = Columns.parse(name, field)
    keys = (f"observation/{columns.key}", columns.key)
    return next((columns._replace(key=key) for key in keys if key in action_keys), None)


def sidecar_folder(name: str) -> str:
    """The folder of ranges inside a dataset, of the name that `config.data.ranges` has for them."""
    return f"ranges/{name}"


def sidecar_file(split: str) -> str:
    """The file of a split in that folder."""
    return f"{split}.npz"


def open_ranges(dataset: Dataset, value: str, field: str) -> StepRanges:
    """The ranges that a config names.

    Args:
        value: of `config.data.ranges`: a name that `data_prep.ranges` wrote, or the path of openpi's JSON.
        field: its name, for messages.
    Raises:
        UserError: there are none, or they do not fit the dataset.
    """
    if value.endswith(".json"):
        return of_openpi(dataset, place(value, field), field)
    if not all(part.strip(".") for part in value.split("/")):  # a path, as of the folder of ranges
        raise UserError(
            f"{field}={value!r}: expected the name that data_prep.ranges gave to ranges of this dataset, such as "
            "'idle', or the path of a .json of openpi."
        )
    try:
        command = shlex.join(["python", "-m", "data_prep.ranges", f"--dataset={dataset.directory}", f"--name={value}"])
        sidecar = open_sidecar(dataset.directory, sidecar_folder(value), "ranges", command=command)
    except UserError as e:
        raise UserError(f"{field}={value!r}: {e} openpi's ranges are named by a path that ends in .json.") from e
    return _of_sidecar(dataset, sidecar, value)


def _of_sidecar(dataset: Dataset, sidecar: Sidecar, name: str) -> StepRanges:
    file = sidecar.path(sidecar_file(dataset.split))
    try:
        with np.load(io.BytesIO(sidecar.read(file.name)), allow_pickle=False) as stored:
            ranges = StepRanges(stored["ends"], stored["starts"], stored["stops"], f"the ranges {name!r}")
    except (ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{file}: the ranges cannot be read ({e}). Make them again with --overwrite.") from e
    if len(ranges.ends) != dataset.num_episodes:
        raise UserError(f"{file}: expected ranges of {dataset.num_episodes} episodes, found {len(ranges.ends)}.")
    return ranges


def of_openpi(dataset: Dataset, file: Place, field: str = "config.data.ranges") -> StepRanges:
    """Ranges from a JSON of openpi, {`<recording_folderpath>--<file_path>`: [[start, end), ...]}.

    An episode that the file does not name has no range, as openpi leaves it out. Of its older form, {"metadata":
    {"filter_last_n_in_ranges": n}, "keep_ranges": the above}, the last n steps of every range are left out, as openpi
    does when it reads it.

    Raises:
        UserError: another JSON, an episode of the dataset lacks these texts, or the file names none of them.
    """
    if not file.is_file():
        raise UserError(f"{field}: there is no file {str(file)!r}.")
    stored = read_json(file)
    shortened = 0
    if isinstance(stored.get("keep_ranges"), dict):
        metadata = stored.get("metadata")
        found = metadata.get("filter_last_n_in_ranges") if isinstance(metadata, dict) else None
        if type(found) is not int or not 0 <= found < 1 << 31:
            raise UserError(f"{file}: expected an integer in metadata.filter_last_n_in_ranges, found {found!r}.")
        shortened, stored = found, stored["keep_ranges"]
    try:
        folders, files = (dataset.episode_texts(key) for key in KEYS)
    except UserError as e:
        raise UserError(
            f"{field}={str(file)!r} names episodes by their {' and '.join(KEYS)}: {e} Make ranges of this dataset with "
            "data_prep.ranges instead."
        ) from e
    names = [f"{folder}--{path}" for folder, path in zip(folders, files, strict=True)]
    matched = [episode for episode, name in enumerate(names) if name in stored]
    if not matched:
        raise UserError(
            f"{file}: names none of the {dataset.num_episodes} episodes of {dataset.directory}: expected keys "
            f"`<{KEYS[0]}>--<{KEYS[1]}>` such as {names[0]!r}, found {next(iter(stored), 'none')!r}."
        )
    counts = np.zeros(dataset.num_episodes, np.int64)
    flat: list[int] = []
    for episode in matched:
        value = stored[names[episode]]
        if not isinstance(value, list) or not all(_is_range(pair) for pair in value):
            raise UserError(
                f"{file}: {names[episode]!r}: expected a list of [start, end) such as [[0, 57], [80, 120]], found "
                f"{str(value)[:80]}."
            )
        counts[episode] = len(value)
        flat += [number for pair in value for number in pair]
    starts, stops = np.asarray(flat, np.int64).reshape(-1, 2).T
    episodes = np.repeat(np.arange(len(counts)), counts)
    lengths = dataset.episode_lengths
    remarks = []
    if missing := dataset.num_episodes - len(matched):
        remarks.append(f"{missing} of {dataset.num_episodes} episodes are not in it and have no windows")
    if unknown := len(stored) - len({names[episode] for episode in matched}):
        remarks.append(f"{unknown} of its {len(stored)} entries match no episode")
    if beyond := int((stops > lengths[episodes]).sum()):
        remarks.append(f"{beyond} ranges reach beyond their episode's end and were cut there")
    if empty := int((np.minimum(stops - shortened, lengths[episodes]) <= starts).sum()):
        remarks.append(f"{empty} ranges have no steps")
    where = f"the ranges of {file.name}"
    return StepRanges.of(episodes, starts, stops - shortened, lengths, where, tuple(remarks))


def _is_range(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and 0 <= n < 1 << 31 for n in pair)
