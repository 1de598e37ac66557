"""Selection of the episodes that a source uses: by their strings, lengths and success, up to a number, if finite."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uwm_jax.data.columns import Column
from uwm_jax.data.records import Dataset
from uwm_jax.errors import UserError

_NAMED = 5  # episodes that a message lists by number


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition on an episode's string under `key`, such as its path.

    Attributes:
        include: it must contain one of these; () = no condition.
        exclude: it must contain none of these.
    """

    key: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __str__(self) -> str:
        wanted = [" or ".join(map(repr, self.include))] if self.include else []
        unwanted = ["no " + " and no ".join(map(repr, self.exclude))] if self.exclude else []
        return f"{' but '.join(wanted + unwanted)} in {self.key}"

    def holds(self, texts: Iterable[str]) -> np.ndarray:
        """(E,) bool, for the strings of E episodes."""
        held = [
            (not self.include or any(part in text for part in self.include))
            and not any(part in text for part in self.exclude)
            for text in texts
        ]
        return np.asarray(held, np.bool_)


def conditions(fields: Any) -> tuple[Condition, ...]:
    """The conditions of a source, one per key, from `include` and `exclude` of `uwm_jax.config.source`."""
    names: dict[str, str] = {}  # a key without `episode_metadata/` -> as it is spelled first
    parts: dict[str, tuple[list[str], list[str]]] = {}
    for place, entries in enumerate((fields.include, fields.exclude)):
        for entry in entries:
            key, text = (fields.path_key, entry) if isinstance(entry, str) else entry
            short = key.removeprefix("episode_metadata/")
            names.setdefault(short, key)
            parts.setdefault(short, ([], []))[place].append(text)
    return tuple(Condition(names[k], tuple(include), tuple(exclude)) for k, (include, exclude) in parts.items())


@dataclasses.dataclass(frozen=True)
class Selection:
    """The episodes of a dataset that one source uses, held-out ones among them.

    Attributes:
        kept: (E,) bool.
        rules: what limits them, in words; episodes and rules together are what must not change while a run continues.
        counts: how many each of the rules leaves, or takes away, in words.
    """

    kept: np.ndarray
    rules: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join(self.rules)

    def limited(self, rules: Iterable[str]) -> Selection:
        """The same episodes, with rules that their windows must meet."""
        return dataclasses.replace(self, rules=(*self.rules, *rules))

    def without(self, episodes: np.ndarray) -> Selection:
        """Less some episodes whose values are not finite."""
        kept = self.kept.copy()
        kept[episodes] = False
        which = hashlib.sha256(np.sort(episodes).astype("<i8").tobytes()).hexdigest()[:8]
        return Selection(
            kept,
            (*self.rules, f"without {len(episodes)} that are not finite ({which})"),
            (*self.counts, f"{len(episodes)} left out, as NaN or infinite"),
        )


def select(dataset: Dataset, fields: Any, where: str) -> Selection:
    """The episodes that meet the conditions of a source, or a random choice of them if there are too many.

    Args:
        fields: those of `uwm_jax.config.source`.
        where: the name of the source in messages.
    Raises:
        UserError: no episode meets the conditions, or the dataset lacks a string.
    """
    selection = Selection(np.ones(dataset.num_episodes, np.bool_))
    texts = {condition.key: dataset.episode_texts(condition.key) for condition in conditions(fields)}
    asked = {str(condition): condition.holds(texts[condition.key]) for condition in conditions(fields)}
    asked |= _of_steps(dataset, fields)
    if asked:
        kept = np.logical_and.reduce(list(asked.values()))
        rule = "; ".join(asked)
        if not kept.any():
            raise UserError(_nothing_passes(dataset, asked, texts, where))
        selection = Selection(kept, (rule,), (f"{int(kept.sum())} of them with {rule}",))
    if 0 < fields.max_episodes < selection.kept.sum():
        generator = np.random.default_rng(fields.max_episodes_seed)
        chosen = generator.choice(np.flatnonzero(selection.kept), fields.max_episodes, replace=False)
        kept = np.zeros(dataset.num_episodes, np.bool_)
        kept[chosen] = True
        how = f"{fields.max_episodes} chosen by seed {fields.max_episodes_seed}"
        selection = Selection(kept, (*selection.rules, how), (*selection.counts, how))
    return selection


def _of_steps(dataset: Dataset, fields: Any) -> dict[str, np.ndarray]:
    """{condition: (E,) bool} of the conditions of a source on lengths and on success."""
    found: dict[str, np.ndarray] = {}
    if fields.min_steps:
        found[f"at least {fields.min_steps} steps"] = dataset.episode_lengths >= fields.min_steps
    if fields.max_steps:
        found[f"at most {fields.max_steps} steps"] = dataset.episode_lengths <= fields.max_steps
    if fields.success:
        key, lengths = dataset.column_key(fields.success), dataset.episode_lengths
        episodes, _ = steps_where(lambda x: np.any(x > 0, axis=1), dataset.column(key, keep=False), lengths, lengths)
        found[f"{key} above 0 at some step"] = np.bincount(episodes, minlength=len(lengths)) > 0
    return found


def _nothing_passes(dataset: Dataset, asked: Mapping[str, np.ndarray], texts: Mapping[str, Any], where: str) -> str:
    total = dataset.num_episodes
    lines = [f"{where}: none of {total} episodes has {'; '.join(asked)}."]
    if len(asked) > 1:
        lines += [f"  {int(held.sum())} of {total} have {condition}" for condition, held in asked.items()]
    found = []
    if texts:
        found.append(f"The first episode has {' and '.join(repr(next(iter(of), '')) for of in texts.values())}.")
    if len(texts) < len(asked) and total:
        found.append(f"Episodes have {dataset.episode_lengths.min()} to {dataset.episode_lengths.max()} steps.")
    return ("\n" if len(lines) > 1 else " ").join(["\n".join(lines), " ".join(found)])


def not_finite(column: Column, lengths: np.ndarray, counted: np.ndarray, block: int = 1 << 18) -> np.ndarray:
    """(n,) numbers of the episodes with NaN or infinity in one of the first `counted` (E,) steps.

    Args:
        column: (steps, ...) of all episodes, one after another; read once, by blocks.
        lengths: (E,) of the episodes.
    """
    if column.dtype.kind != "f":
        return np.zeros(0, np.int64)
    episodes, _ = steps_where(lambda x: np.any(~np.isfinite(x), axis=1), column, lengths, counted, block)
    return np.unique(episodes)


def steps_where(
    test: Callable[[np.ndarray], np.ndarray],
    column: Column,
    lengths: np.ndarray,
    counted: np.ndarray,
    block: int = 1 << 18,
) -> tuple[np.ndarray, np.ndarray]:
    """(episodes, steps), (n,) int64 each, of steps that pass a test, among the first `counted` (E,) of each episode.

    Args:
        test: of rows (m, D) to (m,) bool.
        column, lengths: as `not_finite`.
    """
    ends = np.cumsum(lengths)
    found: list[np.ndarray] = [np.zeros((2, 0), np.int64)]
    for start in range(0, len(column), block):
        values = column[start : start + block]
        rows = start + np.flatnonzero(test(values.reshape(len(values), -1)))
        episodes = np.searchsorted(ends, rows, side="right")
        steps = rows - (ends - lengths)[episodes]
        found.append(np.stack([episodes, steps])[:, steps < counted[episodes]])
    episodes, steps = np.concatenate(found, axis=1)
    return episodes, steps


def describe_not_finite(found: Mapping[str, np.ndarray], total: int, where: str) -> str:
    """The message, with the remedy, about episodes that are not finite, {key: numbers}, of `total` episodes."""
    lines = [f"{where} has values that are NaN or infinite:"]
    lines += [f"  {key}: {some_episodes(episodes)}" for key, episodes in found.items()]
    every = len(np.unique(np.concatenate(list(found.values()))))
    lines.append(
        f"--config.data.drop_nonfinite=true leaves out what is not finite, here {every} of {total} episodes, in "
        "training and held out; or remove them from the source and reshard it."
    )
    return "\n".join(lines)


def some_episodes(episodes: Sequence[int] | np.ndarray) -> str:
    """The number of episodes, and the first of them."""
    some = ", ".join(str(e) for e in episodes[:_NAMED])
    more = f" and {len(episodes) - _NAMED} more" if len(episodes) > _NAMED else ""
    return f"{len(episodes)} episode{'s' if len(episodes) != 1 else ''} ({some}{more})"
