"""Windows as data: which steps of an episode make one training sample, and how many samples there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from uwm_jax.data.intervals import Intervals, pieces
from uwm_jax.errors import UserError

OF_FRAMES = ("obs", "next_obs")  # groups with camera frames
OF_ACTIONS = ("action",)  # groups whose steps need an action; the steps of the others are observed
GROUPS = (*OF_FRAMES, *OF_ACTIONS)


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """Relative step indices of a sample. The paper's is obs (0, 1), action 1..16, next_obs (17, 18).

    Attributes:
        groups: {group of `GROUPS`: indices relative to the window's origin}; a group without indices is absent.
        pad: "none": every index lies inside the episode, so an episode of length L has
            L - (largest - smallest index) windows; "edge": every step is once the last observed one
            (`obs[-1]`), and indices outside the episode repeat its first or last step, so L windows.
        reserve: () or (first, last) indices that lie inside the episode too, whatever `pad` says, without being read:
            systems with shorter windows get the (episode, origin) windows of the longest.

    Where an episode has fewer actions than steps, those of `action` lie inside (or repeat the last of) its actions.
    """

    groups: Mapping[str, tuple[int, ...]]
    pad: str = "none"
    reserve: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: Any) -> WindowSpec:
        """From `config.data.window`."""
        groups = {name: tuple(config[name]) for name in GROUPS if config[name]}
        return cls(groups, config.pad, tuple(config.reserve))

    @property
    def obs(self) -> tuple[int, ...]:
        return self.groups.get("obs", ())

    @property
    def action(self) -> tuple[int, ...]:
        return self.groups.get("action", ())

    @property
    def next_obs(self) -> tuple[int, ...]:
        return self.groups.get("next_obs", ())

    def describe(self) -> str:
        """`19 steps of an episode: 2 frames of each camera that are seen, a chunk of 16 actions, and 2 later frames`,
        for people."""
        steps = [index for indices in self.groups.values() for index in indices]
        frames = f"{len(self.obs)} frames of each camera that are seen"
        actions = f", a chunk of {len(self.action)} actions" if self.action else ""
        later = f", and {len(self.next_obs)} later frames" if self.next_obs else ""
        return f"{max(steps) - min(steps) + 1} steps of an episode: {frames}{actions}{later}"

    def to_json(self) -> dict[str, Any]:
        groups = {name: list(indices) for name, indices in self.groups.items()}
        return {"groups": groups, "pad": self.pad, "reserve": list(self.reserve)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> WindowSpec:
        groups = {str(name): tuple(int(i) for i in indices) for name, indices in stored["groups"].items()}
        return cls(groups, str(stored["pad"]), tuple(int(i) for i in stored["reserve"]))

    @property
    def present(self) -> int:
        """Index of the present frame, the newest that a policy has seen."""
        return max(self.obs, default=0)

    @property
    def places(self) -> dict[str, Any]:
        """The fields that decide where there are windows: equal for specs with the same (episode, origin) pairs."""
        reach = [(min(x), max(x)) if x else () for x in (self._observed, self._acted)]
        return {"pad": self.pad, "first_origin": self.first_origin, "reach": reach}

    @property
    def span(self) -> int:
        """Steps that an episode must have for one window."""
        indices = [*self._observed, *self._acted]
        return max(indices) - min(indices) + 1

    @property
    def first_origin(self) -> int:
        """Origin of an episode's first window."""
        return -min([*self._observed, *self._acted])

    def count(self, lengths: np.ndarray, action_lengths: np.ndarray | None = None) -> np.ndarray:
        """Windows of episodes of these lengths, (E,) int64, whose first `action_lengths` steps have an action (all of
        them if None)."""
        lengths = np.asarray(lengths, np.int64)
        actions = lengths if action_lengths is None else np.asarray(action_lengths, np.int64)
        ends = [n - max(indices) for n, indices in ((lengths, self._observed), (actions, self._acted)) if indices]
        counts = np.maximum(np.min(ends, axis=0) - self.first_origin, 0)
        return np.where(actions > 0, counts, 0) if self.action else counts

    @property
    def _observed(self) -> tuple[int, ...]:
        """Indices that lie inside the episode's steps."""
        if self.pad == "edge":
            return (max(self.obs, default=0), *self.reserve)
        return (*(i for name, steps in self.groups.items() if name not in OF_ACTIONS for i in steps), *self.reserve)

    @property
    def _acted(self) -> tuple[int, ...]:
        """Indices that lie inside the episode's actions."""
        if self.pad == "edge":
            return ()
        return tuple(i for name, steps in self.groups.items() if name in OF_ACTIONS for i in steps)

    def steps(self, indices: tuple[int, ...], origin: int, length: int) -> list[int]:
        """Steps of an episode of `length` (for actions: with so many of them) that `indices` mean for a window at
        `origin`."""
        return [min(max(origin + i, 0), length - 1) for i in indices]


@dataclasses.dataclass(frozen=True)
class Layout:
    """All windows of some episodes before any limit, numbered episode by episode, one number being left out after each
    episode, so that no interval of numbers of windows crosses an episode's end.

    Attributes:
        spec: the window.
        episodes: (n,) int64 numbers of the episodes that have windows, rising.
        lengths, actions: (n,) int64, their steps, and how many of these, from the first on, have an action.
        counts: (n,) int64, their windows.
        bases: (n,) int64, the number of each one's first window.
    """

    spec: WindowSpec
    episodes: np.ndarray
    lengths: np.ndarray
    actions: np.ndarray
    counts: np.ndarray
    bases: np.ndarray

    @classmethod
    def of(cls, spec: WindowSpec, lengths: np.ndarray, actions: np.ndarray, episodes: np.ndarray) -> Layout:
        """The layout of `episodes`, of all of which `lengths` and `actions` tell."""
        counts = spec.count(lengths[episodes], actions[episodes])
        episodes, counts = np.asarray(episodes, np.int64)[counts > 0], counts[counts > 0]
        return cls(spec, episodes, lengths[episodes], actions[episodes], counts, np.cumsum(counts + 1) - counts - 1)

    @property
    def size(self) -> int:
        """One more than the largest number."""
        return int((self.counts + 1).sum())

    @property
    def gaps(self) -> Intervals:
        """The numbers that are left out."""
        ends = self.bases + self.counts
        return Intervals.union(ends, ends + 1)

    def numbers(self, episodes: np.ndarray, first: np.ndarray, stop: np.ndarray) -> Intervals:
        """The windows of each of `episodes` (m,) that begin at a step of [first, stop), (m,) each; episodes may repeat,
        and need not be of this layout."""
        at = np.searchsorted(self.episodes, episodes)
        known = at < len(self.episodes)
        known[known] = self.episodes[at[known]] == episodes[known]
        at = at[known]
        ends = [np.clip(x[known] - self.spec.first_origin, 0, self.counts[at]) + self.bases[at] for x in (first, stop)]
        return Intervals.union(*ends)


class Limit(Protocol):
    """A condition on windows.

    Attributes:
        rule: the condition, in words that identify it: what must not change while a run continues.
        name: the same for people, as what leaves windows out.
    """

    @property
    def rule(self) -> str: ...

    @property
    def name(self) -> str: ...

    def left_out(self, layout: Layout) -> Intervals:
        """The windows that do not meet it; any of `layout.gaps` may be among these."""
        ...


class Windows:
    """All windows of some episodes that meet some limits, numbered 0 .. len - 1 episode by episode.

    Held in memory is a row for each run of windows at consecutive steps: one for each episode where nothing is left
    out.

    Args:
        spec: the window.
        lengths: (E,) lengths of all episodes of the split.
        episodes: (n,) which of them to use, rising.
        what: names the set in the error message.
        action_lengths: (E,) numbers of actions of all episodes, if these differ from `lengths`.
        limits: what the windows must meet.
    Raises:
        UserError: there are no episodes, none is long enough, or the limits leave nothing.

    Attributes:
        episodes: (r,) int32, the episode of each run; origins: (r,) int32, the step at which its first window begins.
        left_out: {name of a limit: how many of the windows do not meet it}.
        total: how many windows there are without the limits.
    """

    def __init__(
        self,
        spec: WindowSpec,
        lengths: np.ndarray,
        episodes: np.ndarray,
        what: str = "episodes",
        action_lengths: np.ndarray | None = None,
        limits: Sequence[Limit] = (),
    ):
        lengths = np.asarray(lengths)
        actions = lengths if action_lengths is None else np.asarray(action_lengths)
        if not len(episodes):
            raise UserError(
                f"there are no {what}: all that would do are held out (config.data.val_ratio) or left out "
                "(config.data.drop_nonfinite)."
            )
        layout = Layout.of(spec, lengths, actions, np.asarray(episodes))
        if not len(layout.episodes):
            longest = int(np.max(lengths[episodes], initial=0))
            if spec.count(lengths[episodes]).any():
                raise UserError(
                    f"config.data.window asks for more actions than the {len(episodes)} {what} have: the longest has "
                    f"{longest} steps, the last of which (is_last) has none. Use a shorter config.data.window.action, "
                    "config.data.window.pad='edge', or config.data.last_action='keep'."
                )
            raise UserError(
                f"config.data.window spans {spec.span} steps, but the longest of {len(episodes)} {what} has {longest}. "
                f"Use a window of at most {longest} steps, or config.data.window.pad='edge'."
            )
        self.spec = spec
        self.total = int(layout.counts.sum())
        parts = {limit.name: limit.left_out(layout) for limit in limits}
        self.left_out = {
            name: self.total - len(Intervals.joined(layout.gaps, part).complement(layout.size))
            for name, part in parts.items()
        }
        kept = Intervals.joined(layout.gaps, *parts.values()).complement(layout.size)
        if not len(kept):
            each = "; ".join(f"{count} left out by {name}" for name, count in self.left_out.items())
            raise UserError(f"none of the {self.total} windows of {len(episodes)} {what} is left: {each}.")
        at = np.searchsorted(layout.bases, kept.starts, side="right") - 1
        self.episodes = layout.episodes[at].astype(np.int32)
        self.origins = (kept.starts - layout.bases[at] + spec.first_origin).astype(np.int32)
        self._ends = np.cumsum(kept.stops - kept.starts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_episodes(self) -> int:
        """Episodes that have a window."""
        return int(np.count_nonzero(np.diff(self.episodes))) + 1

    def locate(self, window: int) -> tuple[int, int]:
        """(episode number in the split, origin step) of a window."""
        i = int(self._ends.searchsorted(window, side="right"))
        start = int(self._ends[i - 1]) if i else 0
        return int(self.episodes[i]), window - start + int(self.origins[i])

    def locate_all(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 episode numbers in the split, and (n,) int64 origin steps, of windows (n,)."""
        i = np.searchsorted(self._ends, windows, side="right")
        starts = np.where(i > 0, self._ends[i - 1], 0)
        return self.episodes[i].astype(np.int64), windows - starts + self.origins[i]

    def steps_held(self, indices: tuple[int, ...], lengths: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
        """(size,) bool of the steps of all episodes, one episode after another: those that a window has at one of
        `indices`.

        Args:
            lengths: (E,) of all episodes, within which `WindowSpec.steps` keeps the steps.
            starts: (E,) where each episode begins.
        """
        last, begin = lengths[self.episodes] - 1, starts[self.episodes]
        counts = np.diff(self._ends, prepend=0)
        found = [
            Intervals.union(
                begin + np.clip(self.origins + first, 0, last),
                begin + np.clip(self.origins + counts - 1 + after, 0, last) + 1,
            )
            for first, after in pieces(indices)
        ]
        return Intervals.joined(*found).mask(size)


def split_episodes(num_episodes: int, val_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) episode numbers, both rising.

    clip(round(val_ratio * N), 1, N - 1) episodes, chosen without replacement by numpy's default_rng(0), are
    held out (the official code's rule, shared with diffusion policy); none for val_ratio 0 or N = 1.
    """
    if val_ratio <= 0 or num_episodes < 2:
        return np.arange(num_episodes), np.arange(0)
    held_out = min(max(round(val_ratio * num_episodes), 1), num_episodes - 1)
    chosen = np.sort(np.random.default_rng(0).choice(num_episodes, held_out, replace=False))
    return np.setdiff1d(np.arange(num_episodes), chosen), chosen
