"""Selection of episodes, against plain loops over texts and values."""

from __future__ import annotations

import types
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from uwm_jax.config import source
from uwm_jax.data.columns import DiskColumn
from uwm_jax.data.selection import Condition, Selection, conditions, describe_not_finite, not_finite, select
from uwm_jax.errors import UserError

LABS, OUTCOMES = ("IRIS", "WEIRD", "CLVR"), ("success", "failure")
FILES = [f"/data/{LABS[i % 3]}/{OUTCOMES[i % 2]}/{i}.h5" for i in range(30)]
FOLDERS = [f"/recordings/{LABS[i % 3]}/{i}" for i in range(30)]


class FakeDataset:
    num_episodes = 30
    episode_lengths = np.arange(10, 40)

    def column_key(self, name: str) -> str:
        return name

    def column(self, key: str, keep: bool) -> np.ndarray:
        """Positive at the last step of every third episode, at no other."""
        ends = np.cumsum(self.episode_lengths) - 1
        return np.where(np.isin(np.arange(ends[-1] + 1), ends[::3]), 1.0, -1.0).astype(np.float32)

    def episode_texts(self, key: str) -> list[str]:
        return {"episode_metadata/file_path": FILES, "recording_folderpath": FOLDERS}[key]


def chosen(**fields) -> Selection:
    return select(FakeDataset(), source(**fields), "here")  # type: ignore[arg-type]


def test_each_key_must_hold_one_of_its_texts() -> None:
    selection = chosen(include=("success", ("recording_folderpath", "WEIRD"), ("recording_folderpath", "IRIS")))
    assert np.flatnonzero(selection.kept).tolist() == [i for i in range(30) if i % 2 == 0 and i % 3 != 2]
    assert str(selection) == ("'success' in episode_metadata/file_path; 'WEIRD' or 'IRIS' in recording_folderpath")
    assert selection.counts == (f"10 of them with {selection}",)
    selection = chosen(include=("success",), exclude=(("recording_folderpath", "WEIRD"), "/12.h5"))
    assert np.flatnonzero(selection.kept).tolist() == [i for i in range(30) if i % 2 == 0 and i % 3 != 1 and i != 12]
    assert not chosen().rules and chosen().kept.all()


def test_conditions_of_one_key_are_one() -> None:
    fields = types.SimpleNamespace(
        include=(("k", "a"), "b"), exclude=("c", ("episode_metadata/k", "d")), path_key="episode_metadata/k"
    )
    assert conditions(fields) == (Condition("k", ("a", "b"), ("c", "d")),)


def test_conditions_that_nothing_meets_are_counted_one_by_one() -> None:
    with pytest.raises(UserError) as error:
        chosen(include=("success", ("recording_folderpath", "KIT")), exclude=("IRIS",))
    assert str(error.value) == (
        "here: none of 30 episodes has 'success' but no 'IRIS' in episode_metadata/file_path; 'KIT' in "
        "recording_folderpath.\n"
        "  10 of 30 have 'success' but no 'IRIS' in episode_metadata/file_path\n"
        "  0 of 30 have 'KIT' in recording_folderpath\n"
        "The first episode has '/data/IRIS/success/0.h5' and '/recordings/IRIS/0'."
    )
    with pytest.raises(UserError, match=r"has 'KIT' in episode_metadata/file_path\. The first episode has '/data/IRIS"):
        chosen(include=("KIT",))


def test_lengths_and_success_are_conditions_too() -> None:
    selection = chosen(include=("success",), min_steps=20, max_steps=35, success="reward", max_episodes=2)
    passing = [i for i in range(30) if i % 2 == 0 and i % 3 == 0 and 20 <= 10 + i <= 35]
    assert set(np.flatnonzero(selection.kept)) < set(passing) and selection.kept.sum() == 2
    rule = "'success' in episode_metadata/file_path; at least 20 steps; at most 35 steps; reward above 0 at some step"
    assert str(selection) == f"{rule}; 2 chosen by seed 0"
    assert selection.counts[0] == f"{len(passing)} of them with {rule}"
    with pytest.raises(UserError, match=r"none of 30 episodes has at least 40 steps\. Episodes have 10 to 39 steps\."):
        chosen(min_steps=40)
    with pytest.raises(UserError, match=r"(?s)5 of 30 have at least 35 steps\n.*\nEpisodes have 10 to 39 steps\."):
        chosen(min_steps=35, max_steps=34)


def test_at_most_so_many_episodes_of_those_that_pass() -> None:
    passing = {i for i in range(30) if i % 2 == 0}
    found = {seed: chosen(include=("success",), max_episodes=6, max_episodes_seed=seed) for seed in range(4)}
    episodes = {seed: np.flatnonzero(selection.kept).tolist() for seed, selection in found.items()}
    assert all(len(set(e)) == 6 and set(e) <= passing for e in episodes.values())
    assert len({tuple(e) for e in episodes.values()}) == 4
    assert (
        episodes[2] == np.flatnonzero(chosen(include=("success",), max_episodes=6, max_episodes_seed=2).kept).tolist()
    )
    assert str(found[2]) == "'success' in episode_metadata/file_path; 6 chosen by seed 2"
    assert found[2].counts == ("15 of them with 'success' in episode_metadata/file_path", "6 chosen by seed 2")
    # Where there are no more than that, nothing is chosen, and the seed means nothing.
    for most in (15, 2000):
        whole = chosen(include=("success",), max_episodes=most, max_episodes_seed=3)
        assert set(np.flatnonzero(whole.kept)) == passing and len(whole.rules) == 1


def test_what_is_left_out_is_part_of_what_a_selection_is() -> None:
    whole = chosen(include=("success",))
    a, b = whole.without(np.array([0, 4])), whole.without(np.array([0, 6]))
    assert np.flatnonzero(whole.kept & ~a.kept).tolist() == [0, 4] and whole.kept[0]
    assert str(a) != str(b) and str(a).startswith(f"{whole}; without 2 that are not finite (")
    assert a.counts[-1] == "2 left out, as NaN or infinite"


def test_broken_episodes_are_found_across_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 40)
    counted = lengths - rng.integers(0, 2, 40)
    column = rng.normal(size=(lengths.sum(), 2, 3)).astype(np.float32)
    broken = rng.choice(len(column), 25, replace=False)
    column[broken, rng.integers(0, 2, 25), rng.integers(0, 3, 25)] = rng.choice([np.nan, np.inf, -np.inf], 25)
    starts = np.cumsum(lengths) - lengths
    np.save(tmp_path / "column.npy", column)
    on_disk = DiskColumn(tmp_path / "column.npy", google_crc32c.value((tmp_path / "column.npy").read_bytes()))
    for steps in (lengths, counted, np.zeros(40, int)):
        expected = [e for e in range(40) if any(not np.isfinite(column[starts[e] + t]).all() for t in range(steps[e]))]
        assert not_finite(column, lengths, steps, block=7).tolist() == expected
        assert not_finite(on_disk, lengths, steps).tolist() == expected
    assert not_finite(np.zeros((5, 1), np.int64), np.array([5]), np.array([5])).tolist() == []


def test_the_first_few_broken_episodes_are_named() -> None:
    text = describe_not_finite({"action": np.arange(2, 9), "observation/state": np.array([8, 20])}, 30, "here")
    assert "action: 7 episodes (2, 3, 4, 5, 6 and 2 more)" in text
    assert "observation/state: 2 episodes (8, 20)" in text and "here 8 of 30 episodes" in text
