"""Statistics and normalisers of a loader: of training episodes alone, kept next to the dataset, never stale."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data import loader_case as case
from uwm_jax.data.loader import Loader
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.records import Dataset
from uwm_jax.data.stats import key_stats
from uwm_jax.data.transforms import Columns, get_transform
from uwm_jax.data.windows import split_episodes
from uwm_jax.errors import UserError

LENGTHS, made, config, rlds_source = case.LENGTHS, case.made, case.config, case.rlds_source
_loader, _take = case.open_loader, case.take
_raw_actions, _minmax = case.raw_actions, case.minmax


def test_transformed_statistics_are_kept_and_never_stale(
    made, config: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    _loader(config)
    capsys.readouterr()
    _loader(config)
    directory = made[0] / "derived_stats"
    file = directory / "train.action_dict.cartesian_velocity.xyz_euler_to_rot6d.val_0.05.json"
    stored = json.loads(file.read_text())
    train = split_episodes(len(LENGTHS), 0.05)[0]
    expected = np.concatenate([_raw_actions(made[1][e])[:, :9] for e in train])
    assert stored["stats"]["count"] == len(expected)
    np.testing.assert_allclose(stored["stats"]["max"], expected.max(axis=0), rtol=1e-6)
    assert capsys.readouterr().err == ""
    edited = json.loads(json.dumps(stored))
    edited["stats"]["max"][0] += 1
    without = {key: value for key, value in stored.items() if key != "digest"}
    for text in (json.dumps(edited), json.dumps(without), json.dumps(stored)[:100], "[" * 99_999, "[]", ""):
        file.write_text(text)
        _loader(config)
        assert json.loads(file.read_text()) == stored
        assert capsys.readouterr().err.startswith(f"{file}: edited, damaged or of an older version") == bool(text)
    other = without | {"fingerprint": "other"}
    digest = hashlib.sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(other | {"digest": digest}))
    with pytest.raises(
        UserError, match=rf"{file.name} holds statistics of another dataset .*other.*delete .*/derived_"
    ):
        _loader(config)
    file.unlink()


def test_statistics_of_long_names_are_kept_too(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = shutil.copytree(made[0], tmp_path / "copy", ignore=shutil.ignore_patterns("derived_stats"))
    dataset, columns = Dataset(directory), Columns("action", 0, 6)
    first, second = (dataclasses.replace(get_transform("identity"), name="n" * 300 + end) for end in "ab")
    found = [key_stats(dataset, columns, transform, 0.05, selection="some") for transform in (first, second)]
    assert len(list((directory / "derived_stats").iterdir())) == 2
    monkeypatch.setattr(Dataset, "column", None)  # not read again
    assert [key_stats(dataset, columns, transform, 0.05, selection="some") for transform in (first, second)] == found


def _entries(loader: Loader) -> dict[str, list[list[float]]]:
    return {key: [x.tolist() for x in pair] for key, pair in loader.data.spec.normalizer.entries.items()}


@pytest.mark.parametrize("kind", ["minmax", "quantile"])
def test_the_normaliser_knows_training_episodes_only(made, config: ConfigDict, tmp_path: Path, kind: str) -> None:
    config.normalize, config.val_ratio = kind, 0.3
    copy = shutil.copytree(made[0], tmp_path / "copy", ignore=shutil.ignore_patterns("derived_stats"))
    config.path = str(copy)
    dataset = Dataset(config.path)
    train, held_out = split_episodes(len(LENGTHS), 0.3)
    assert len(held_out) == 2

    def values(episodes: np.ndarray, change: float) -> dict[str, list[list[float]]]:
        for key in dataset.column_keys:
            column = np.array(Dataset(made[0]).column(key))
            for e in episodes:
                rows = slice(dataset.episode_starts[e], dataset.episode_starts[e] + LENGTHS[e])
                column[rows] = change if column.dtype.kind == "f" else 1 << 40
            rlds_source.write_column(copy, key, column)
        shutil.rmtree(copy / "derived_stats", ignore_errors=True)
        return _entries(_loader(config))

    original = values(held_out[:0], 0.0)
    assert values(held_out, 1e6) == original
    config.drop_nonfinite = True
    assert values(held_out, np.nan) == original
    changed = values(train[:1], 1e6)
    assert all(changed[key] != original[key] for key in original)


def _with_nan(made, directory: Path, **episodes: list[int]) -> str:
    """A copy of the dataset in which a value of these episodes is NaN, by the column's last name."""
    shutil.copytree(made[0], directory, ignore=shutil.ignore_patterns("derived_stats"))
    dataset = Dataset(directory)
    for name, numbers in episodes.items():
        key = next(k for k in dataset.column_keys if k.rpartition("/")[2] == name)
        column = np.array(dataset.column(key))
        column[dataset.episode_starts[numbers] + np.asarray(LENGTHS)[numbers] - 1] = np.nan
        rlds_source.write_column(directory, key, column)
    return str(directory)


@pytest.mark.parametrize("place", ["training", "held out"])
def test_values_that_are_not_finite_are_named(made, config: ConfigDict, tmp_path: Path, place: str) -> None:
    train, held_out = split_episodes(len(LENGTHS), config.val_ratio)
    e = int(train[2] if place == "training" else held_out[0])
    config.path = _with_nan(made, tmp_path / "copy", action=[e], state=[0, 1, 2, 3, 4, 5], reward=[4])
    told = rf"copy has values .*\n  action: 1 episode \({e}\)\n  .*/state: 6 episodes \(0, 1, 2, 3, 4 and 1 more\)\n"
    with pytest.raises(UserError, match=told + r"--config.data.drop_nonfinite=true .* 6 of 6"):
        _loader(config)
    config.low_dim, config.action = ("gripper",), (("action_dict/gripper_position", "identity"),)
    assert len(_take(_loader(config), 1)) == 1  # nothing of what is read is broken


def test_episodes_that_are_not_finite_are_left_out(made, config: ConfigDict, tmp_path: Path) -> None:
    config.val_ratio = 0.5
    train, held_out = split_episodes(len(LENGTHS), 0.5)
    bad = [int(train[0]), int(held_out[-1])]
    config.path = _with_nan(made, tmp_path / "copy", action=bad[:1], state=bad, gripper=[])
    config.drop_nonfinite = True
    loader = _loader(config)
    assert "6 episodes (2 left out, as NaN or infinite), " in loader.data.summary()
    assert set(loader.data.training_windows(10_000).episodes) == {e for e in train if LENGTHS[e] > 9} - set(bad)
    assert set(loader.data.held_out(10_000).episodes) == {e for e in held_out if LENGTHS[e] > 9} - set(bad)
    raw = np.concatenate([_raw_actions(made[1][e]) for e in train if e not in bad])
    np.testing.assert_allclose(loader.data.spec.normalizer.entries["action"][0], _minmax(raw)[0], rtol=1e-6)
    # The order is that of these episodes: another choice of them is other data.
    state = json.loads(json.dumps(loader.state(3)))
    _loader(config, start_step=3, state=state)
    config.low_dim = ("gripper",)
    with pytest.raises(UserError, match=r"datasets/.*\(without 2 that .* this run has .*\(without 1 that are not"):
        _loader(config, start_step=3, state=state)


def test_episodes_that_are_left_out_may_be_all(made, config: ConfigDict, tmp_path: Path) -> None:
    config.val_ratio, config.drop_nonfinite = 0.5, True
    train, held_out = (e.tolist() for e in split_episodes(len(LENGTHS), 0.5))
    config.path = _with_nan(made, tmp_path / "validation", action=held_out)
    with pytest.raises(
        UserError, match=r"3 of 6 episodes are held out, 0 of them used \(without 3 that are not finite"
    ):
        _loader(config).data.held_out(4)
    config.path = _with_nan(made, tmp_path / "training", action=train)
    with pytest.raises(UserError, match=r"there are no training episodes of .* \(without 3 .*: all that .* left out"):
        _loader(config)


def test_statistics_follow_the_split(config: ConfigDict) -> None:
    """Cached ones of another share of held-out episodes are never taken."""
    found = {}
    for ratio in (0.0, 0.5, 0.05, 0.5, 0.0):
        config.val_ratio = ratio
        entries = _entries(_loader(config))
        assert found.setdefault(ratio, entries) == entries
    assert found[0.0] != found[0.05] != found[0.5]


def test_a_given_normaliser_is_used_instead(config: ConfigDict) -> None:
    given = Normalizer({"action": (np.full(17, 2, np.float32), np.full(17, 1, np.float32))})
    loader = _loader(config, normalizer=given)
    assert loader.data.spec.normalizer is given
    raw, found = (_take(_loader(config, normalizer=n), 1)[0] for n in (Normalizer(), given))
    np.testing.assert_allclose(found["action"], (raw["action"] - 1) / 2, rtol=1e-6)
    np.testing.assert_array_equal(found["obs/state"], raw["obs/state"])  # an absent key is the identity

    def pair(width: int) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(width, np.float32), np.zeros(width, np.float32)

    for entries, message in (
        ({"action": pair(7)}, r"is for action \(7 numbers\), but .* read action \(17 numbers\), gripper"),
        ({"action": pair(17), "state": pair(4)}, r"state \(4 numbers\), but .* state \(3 numbers\)"),
        ({"action": pair(17), "pose": pair(3)}, r"pose \(3 numbers\), but .* state \(3 numbers\)"),
    ):
        with pytest.raises(UserError, match=message):
            _loader(config, normalizer=Normalizer(entries))
    every = {"action": pair(17), "state": pair(3), "gripper": pair(1), "unused": pair(9)}
    _loader(config, normalizer=Normalizer(every))


def test_a_given_normaliser_needs_no_statistics(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uwm_jax.data.sources.key_stats", None)
    _loader(config, normalizer=Normalizer())
