"""Ranges of an episode's steps in which a robot moves: those at which a window's present frame may lie.

The rule is that of openpi for DROID (examples/droid, "nonidle ranges"): a step is idle when no number of a key differs
from the step before by the threshold or more. Idle steps go where `min_idle` or more follow each other; of what
remains, runs of `min_kept` or more stay, less their last `drop_last` steps, whose chunks of actions are mostly idle. An
episode's first step is never idle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax.data.columns import Column
from uwm_jax.data.intervals import Intervals
from uwm_jax.data.limits import StepRanges, sidecar_file, sidecar_folder
from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.data.sidecar import Sidecar, writing_sidecar
from uwm_jax.errors import UserError
from uwm_jax.files import write_bytes

_BLOCK = 1 << 18  # steps in memory at a time


@dataclasses.dataclass(frozen=True)
class IdleRule:
    """The steps that count as idle, and those that stay.

    Attributes:
        key: of numbers, such as joint velocities.
        threshold: in their units; a step is idle when all of them differ from the step before by less.
        min_idle, min_kept, drop_last: numbers of steps, see above.
    """

    key: str = "action_dict/joint_velocity"
    threshold: float = 1e-3
    min_idle: int = 7
    min_kept: int = 16
    drop_last: int = 10

    def idle(self, column: Column, lengths: np.ndarray, progress: Callable[[int], Any] = lambda n: None) -> np.ndarray:
        """(steps,) bool, the idle steps of all episodes, one episode after another.

        Args:
            column: (steps, ...) of the key; lengths: (E,) of the episodes; progress: called with steps that are done.
        """
        idle = np.zeros(len(column), np.bool_)
        for start in range(0, len(column), _BLOCK):
            first = max(start - 1, 0)
            rows = np.asarray(column[first : start + _BLOCK], np.float64)
            change = np.abs(np.diff(rows.reshape(len(rows), -1), axis=0))
            idle[first + 1 : first + len(rows)] = np.all(change < self.threshold, axis=1)
            progress(len(rows) - (start - first))
        idle[_begins(lengths)] = False
        return idle

    def ranges(self, idle: np.ndarray, lengths: np.ndarray) -> StepRanges:
        """The ranges that stay, of what `idle` gives."""
        gone = _runs(idle, lengths, self.min_idle)
        kept = _runs(~gone.mask(len(idle)), lengths, self.min_kept, joined=False)
        ends = np.cumsum(lengths)
        episodes = np.searchsorted(ends, kept.starts, side="right")
        begin = (ends - lengths)[episodes]
        return StepRanges.of(episodes, kept.starts - begin, kept.stops - begin - self.drop_last, lengths)


def _begins(lengths: np.ndarray) -> np.ndarray:
    """First steps of the episodes that have steps, counted over all episodes."""
    return (np.cumsum(lengths) - lengths)[lengths > 0]


def _runs(mask: np.ndarray, lengths: np.ndarray, shortest: int, joined: bool = True) -> Intervals:
    """Runs of at least `shortest` true values within an episode; those that touch at its end are one if `joined`."""
    change = np.empty(len(mask), np.bool_)
    change[1:] = mask[1:] != mask[:-1]
    change[_begins(lengths)] = True
    starts = np.flatnonzero(change)
    stops = np.append(starts[1:], len(mask))
    chosen = mask[starts] & (stops - starts >= shortest)
    starts, stops = starts[chosen], stops[chosen]
    return Intervals.union(starts, stops) if joined else Intervals(starts, stops)


def make_ranges(
    directory: Path,
    name: str,
    rule: IdleRule,
    command: str,
    progress: Callable[[int], Any] = lambda n: None,
    *,
    overwrite: bool = False,
) -> tuple[Sidecar, bool]:
    """The ranges of all splits of a dataset, written to `ranges/<name>` of its directory, and whether they were there.

    Raises:
        UserError: the dataset lacks the key, or as `writing_sidecar`.
    """
    splits = sorted(read_manifest(directory)["splits"])
    for split in splits:
        try:
            rule = dataclasses.replace(rule, key=Dataset(directory, split).column_key(rule.key))
        except UserError as e:
            raise UserError(f"--key={rule.key}: {e}") from e
    fields = {"rule": "idle", **dataclasses.asdict(rule)}
    with writing_sidecar(directory, sidecar_folder(name), "ranges", fields, command, overwrite=overwrite) as out:
        if out.complete is not None:
            return out.complete, True
        facts = {}
        for split in splits:
            dataset = Dataset(directory, split)
            lengths = dataset.episode_lengths
            idle = rule.idle(dataset.column(rule.key), lengths, progress)
            ranges = rule.ranges(idle, lengths)
            write_bytes(out.directory / sidecar_file(split), ranges.to_bytes())
            facts[split] = {
                "episodes": len(lengths),
                "steps": len(idle),
                "idle_steps": int(idle.sum()),
                "kept_steps": ranges.steps,
                "ranges": len(ranges.starts),
                "episodes_without_range": int((np.diff(ranges.ends, prepend=0) == 0).sum()),
            }
        return out.finish(map(sidecar_file, splits), facts), False


def summary(sidecar: Sidecar) -> str:
    """Counts of each split, one a line."""
    lines = []
    for split, counts in sidecar.facts.items():
        steps = max(counts["steps"], 1)
        lines.append(
            f"{split}: {counts['idle_steps'] / steps:.1%} of {counts['steps']} steps are idle; "
            f"{counts['kept_steps'] / steps:.1%} stay, in {counts['ranges']} ranges; "
            f"{counts['episodes_without_range']} of {counts['episodes']} episodes have none"
        )
    return "\n".join(lines)
